"""Where a store may be: addresses, passwords, network file systems."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import pytest

import hwmpq.cli
from hwmpq.errors import InputError, StoreError
from hwmpq.measure import address
from hwmpq.measure.address import Address
from hwmpq.measure.store import Store


def test_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HWMPQ_STORE", str(tmp_path / "mine.sqlite"))
    Store.open().close()
    assert (tmp_path / "mine.sqlite").exists()
    monkeypatch.delenv("HWMPQ_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    Store.open(None).close()
    assert (tmp_path / "hwmpq" / "store.sqlite").exists()
    Store.open(f"sqlite:///{tmp_path}/url.sqlite").close()
    assert (tmp_path / "url.sqlite").exists()


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("nosuchdatabase://me:secret@host/db", InputError),
        ("postgresql+psycopg://me:secret@host:port/db", InputError),
        ("postgresql://me:sec@ret@host/db", InputError),
        ("postgres://me:sec:ret@host:secret/db", InputError),
        ("postgresql+psycopg://me:secret@/db?host={folder}", StoreError),
        ("postgresql+psycopg://me@/db?host={folder}&password=secret", StoreError),
    ],
)
def test_a_password_is_never_shown(
    url: str, error: type[Exception], tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HWMPQ_DEBUG", "1")
    url = url.replace("{folder}", str(tmp_path))
    with pytest.raises(error) as caught:
        Store.open(url)
    told = "".join(traceback.format_exception(caught.value))
    for as_json in ([], ["--json"]):
        for job in ("ls", "path", "merge"):
            line = ["store", job, *([url, url] if job == "merge" else ["--store", url])]
            hwmpq.cli.main([*line, *as_json])
    told += "".join(capfd.readouterr())
    assert "sec" not in told.replace("second", "")
    if error is StoreError:
        found = Address.of(url)
        assert "secret" not in repr(found) + str(found) and "me" in str(found)


def test_addresses(tmp_path: Path) -> None:
    for text in ("sqlite://", "sqlite:///:memory:"):
        with pytest.raises(InputError, match="kept nowhere"):
            Address.of(text)
    assert Address.of(f"sqlite:///{tmp_path}/a.db").file == tmp_path / "a.db"
    assert Address.of(tmp_path / "a.db").file == tmp_path / "a.db"
    for text in ("postgres://h/d", "postgresql://h/d", "postgresql+psycopg://h/d"):
        assert str(Address.of(text)) == "postgresql+psycopg://h/d"
    with pytest.raises(InputError):
        Address.of("postgresql://h")


def test_without_psycopg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InputError, match=r"needs psycopg.*pip install 'hwmpq\[postgres\]'"):
        Store.open("postgresql+psycopg://h/d")


MOUNTS = """\
1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw
2 1 0:40 / /home rw - nfs4 server:/home rw
3 2 8:2 / /home/me/disk rw - xfs /dev/vdb rw
4 1 0:41 / /mnt/with\\040blank rw - cifs //server/share rw
5 1 0:42 / /ssh rw - fuse.sshfs me@host: rw
6 1 0:43 / /layers rw - fuse.fuse-overlayfs fuse-overlayfs rw
7 1 0:44 / /twice rw - nfs server:/x rw
8 1 8:3 / /twice rw - ext4 /dev/vdc rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/data", None),
        ("/home/me", "nfs4"),
        ("/home/me/disk", None),
        ("/homer", None),
        ("/mnt/with blank/x", "cifs"),
        ("/ssh", "fuse.sshfs"),
        ("/layers", None),
        ("/twice", None),
    ],
)
def test_network_file_systems(
    folder: str, kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    monkeypatch.setattr(address, "_MOUNTS", mounts)
    assert address.network_file_system(Path(folder) / "store.sqlite") == kind


def test_a_store_on_a_network_file_system_is_refused(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"{MOUNTS}9 1 0:45 / {tmp_path} rw - nfs4 server:/y rw\n")
    monkeypatch.setattr(address, "_MOUNTS", mounts)
    with pytest.raises(StoreError, match="nfs4; allowed: a file on a disk of this machine"):
        Store.open(path)
    assert not path.parent.exists()
