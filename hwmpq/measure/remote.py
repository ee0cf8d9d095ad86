"""A worker on another machine: it is sent its own program, then the files of every block of cells.

The machine needs Python, numpy and TVM's runtime. Nothing is compiled there and nothing stays.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from hwmpq.artifact.golden import SAMPLES, Replay
from hwmpq.devices import Device
from hwmpq.errors import DeviceError, InputError, in_words
from hwmpq.measure import kit, onsite
from hwmpq.measure.process import WorkerProcess

#: The longest silence while a piece of a file is on its way, and its size in bytes.
TRANSFER_DEADLINE_S = 60.0
_PIECE_BYTES = 8 << 20
#: The longest that an artifact may take for one image: under an emulator 10^9 products of fp32
#: numbers take 6 s, far longer beside other work. And images that it gets at once.
IMAGE_DEADLINE_S = 60.0
_PART_IMAGES = 32
#: Fields of a Cell that name a file or a folder.
_FILES = ("library", "launches", "args", "expected", "loop", "path")
#: Reads the program from stdin, checks it, and hands over. Arguments: its bytes, SHA-256, settings.
_BOOT = f"""
import hashlib, os, sys, tempfile, zlib
size, right = int(sys.argv[1]), sys.argv[2]
data = b""
while len(data) < size:
    piece = os.read(0, size - len(data))
    if not piece:
        sys.exit("the worker program did not arrive")
    data += piece
if hashlib.sha256(data).hexdigest() != right:
    sys.exit("the worker program arrived damaged")
folder = tempfile.mkdtemp(prefix="{onsite.PREFIX}%d-" % os.getpid())
os.environ["{onsite.FOLDER}"] = folder
path = os.path.join(folder, "kit.zip")
with open(path, "wb") as file:
    file.write(zlib.decompress(data))
sys.path.insert(0, path)
from hwmpq.measure import worker
worker.main(sys.argv[3:])
""".strip()


class RemoteWorker(WorkerProcess):
    """As WorkerProcess, on a device that sees neither our files nor our hwmpq.

    Files of the cells of a `time` call are sent first, each with its hash, into a private folder.
    """

    def __init__(
        self, device: Device, log: Callable[[str], None] | None = None, *, threads: int = 1
    ):
        super().__init__(log=log, threads=threads)
        program = kit.archive()
        pairs = [f"{name}={value}" for name, value in self.settings.items()]
        digest = hashlib.sha256(program).hexdigest()
        #: The device, and the arguments of its Python.
        self.device, self.arguments = device, ["-c", _BOOT, str(len(program)), digest, *pairs]
        self.command = device.command(self.arguments)
        self.preamble = program
        # No name twice: a library of a known name is not loaded again but the old one taken.
        self._numbers = itertools.count()

    def call(
        self,
        op: str,
        payload: Mapping[str, Any],
        deadline_s: float,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        if op == "time":
            self.device.check_times()
            place = self._function("onsite:empty", {})["folder"]
            cells = [self._sent(cell, place) for cell in payload["cells"]]
            payload = {**payload, "cells": cells}
        return super().call(op, payload, deadline_s, on_progress)

    def describe(self) -> dict[str, Any]:
        """See `onsite.describe`. Raises DeviceError also for an answer that cannot be one, and for
        another machine than the device's description names."""
        found = self._function("onsite:describe", {})
        name, features = found.get("fingerprint"), found.get("features")
        if not (isinstance(name, str) and re.fullmatch(r"[\w-]{1,80}", name)):
            raise DeviceError("fingerprint of the device", repr(name))
        if not (isinstance(features, list) and all(isinstance(f, str) for f in features)):
            raise DeviceError("features of the device", repr(features))
        self.device.recognize(name)
        return found

    def _function(
        self, name: str, payload: Mapping[str, Any], deadline_s: float | None = None
    ) -> dict[str, Any]:
        request = {"function": f"hwmpq.measure.{name}", "payload": payload}
        within_s = TRANSFER_DEADLINE_S if deadline_s is None else deadline_s
        return super().call("call", request, within_s)

    def _sent(self, cell: Mapping[str, Any], place: str) -> dict[str, Any]:
        """The cell as the device finds it. Raises InputError for one that cannot go there."""
        if cell["kind"] == "program":
            raise InputError("a program of another runtime on a remote device", cell["function"])
        there, number = dict(cell), next(self._numbers)
        for field in filter(lambda name: cell[name], _FILES):
            path = Path(cell[field])
            name = f"{number}-{field}{path.suffix}"
            if path.is_dir():
                for file in sorted(path.iterdir()):
                    self._put(file.read_bytes(), f"{name}/{file.name}")
            else:
                self._put(path.read_bytes(), name)
            there[field] = f"{place}/{name}"
        return there

    def _put(self, data: bytes, name: str) -> None:
        for begin in range(0, len(data) or 1, _PIECE_BYTES):
            piece = data[begin : begin + _PIECE_BYTES]
            request: dict[str, Any] = {"name": name, "data": base64.b64encode(piece).decode()}
            if begin + _PIECE_BYTES >= len(data):
                request["sha256"] = hashlib.sha256(data).hexdigest()
            self._function("onsite:put", request)


class RemoteArtifact:
    """An artifact on a device, run there on images from here: for a target that this machine's CPU
    cannot run."""

    def __init__(self, worker: RemoteWorker, folder: Path):
        """Raises DeviceError where the device is lost or another one."""
        self._worker = worker
        worker.describe()
        worker._function("onsite:empty", {})
        self._name = f"{next(worker._numbers)}-artifact"
        for file in sorted(folder.iterdir()):
            worker._put(file.read_bytes(), f"{self._name}/{file.name}")

    def run_samples(
        self, images: NDArray[Any], progress: Callable[[int], None] | None = None
    ) -> NDArray[Any]:
        """As Artifact.run_samples. Raises DeviceError also for outputs that cannot be some."""
        rows = []
        for at in range(0, len(images), _PART_IMAGES):
            part = images[at : at + _PART_IMAGES]
            rows.append(self._outputs(part))
            if progress:
                progress(len(part))
        return np.concatenate(rows)

    def replay(self) -> Replay:
        """The golden samples, run there. Raises DeviceError for an answer that cannot be one."""
        request = {"artifact": self._name}
        found = self._worker._function("onsite:replay", request, SAMPLES * IMAGE_DEADLINE_S)
        try:
            return TypeAdapter(Replay).validate_python(found)
        except ValidationError as error:
            raise DeviceError("replay of the golden samples", error) from None

    def _outputs(self, images: NDArray[Any]) -> NDArray[Any]:
        packed = io.BytesIO()
        np.save(packed, images, allow_pickle=False)
        name = f"{self._name}-images"
        self._worker._put(packed.getvalue(), name)
        request = {"artifact": self._name, "images": name}
        deadline_s = len(images) * IMAGE_DEADLINE_S
        answer = self._worker._function("onsite:outputs", request, deadline_s)
        try:
            data = base64.b64decode(answer["outputs"], validate=True)
            found: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise DeviceError("outputs from the device", in_words(error)) from None
        if found.dtype != np.float32 or len(found) != len(images):
            raise DeviceError("outputs from the device", f"{found.dtype} {list(found.shape)}")
        return found
