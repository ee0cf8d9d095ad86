"""A folder takes the place of another: at once, and wholly or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_artifact import full

from hwmpq.artifact import folder as artifact_folder
from hwmpq.artifact.folder import replace_folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Folders `new` and `place`, each with a file that holds its name."""
    for name in ("new", "place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    return tmp_path / "new", tmp_path / "place"


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where C library or file system cannot exchange two names."""
    monkeypatch.setattr(artifact_folder, "_exchange", lambda *_: False)


@pytest.mark.parametrize("able", [True, False])
def test_a_folder_is_replaced(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    new, place = two
    if not able:
        no_exchange(monkeypatch)
    replace_folder(new, place)
    assert (place / "name").read_text() == "new"
    assert [p.name for p in place.parent.iterdir() if p.is_dir()] == ["place"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux'")
def test_a_replaced_folder_is_never_away(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    new, place = two
    monkeypatch.setattr(os, "replace", lambda *_: full(place))  # one step, or none
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before the old one goes
    replace_folder(new, place)
    assert (place / "name").read_text() == "new" and (new / "name").read_text() == "place"


@pytest.mark.parametrize(("code", "seen"), [(errno.EINVAL, False), (errno.ENOSPC, None)])
def test_a_file_system_that_cannot_exchange(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, code: int, seen: bool | None
) -> None:
    library = SimpleNamespace(renameat2=lambda *_: ctypes.set_errno(code) or -1)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    if seen is None:
        with pytest.raises(OSError, match="No space left"):
            replace_folder(*two)
        assert (two[1] / "name").read_text() == "place"
    else:
        assert artifact_folder._exchange(*two) is seen


def test_a_failed_rename_puts_the_old_folder_back(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, place = two
    no_exchange(monkeypatch)
    rename = os.replace

    def second_fails(source: Path, target: Path) -> None:
        if Path(source) == new:
            full(new)
        rename(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="No space left"):
        replace_folder(new, place)
    assert (place / "name").read_text() == "place"
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["new", "place"]
