"""The folder of results: built in a workshop beside it, replaced as a whole and only if ours."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hwmpq.errors import InputError


@contextmanager
def workshop(out: Path) -> Iterator[Path]:
    """A folder beside `out` to build in, so that the result is put in place by rename.

    Those of killed runs, which hold their lock no more, are removed. Raises InputError.
    """
    import fcntl

    prefix = f".{out.name}.work."
    try:
        for left in out.parent.glob(f"{prefix}*/lock"):
            with left.open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # another run is at work
                shutil.rmtree(left.parent, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        held = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(
            f"cannot write beside {out}", error.strerror or error, None,
            "Free some space or choose another --out.",
        ) from error  # fmt: skip
    try:
        with held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_place(out: Path) -> None:
    """Raises InputError for a folder that may not be replaced, or made."""
    if out.exists() and not is_ours(out):
        raise InputError(
            "the output folder holds something else", out,
            "a new folder or one that hwmpq made", "Choose another --out.",
        )  # fmt: skip
    check_above(out)


def check_above(out: Path) -> None:
    """Raises InputError where nothing can be made beside `out`."""
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(
            f"cannot write beside {out}", above, "a folder that can be written",
            "Choose another --out.",
        )  # fmt: skip


def is_ours(folder: Path) -> bool:
    """An empty folder, or one that a run wrote and to which nobody added anything."""
    if not folder.is_dir():
        return False
    names = {p.name for p in folder.iterdir() if not p.name.startswith("report.")}
    if not names:
        return not any(folder.iterdir())
    return names <= {"artifact", "result.json", "rows.json"} and "status" in _read(folder)


def was_met(folder: Path) -> bool:
    return _read(folder).get("status") == "met"


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
