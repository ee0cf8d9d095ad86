"""The artifact as a folder of files: written whole or not at all, checked before use."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hwmpq.errors import InputError

VERSION = 1
KIND = "hwmpq-artifact"
MANIFEST = "manifest.json"
#: What `load` uses of a manifest, and the files it reads.
ENTRIES = {
    "target": dict, "inputs": list, "outputs": list, "calls": list, "parameters": list,
    "files": dict,
}  # fmt: skip
NEEDED = ("model.so", "parameters.safetensors")


def save(
    folder: Path, manifest: Mapping[str, Any], writers: Mapping[str, Callable[[Path], None]]
) -> None:
    """Write an artifact aside, then put it in place by rename.

    manifest: all but version, kind and files. writers: file name -> function that writes it.
    Raises InputError when `folder` exists and is not an artifact, or the disk is full; nothing is
    left half-written and an artifact that was there stays.
    """
    if folder.exists() and not is_ours(folder):
        raise InputError(
            "the output folder holds something else", folder, "a new folder or an artifact",
            "Choose another --out.",
        )  # fmt: skip
    aside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        files = {}
        for name, write in writers.items():
            write(aside / name)
            files[name] = sha256(aside / name)
        whole = {"version": VERSION, "kind": KIND, **manifest, "files": files}
        write_json(aside / MANIFEST, whole)
        aside.chmod(0o755)
        replace_folder(aside, folder)
    except OSError as error:
        raise InputError(
            f"cannot write the artifact {folder}", error.strerror or error, None,
            "Free some space or choose another --out.",
        ) from error  # fmt: skip
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)


def is_ours(folder: Path) -> bool:
    """True for an artifact (of any version) or an empty folder."""
    if folder.is_dir() and not any(folder.iterdir()):
        return True
    try:
        return json.loads((folder / MANIFEST).read_text()).get("kind") == KIND  # type: ignore[no-any-return]
    except (OSError, ValueError, AttributeError):
        return False


def replace_folder(new: Path, place: Path) -> None:
    """Rename `new` to `place`; what was there is deleted last.

    Where the system can exchange two names there is no moment without the one folder or the other.
    Elsewhere the old one is moved away first, and back where the second rename fails.
    """
    if not place.exists():
        os.replace(new, place)
        return
    if _exchange(new, place):
        shutil.rmtree(new, ignore_errors=True)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{place.name}.old.", dir=place.parent))
    os.replace(place, old / "it")
    try:
        os.replace(new, place)
    except OSError:
        os.replace(old / "it", place)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where C library or file system cannot.

    Raises OSError. Source: renameat2(2); AT_FDCWD is -100, RENAME_EXCHANGE is 2.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(other))


def write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path, check: bool = True) -> dict[str, Any]:
    """The manifest, with every listed file present and unchanged.

    Raises InputError for a missing or newer artifact, a changed or missing file, or a file name
    that leaves the folder. Nothing native is loaded.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{folder} is no artifact", error, "a folder made by hwmpq quantize or compile"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise InputError(f"{folder} is no artifact", f"no kind {KIND!r} in {MANIFEST}")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"artifact {folder} has an unknown version", manifest.get("version"), VERSION,
            "Use the hwmpq that made it, or make it again.",
        )  # fmt: skip
    lacking = [key for key in ENTRIES if not isinstance(manifest.get(key), ENTRIES[key])]
    if lacking:
        raise InputError(f"the manifest of {folder} is damaged: no {', '.join(lacking)}")
    if check:
        _check_files(folder, manifest["files"])
    return manifest


def _check_files(folder: Path, files: Mapping[str, str]) -> None:
    for name in NEEDED:
        if name not in files:
            raise InputError(f"the manifest of {folder} does not list a file", name)
    for name, expected in files.items():
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise InputError(f"file name in the manifest of {folder}", repr(name), "plain names")
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise InputError(f"artifact {folder} lacks a file", name)
        if sha256(path) != expected:
            raise InputError(
                f"file {name!r} of artifact {folder} was changed", "another SHA-256", None,
                "Copy the artifact again; do not run it.",
            )  # fmt: skip
