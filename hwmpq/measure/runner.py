"""Times what a bundle holds, on the machine where it lies; writes one result file beside it.

    python runner.py [BUNDLE_FOLDER] [RESULT]

needs Python, numpy and TVM's runtime; for a GPU its driver instead of TVM. All files are checked
first. The result is written after each block of cells, so starting again goes on where it was; with
the same bundle on another machine it wants another RESULT.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hwmpq.errors import HwmpqError, InputError, UnsafeFile
from hwmpq.measure import cuda
from hwmpq.measure.environment import conditions, fingerprint, hardware
from hwmpq.measure.process import WorkerProcess
from hwmpq.measure.protocol import Cell, Protocol, time_block

VERSION = 1
MANIFEST, RESULT = "bundle.json", "result.json"
#: More than any bundle needs: against a damaged manifest, and a full memory.
LIMIT_BYTES = 64 << 20
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)


def main(words: Sequence[str]) -> int:
    """The program; returns its exit code."""
    folder = Path(words[0]) if words else Path(__file__).resolve().parents[2]
    result = Path(words[1]) if len(words) > 1 else folder / RESULT
    try:
        count = run(folder, result)
    except HwmpqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{count} cells in {result}. Take it in with: hwmpq store import {result.name}")
    return 0


def run(folder: Path, result: Path) -> int:
    """Time what the result does not hold yet; returns how many cells it then holds.

    Raises InputError for a damaged bundle, or a result of another bundle or machine; DeviceError
    when timing cannot go on.
    """
    manifest, name = open_bundle(folder)
    found = _begun(result, manifest, name)
    cells = {item["key"]: _cell(folder, item) for item in manifest["cells"]}
    protocol = Protocol.from_json(manifest["protocol"])
    with WorkerProcess(threads=protocol.threads) as worker:
        for number, block in enumerate(manifest["blocks"]):
            waiting = [cells[key] for key in block if key not in found["timings"]]
            if not waiting:
                continue
            for timing in time_block(waiting, protocol, worker):
                found["timings"][timing.key] = timing.to_json()
            _write(result, found)
            print(f"block {number + 1} of {len(manifest['blocks'])}", flush=True)
    return len(found["timings"])


def open_bundle(folder: Path) -> tuple[dict[str, Any], str]:
    """The manifest and its SHA-256, after every file was found to be the one that was packed.

    Raises UnsafeFile for a name or a link that leads elsewhere, InputError for anything else.
    """
    data = read_limited(folder / MANIFEST)
    manifest = parse(data, folder / MANIFEST)
    if manifest.get("hwmpq_bundle") != VERSION:
        raise InputError(f"bundle {folder}", manifest.get("hwmpq_bundle"), f"version {VERSION}")
    for name, (nbytes, sha256) in manifest["files"].items():
        path = _inside(folder, name)
        if not path.is_file() or path.stat().st_size != nbytes:
            raise InputError(f"file of bundle {folder}", name, f"a file of {nbytes} bytes")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise InputError(f"damaged file of bundle {folder}", name, next="Copy it again.")
    return manifest, hashlib.sha256(data).hexdigest()


def read_limited(path: Path) -> bytes:
    """The content of a regular file. Raises UnsafeFile for a link, InputError when too long."""
    if path.is_symlink():
        raise UnsafeFile("a link where a file belongs", path)
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise InputError("unreadable file", f"{path} ({error.strerror})") from None
    if len(data) > LIMIT_BYTES:
        raise InputError("file too long", path, f"{LIMIT_BYTES} bytes")
    return data


def parse(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object in which every number is finite. Raises InputError."""

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is not a finite number")

    try:
        value = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {path}", str(error)) from None
    if not isinstance(value, dict):
        raise InputError(f"not a JSON object: {path}", type(value).__name__)
    return value


def _begun(result: Path, manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The result so far. Raises InputError for one of another bundle or machine."""
    fresh = {
        "hwmpq_result": VERSION, "bundle": name, "conditions": conditions(),
        "manifest": dict(manifest), "timings": {}, **_machine(manifest),
    }  # fmt: skip
    if not result.exists():
        return fresh
    found = parse(read_limited(result), result)
    for what in ("hwmpq_result", "bundle", "fingerprint"):
        if found.get(what) != fresh[what]:
            raise InputError(
                f"{result} has another {what}", found.get(what), fresh[what],
                "Name another result file.",
            )  # fmt: skip
    return found


def _machine(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What times: the GPU where the kernels are a GPU's. Raises DeviceError where there is none."""
    if any(item["cell"].get("launches") for item in manifest["cells"]):
        return {"fingerprint": cuda.fingerprint(), "hardware": cuda.hardware()}
    return {"fingerprint": fingerprint(), "hardware": hardware()}


def _cell(folder: Path, item: Mapping[str, Any]) -> Cell:
    """The cell with the paths that its files have here."""
    cell = Cell.from_json(item["cell"])
    names: dict[str, Any] = {
        field: str(_inside(folder, getattr(cell, field)))
        for field in ("library", "launches", "args", "expected", "loop")
        if getattr(cell, field)
    }
    return replace(cell, **names)


def _inside(folder: Path, name: str) -> Path:
    """A path in the folder, not through a link. Raises UnsafeFile."""
    path = folder / name
    if not _NAME.fullmatch(name) or path.resolve() != folder.resolve() / name:
        raise UnsafeFile("a name that leads out of the bundle", repr(name))
    return path


def _write(path: Path, value: Mapping[str, Any]) -> None:
    aside = path.with_name(f"{path.name}.part")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
