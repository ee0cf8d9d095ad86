"""The artifact as a folder of files: written whole or not at all, read whole, signed."""

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

from hwmpq.artifact import signature
from hwmpq.artifact.contents import MANIFEST, open_artifact, read
from hwmpq.artifact.manifest import KIND, VERSION, interface
from hwmpq.errors import InputError


def save(
    folder: Path, manifest: Mapping[str, Any], writers: Mapping[str, Callable[[Path], None]]
) -> None:
    """Write an artifact aside, then put it in place by rename.

    manifest: all but version, kind, interface and files. writers: file name -> what writes it.
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
        whole = {"version": VERSION, "kind": KIND, **manifest, "interface": interface(manifest)}
        whole["files"] = files
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact whose every file was checked. Raises InputError."""
    contents = open_artifact(folder, signature.required())
    for name in contents.manifest["files"]:
        contents.file(name)
    return dict(contents.manifest)


def add_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Put what was measured on a whole artifact into its manifest; a signature would not fit then.

    facts: entries of the manifest, in place of those of the same names; a number that is none
    becomes null. Raises InputError, OSError.
    """
    told = json.loads(json.dumps(facts), parse_constant=lambda _: None)
    write_json(folder / f".{MANIFEST}", {**read_manifest(folder), **told})
    os.replace(folder / f".{MANIFEST}", folder / MANIFEST)


def nbytes(folder: Path) -> int:
    """Of all files of an artifact."""
    return sum(path.stat().st_size for path in folder.iterdir())


def sign(folder: Path, key: Path) -> Path:
    """Sign an artifact that is whole; a signature that was there is replaced: its path.

    key: the file of a private key. Raises InputError.
    """
    contents = open_artifact(folder)
    for name in contents.manifest["files"]:
        contents.file(name)
    return signature.sign(folder, read(folder, MANIFEST), key)


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
