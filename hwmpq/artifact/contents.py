"""A folder opened as an artifact: every byte is compared with its hash before it is used.

Bytes are read once and handed on; no file is opened by its name again after it was checked.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwmpq.artifact import manifest as spec
from hwmpq.artifact import signature
from hwmpq.errors import InputError

MANIFEST = "manifest.json"
_MOST_BYTES = {MANIFEST: 2**26, signature.FILE: 64}
_READ_ONLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NOT_OURS = "a folder made by hwmpq quantize or compile"
_AGAIN = "Copy the artifact again; do not run it."


@dataclass(frozen=True)
class Contents:
    """path: the folder; manifest: checked; its files are checked as they are read."""

    path: Path
    manifest: Mapping[str, Any]

    def file(self, name: str) -> bytes:
        """The bytes of a listed file. Raises InputError where it is missing or was changed."""
        raw = read(self.path, name)
        if hashlib.sha256(raw).hexdigest() != self.manifest["files"][name]:
            raise InputError(
                f"file {name!r} of artifact {self.path} was changed", "another SHA-256", None,
                "Copy the artifact again; do not run it.",
            )  # fmt: skip
        return raw


def open_artifact(folder: Path, keys: tuple[Path, ...] = ()) -> Contents:
    """The manifest checked: signature, version, entries, and that just the listed files are there.

    keys: files of public keys, of which each must have signed it. Nothing native is loaded.
    Raises InputError.
    """
    manifest = _manifest(folder, keys)
    version = manifest.get("version")
    if type(version) is not int or version != spec.VERSION:
        raise InputError(
            f"artifact {folder} has an unknown version", version, spec.VERSION,
            "Use the hwmpq that made it, or make it again.",
        )  # fmt: skip
    wrong = spec.wrong(manifest)
    if wrong:
        raise InputError(f"the manifest of {folder} is damaged: no {', '.join(wrong)}", next=_AGAIN)
    if spec.interface(manifest) != manifest["interface"]:
        raise InputError(
            f"inputs, outputs, calls or parameters in the manifest of {folder} were changed",
            "another SHA-256", None, _AGAIN,
        )  # fmt: skip
    _check_names(folder, manifest["files"], spec.libraries(manifest).values())
    return Contents(folder, manifest)


def _manifest(folder: Path, keys: tuple[Path, ...]) -> dict[str, Any]:
    """The manifest of an artifact of any version, parsed once its signature was checked."""
    try:
        raw = read(folder, MANIFEST)
    except InputError as error:
        raise InputError(f"{folder} is no artifact", f"no {MANIFEST}", _NOT_OURS) from error
    for key in keys:
        signature.check(folder, raw, _signature(folder), key)
    try:
        found = spec.parse(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder} is no artifact", error, _NOT_OURS) from error
    if not isinstance(found, dict) or found.get("kind") != spec.KIND:
        raise InputError(f"{folder} is no artifact", f"no kind {spec.KIND!r}", _NOT_OURS)
    return found


def _signature(folder: Path) -> bytes:
    return read(folder, signature.FILE) if signature.FILE in _names(folder) else b""


def _check_names(folder: Path, files: Mapping[str, str], libraries: Iterable[str]) -> None:
    """Raises InputError unless the folder holds just what the manifest lists."""
    parts = [part for name in libraries for part in spec.parts(name).values()]
    for name in (*parts, spec.PARAMETERS):
        if name not in files:
            raise InputError(f"the manifest of {folder} does not list {name}", next=_AGAIN)
    reserved = {MANIFEST, signature.FILE}
    for name in files:
        if name in ("", ".", "..") or name in reserved or set(name) & set("/\\\0"):
            raise InputError(f"file name in the manifest of {folder}", repr(name), "plain names")
    present = _names(folder)
    for name in files:
        if name not in present:
            raise InputError(f"artifact {folder} lacks {name}", next=_AGAIN)
    more = sorted(present - set(files) - reserved)
    if more:
        raise InputError(
            f"artifact {folder} holds a file that its manifest does not list", more[0], None,
            _AGAIN,
        )  # fmt: skip


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise InputError(f"cannot read artifact {folder}", error.strerror) from error


def _open(path: str, _flags: int) -> int:
    return os.open(path, _READ_ONLY)


def read(folder: Path, name: str) -> bytes:
    """A regular file of the folder, whole; a link, a pipe or a device is refused unread."""
    try:
        with open(folder / name, "rb", opener=_open) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise InputError(f"artifact {folder} lacks {name}", "no plain file", None, _AGAIN)
            most = _MOST_BYTES.get(name, about.st_size)
            if about.st_size > most:
                raise InputError(f"size of {name} in {folder}", about.st_size, f"{most} bytes")
            return file.read(about.st_size)
    except OSError as error:
        raise InputError(f"artifact {folder} lacks {name}", error.strerror, None, _AGAIN) from error
