"""What a worker does for a parent on another machine: it takes files and says where it runs.

The files lie in a private folder that the start-up code of `remote` made. It goes when the worker
ends; one whose worker was killed goes when the next one starts.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq import targets
from hwmpq.errors import InputError
from hwmpq.measure import cuda, gates
from hwmpq.measure.environment import conditions, fingerprint, hardware

#: Name of the setting that holds the folder; the folder's name begins so, then comes the process.
FOLDER, PREFIX = "HWMPQ_WORKER_FOLDER", "hwmpq-worker-"
#: One folder deep at most, nothing that begins with a dot.
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def describe(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Who the machine is; busy: somebody times there."""
    return {
        "fingerprint": fingerprint(),
        "hardware": hardware(),
        "conditions": conditions(),
        "features": sorted(targets.host_features()),
        "gpu": cuda.identity(),
        "busy": gates.is_locked(),
    }


def empty(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Remove what was put here before; answers {"folder"}."""
    folder = _files()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return {"folder": str(folder)}


def put(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Append "data" (base64) to the file "name"; with "sha256" it is whole, and must have it.

    Raises InputError for a name that leads elsewhere, or another hash: then the file is gone.
    """
    name = str(payload["name"])
    if not _NAME.fullmatch(name):
        raise InputError("name of a file for the device", repr(name), "letters, digits, - _ .")
    path = _files() / name
    part = path.with_name(f".{path.name}.part")
    part.parent.mkdir(mode=0o700, exist_ok=True)
    with part.open("ab") as file:
        file.write(base64.b64decode(payload["data"], validate=True))
    wanted = payload.get("sha256")
    if wanted is not None:
        got = hashlib.sha256(part.read_bytes()).hexdigest()
        if got != wanted:
            part.unlink()
            raise InputError(f"hash of {name} as it arrived", got, wanted)
        part.replace(path)
    return {}


def outputs(payload: Mapping[str, Any]) -> dict[str, Any]:
    """First output of the "artifact" that was put here for each of the "images", a .npy file that
    was put here: {"outputs"}, base64 of such a file."""
    images = np.load(_files() / str(payload["images"]), allow_pickle=False)
    packed = io.BytesIO()
    np.save(packed, _artifact(str(payload["artifact"])).run_samples(images), allow_pickle=False)
    return {"outputs": base64.b64encode(packed.getvalue()).decode()}


def replay(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The golden samples of the "artifact" that was put here: the fields of `Replay`."""
    from hwmpq import artifact

    return asdict(artifact.replay(_artifact(str(payload["artifact"]))))


@functools.lru_cache(1)
def _artifact(name: str) -> Any:
    from hwmpq import artifact

    return artifact.load(_files() / name)


def leave() -> None:
    """Remove our folder, if there is one."""
    if FOLDER in os.environ:
        shutil.rmtree(os.environ[FOLDER], ignore_errors=True)


def sweep() -> None:
    """Remove the folders of our user's workers that are no more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        number = re.fullmatch(rf"{PREFIX}(\d+)-\w+", folder.name)
        if number and folder.lstat().st_uid == os.getuid():
            try:
                os.kill(int(number[1]), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)


def _files() -> Path:
    if FOLDER not in os.environ:
        raise InputError("files for a worker that shares ours", None, "a worker on another machine")
    return Path(os.environ[FOLDER]) / "files"
