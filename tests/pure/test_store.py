"""The store in SQLite and in PostgreSQL: generations, concurrency, sudden death, lost and full
disks and servers, moving rows, migrations, passwords."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import hwmpq.cli
from hwmpq.errors import InputError, StoreError, UnknownName
from hwmpq.measure import address, engine, environment, schema
from hwmpq.measure.address import Address
from hwmpq.measure.store import Store
from hwmpq.types import Measurement, Workload

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = Measurement(
    key="k0",
    workload=Workload.make("linear", "bias+relu", m=1, k=64, n=10),
    format="w8a8",
    kernel="gemm",
    threads=1,
    samples_s=(1.25e-6, 1.5e-6, 1 / 3e6),
    quality={"steal": 0.0, "rounds": [0, 1, 2]},
)

WRITER = """
import sys
from hwmpq.measure.store import Store
from hwmpq.types import Measurement, Workload
store = Store.open(sys.argv[1])
work = Workload.make("linear", m=1, k=2, n=3)
for i in range(int(sys.argv[3])):
    store.put(Measurement(f"{sys.argv[2]}{i}", work, "fp32", "k", 1, (1e-6 * (i + 1),)))
    store.put(Measurement("shared", work, "fp32", "k", 1, error=f"{sys.argv[2]}{i}"))
    store.put_fact("stage", f"{sys.argv[2]}{i}", {"blob": "x" * 3000, "i": i})
    print(i, flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store.sqlite"


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, path: Path) -> Iterator[str]:
    """Address of a new store."""
    if request.param == "sqlite":
        yield str(path)
        return
    server = request.getfixturevalue("postgres")
    url = server.database()
    yield url
    server.drop(url)


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    with Store.open(place) as opened:
        yield opened


def writer(place: str, name: str, rows: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, place, name, str(rows)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def execute(place: str, *statements: str) -> list[tuple[object, ...]]:
    """Run SQL past the store; the rows of the last statement."""
    plain = sa.create_engine(Address.of(place).url)
    with plain.begin() as connection:
        results = [connection.exec_driver_sql(text) for text in statements]
        rows = [tuple(row) for row in results[-1]] if results[-1].returns_rows else []
    plain.dispose()
    return rows


@contextlib.contextmanager
def holding(place: str) -> Iterator[None]:
    """Somebody else writes."""
    other = engine.connect(Address.of(place))
    with other.begin():
        yield
    other.dispose()


def generations(place: str, table: str = "measurements") -> int:
    ((count,),) = execute(place, f"select count(*) from {table}")
    assert isinstance(count, int)
    return count


def test_round_trip(store: Store) -> None:
    store.put(SAMPLE, target="x86-avx2", fingerprint="f", toolchain={"tvm": "0.27"})
    assert store.measurement("k0") == SAMPLE
    assert store.measurement("other") is None
    (row,) = store.rows()
    assert (row.target, row.fingerprint, row.toolchain) == ("x86-avx2", "f", {"tvm": "0.27"})
    assert (row.origin, row.generation) == ("local", 1) and row.created > 1.7e9


def test_filters(store: Store) -> None:
    store.put(SAMPLE, target="a")
    store.put(replace(SAMPLE, key="k1", source="imported"), target="a")
    store.put(replace(SAMPLE, key="k2", samples_s=(), error="crashed: SIGSEGV"), target="b")
    assert [m.key for m in store.measurements()] == ["k0", "k1", "k2"]
    assert [m.key for m in store.measurements(target="a")] == ["k0", "k1"]
    assert [m.key for m in store.measurements(source="imported")] == ["k1"]
    assert store.measurements(target="c") == []


def test_same_content_is_idempotent_and_other_content_a_generation(
    store: Store, place: str
) -> None:
    for _ in range(3):
        store.put(SAMPLE)
    assert generations(place) == 1
    newer = replace(SAMPLE, samples_s=(2e-6,))
    store.put(newer)
    assert generations(place) == 2
    assert store.measurement("k0") == newer
    assert store.measurements() == [newer]
    store.put(SAMPLE)  # an earlier content again is news
    assert store.measurement("k0") == SAMPLE and generations(place) == 3


def test_facts(store: Store, place: str) -> None:
    value = {"loss": [0.0, 1.5], "name": "ü", "none": None}
    store.put_fact("sensitivity", "a", value)
    store.put_fact("sensitivity", "a", value)
    assert store.fact("sensitivity", "a") == value
    assert store.fact("sensitivity", "b") is None and store.fact("calibration", "a") is None
    store.put_fact("calibration", "a", b"\x00\xff")
    assert store.fact("calibration", "a") == b"\x00\xff"
    store.put_fact("sensitivity", "nan", [math.nan, 1.0])
    assert math.isnan(store.fact("sensitivity", "nan")[0])
    assert generations(place, "facts") == 3


def test_fresh_reads_only_its_own_and_deletes_nothing(store: Store, place: str) -> None:
    store.put(SAMPLE)
    store.put_fact("s", "k", 1)
    newer = replace(SAMPLE, samples_s=(9e-6,))
    with Store.open(place, fresh=True) as fresh:
        assert fresh.measurement("k0") is None and fresh.measurements() == []
        assert fresh.fact("s", "k") is None
        fresh.put(newer)
        fresh.put_fact("s", "k", 2)
        assert fresh.measurement("k0") == newer and fresh.measurements() == [newer]
        assert fresh.fact("s", "k") == 2
    assert store.measurement("k0") == newer
    assert generations(place) == 2


def test_a_clock_set_back_does_not_hide_the_newer_row(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(SAMPLE)
    monkeypatch.setattr("hwmpq.measure.store.time.time", lambda: 5.0)
    newer = replace(SAMPLE, samples_s=(9e-6,))
    store.put(newer)
    assert store.measurement("k0") == newer


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


def test_two_writers_at_once(store: Store, place: str) -> None:
    workers = [writer(place, name, 25) for name in "ab"]
    for worker in workers:
        worker.communicate(timeout=120)
        assert worker.returncode == 0
    keys = {m.key for m in store.measurements()}
    assert keys == {f"{name}{i}" for name in "ab" for i in range(25)} | {"shared"}
    assert generations(place) == 100  # 50 rows of their own, 50 generations of the shared one


def test_every_acknowledged_row_survives_kill_9(place: str) -> None:
    worker = writer(place, "w", 100_000)
    assert worker.stdout is not None
    last = -1
    while last < 5:
        last = int(worker.stdout.readline())
    os.kill(worker.pid, signal.SIGKILL)
    rest, _ = worker.communicate(timeout=60)
    last = max([last, *map(int, rest.split())])  # what was acknowledged before the signal came
    with Store.open(place) as store:
        for i in range(last + 1):
            found = store.measurement(f"w{i}")
            assert found is not None and found.samples_s == (1e-6 * (i + 1),)
            assert store.fact("stage", f"w{i}")["i"] == i
        store.put(SAMPLE)


def test_a_writer_may_wait_for_another(store: Store, place: str) -> None:
    """A long write in one process and a short one in another: both are there."""
    with holding(place):
        late = writer(place, "late", 1)
        with pytest.raises(subprocess.TimeoutExpired):
            late.wait(1.0)
    late.communicate(timeout=60)
    assert late.returncode == 0 and store.measurement("late0") is not None


def test_newer_version_is_refused(store: Store, place: str) -> None:
    store.put(SAMPLE)
    execute(place, "update hwmpq_schema set version = 7")
    with pytest.raises(StoreError, match=r"version 7; allowed: up to version 2\. Upgrade hwmpq"):
        Store.open(place)


AS_VERSION_1 = ("alter table facts drop column origin", "update hwmpq_schema set version = 1")


def test_a_store_of_version_1(store: Store, place: str) -> None:
    store.put(SAMPLE, origin="board")
    store.put_fact("s", "k", [1.5])
    store.put_fact("s", "b", b"\x00")
    execute(place, *AS_VERSION_1)
    for _ in range(2):  # the second finds nothing to do
        with Store.open(place) as migrated:
            assert migrated.measurement("k0") == SAMPLE and migrated.fact("s", "k") == [1.5]
            assert {o.name: (o.measurements, o.facts) for o in migrated.origins()} == {
                "board": (1, 0), "local": (0, 2),
            }  # fmt: skip
    store.put_fact("s", "k", [2.5], origin="board")
    (backup,) = backups(place)
    assert execute(backup.store, f"select version from {backup.name}hwmpq_schema") == [(1,)]
    assert generations(backup.store, f"{backup.name}measurements") == 1
    assert generations(backup.store, f"{backup.name}facts") == 2


@dataclass(frozen=True)
class Backup:
    """name: what stands before a table's name."""

    store: str
    name: str = ""


def backups(place: str) -> list[Backup]:
    """Before a migration: copies of the file, or schemas of the database."""
    file = Address.of(place).file
    if file is not None:
        return [Backup(str(path)) for path in file.parent.glob("*.backup")]
    names = execute(place, "select nspname from pg_namespace where nspname ~ '^hwmpq.*backup'")
    return [Backup(place, f"{name}.") for (name,) in names]


def test_a_migration_that_fails_changes_nothing(
    store: Store, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(SAMPLE)
    execute(place, *AS_VERSION_1)
    whole = schema.MIGRATIONS[1]

    def broken(connection: sa.Connection) -> None:
        whole(connection)
        raise OSError("No space left on device")

    monkeypatch.setitem(schema.MIGRATIONS, 1, broken)
    with pytest.raises(StoreError, match="Make room"):
        Store.open(place)
    assert execute(place, "select version from hwmpq_schema") == [(1,)]
    monkeypatch.setitem(schema.MIGRATIONS, 1, whole)
    with Store.open(place) as migrated:
        assert migrated.measurement("k0") == SAMPLE
    execute(place, "update hwmpq_schema set version = 0")
    with pytest.raises(StoreError, match=r"cannot be migrated.*from version 1 on"):
        Store.open(place)


def test_a_backup_that_differs_stops_the_migration(
    store: Store, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy loses a row: in SQLite as it is made, in PostgreSQL by a trigger-like statement."""
    store.put(SAMPLE)
    execute(place, *AS_VERSION_1)
    never = lambda connection: pytest.fail("migrated without a backup")  # noqa: E731
    monkeypatch.setitem(schema.MIGRATIONS, 1, never)
    if Address.of(place).file is not None:
        monkeypatch.setattr(schema.sqlite3, "connect", Forgetful)
    else:
        plain = sa.Connection.exec_driver_sql

        def forgetful(self: sa.Connection, text: str) -> object:
            return plain(self, text + (" LIMIT 0" if "AS TABLE" in text else ""))

        monkeypatch.setattr(sa.Connection, "exec_driver_sql", forgetful)
    with pytest.raises(StoreError, match=r"backup .* differs"):
        Store.open(place)
    monkeypatch.undo()
    assert execute(place, "select version from hwmpq_schema") == [(1,)] and not backups(place)


class Forgetful(sqlite3.Connection):
    """Its copies lack the measurements."""

    def backup(self, target: sqlite3.Connection, **options: object) -> None:  # type: ignore[override]
        super().backup(target)
        target.execute("delete from measurements")
        target.commit()


def test_damaged_and_foreign_files(tmp_path: Path, path: Path) -> None:
    text = tmp_path / "text.sqlite"
    text.write_text("not a database at all, but longer than a header would be" * 50)
    with pytest.raises(StoreError, match=r"not a database\. Move the file away"):
        Store.open(text)
    assert text.read_text().startswith("not a database")
    with Store.open(path) as store:
        for i in range(200):
            store.put_fact("s", str(i), "x" * 500)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8192] = os.urandom(8192)
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"damaged|malformed"):
        Store.open(path)
    with pytest.raises(StoreError, match="Check that the file"):
        Store.open(tmp_path)  # a folder


def test_another_programs_database(place: str, path: Path) -> None:
    path.parent.mkdir()
    execute(place, "create table facts (x integer)")
    with pytest.raises(StoreError, match="another program's database"):
        Store.open(place)


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


def test_full_disk(path: Path) -> None:
    with Store.open(path) as store:
        store.put(SAMPLE)

        def no_room(connection: sqlite3.Connection, _: object) -> None:
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count = {pages}")

        sa.event.listen(store._engine, "connect", no_room)
        store._engine.dispose()
        with pytest.raises(StoreError, match=r"disk is full.*Make room"):
            store.put_fact("s", "big", "x" * 1_000_000)
        assert store.fact("s", "big") is None and store.measurement("k0") == SAMPLE
        sa.event.remove(store._engine, "connect", no_room)
        store._engine.dispose()
        store.put_fact("s", "big", "x" * 1_000_000)
        assert len(store.fact("s", "big")) == 1_000_000


def test_a_command_on_a_full_disk_ends_with_7_and_loses_nothing(path: Path, tmp_path: Path) -> None:
    """The system refuses longer files in the middle of an import: all or none of it is there."""
    with Store.open(tmp_path / "large.sqlite") as large:
        for i in range(40):
            large.put_fact("s", str(i), "x" * 50_000)
        large.export_file(tmp_path / "large.jsonl")
    with Store.open(path) as store:
        store.put(SAMPLE)
    code = (
        "import resource, sys, hwmpq.cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "sys.exit(hwmpq.cli.main(sys.argv[1:]))"
    )
    line = ["store", "import", str(tmp_path / "large.jsonl"), "--store", str(path), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *line], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 7, done.stderr
    told = json.loads(done.stdout)["error"]
    assert told["code"] == "store" and str(path) in told["what"] and told["next"]
    with Store.open(path) as store:
        assert store.measurement("k0") == SAMPLE and store.fact("s", "0") is None
        assert store.import_file(tmp_path / "large.jsonl") == 40


def test_a_server_that_goes_away(new_server: Callable[[], Any]) -> None:
    """Stopped in mid-run: a clear error with exit code 7; back again: the same store goes on."""
    server = new_server()
    place = server.database()
    with Store.open(place) as store:
        store.put(SAMPLE)
        server.stop()
        for work in (lambda: store.put_fact("s", "k", 1), store.measurements):
            with pytest.raises(StoreError, match="Check that the file or the server") as caught:
                work()
            assert caught.value.exit_code == 7
        server.start()
        assert store.measurement("k0") == SAMPLE
        server.stop()
        server.start()  # between two writes: the connection of the first one is dead
        store.put_fact("s", "k", 2)
        assert store.fact("s", "k") == 2


def test_locked_store(store: Store, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_BUSY_S", 0.05)
    with holding(place):
        with pytest.raises(StoreError, match=r"(locked|lock timeout).*Another process"):
            Store.open(place)
        assert store.fact("s", "k") is None  # readers are not kept out


def fill(store: Store) -> None:
    store.put(SAMPLE, target="t", fingerprint="f", toolchain={"tvm": "1"}, origin="board")
    store.put(replace(SAMPLE, samples_s=(0.1 + 0.2,)))
    store.put(replace(SAMPLE, key="k1", samples_s=(), error='ü\r\n",\x00\udc80'))
    store.put_fact("s", "blob", bytes(range(256)))
    store.put_fact("s", "empty", b"", origin="board")
    store.put_fact("s", "long", "x" * 200_000)
    store.put_fact("s", "nan", [math.nan])


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_export_and_import_are_lossless(store: Store, tmp_path: Path, suffix: str) -> None:
    fill(store)
    first, second = tmp_path / f"1{suffix}", tmp_path / f"2{suffix}"
    assert store.export_file(first) == 7
    with Store.open(tmp_path / "copy.sqlite") as copy:
        assert copy.import_file(first) == 7
        assert copy.import_file(first) == 0
        copy.export_file(second)
        assert first.read_bytes() == second.read_bytes()
        assert copy.rows() == store.rows() and copy.origins() == store.origins()
        assert copy.measurements()[0].samples_s == (0.1 + 0.2,)
        assert copy.fact("s", "blob") == bytes(range(256)) and copy.fact("s", "empty") == b""
        assert len(copy.fact("s", "long")) == 200_000


def test_merge_is_lossless_and_idempotent(store: Store, tmp_path: Path) -> None:
    fill(store)
    newer = replace(SAMPLE, samples_s=(5e-6,))
    with Store.open(tmp_path / "b.sqlite") as other:
        other.put(newer)
        other.put_fact("s", "nan", [1.0])
        assert store.merge(other) == 2
        assert store.merge(other) == 0
        assert store.merge(store) == 0
        assert store.measurement("k0") == newer and store.fact("s", "nan") == [1.0]
        assert other.merge(store) == 7
        assert other.merge(store) == 0
        assert {r.measurement.key: r for r in other.rows()}.keys() == {"k0", "k1"}
        assert sorted(other.origins(), key=str) == sorted(store.origins(), key=str)
        for name in ("a", "b"):
            (store if name == "a" else other).export_file(tmp_path / f"{name}.jsonl")
        with Store.open(tmp_path / "c.sqlite") as both:
            assert both.import_file(tmp_path / "a.jsonl") == 9
            assert both.import_file(tmp_path / "b.jsonl") == 0


def test_import_does_not_hide_newer_rows(store: Store, place: str, tmp_path: Path) -> None:
    older, newer = SAMPLE, replace(SAMPLE, samples_s=(7e-6,))
    with Store.open(tmp_path / "old.sqlite") as old:
        old.put(older)
        store.put(newer)
        assert store.merge(old) == 1
    assert store.measurement("k0") == newer and generations(place) == 2


def test_imports_are_listed_and_removed_as_one(store: Store) -> None:
    theirs = replace(SAMPLE, samples_s=(3e-6,), source="imported")
    store.put(SAMPLE)
    store.put(theirs, origin="board-7")
    store.put(replace(theirs, key="k9"), origin="board-7")
    store.put_fact("glue", "g", 1.0, origin="board-7")
    store.put_fact("glue", "g", 2.0, origin="board-8")
    assert [(o.name, o.measurements, o.facts) for o in store.origins()] == [
        ("board-7", 2, 1), ("board-8", 0, 1), ("local", 1, 0),
    ]  # fmt: skip
    assert store.measurement("k0") == theirs
    assert store.remove_origin("board-7") == 3
    assert store.measurements() == [SAMPLE] and store.fact("glue", "g") == 2.0
    for name in ("board-7", "local"):
        with pytest.raises(UnknownName, match="board-8"):
            store.remove_origin(name)


def test_the_same_value_made_here_stays_when_an_import_goes(store: Store) -> None:
    store.put(SAMPLE, origin="board-7")
    store.put(SAMPLE)
    store.remove_origin("board-7")
    assert store.measurement("k0") == SAMPLE


def test_dropped_rows_are_in_a_file(store: Store, place: str, tmp_path: Path) -> None:
    fill(store)
    items = store.replaced() + store.failed()
    assert [(name, row["key"], row["generation"]) for name, row in items] == [
        ("measurements", "k0", 1), ("measurements", "k1", 1),
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"NAME\.jsonl"):
        store.drop(items, tmp_path / "x.txt")
    with pytest.raises(StoreError, match="No such file"):
        store.drop(items, tmp_path / "missing" / "x.jsonl")
    assert generations(place) == 3
    store.drop(items, tmp_path / "x.jsonl")
    assert generations(place) == 1 and not store.replaced() and not store.failed()
    assert store.import_file(tmp_path / "x.jsonl") == 2 and generations(place) == 3


HEAD = '{"hwmpq_store": 1}\n'


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.jsonl", "", "an empty file"),
        ("x.jsonl", "{}\n", "version 1"),
        ("x.jsonl", "[1]\n", "a file of `store export`"),
        ("x.jsonl", "nonsense\n", "a file of `store export`"),
        ("x.jsonl", '{"hwmpq_store": 9}\n', "version 1 to 2"),
        ("x.jsonl", HEAD + '{"table": "users"}\n', "columns of a table"),
        ("x.csv", "", "hwmpq_store"),
        ("x.csv", "a,b\n1,2\n", "hwmpq_store"),
        ("x.csv", "hwmpq_store,table\n9,facts\n", "version 1 to 2"),
        ("x.csv", "hwmpq_store,table\n2,facts\n", "columns of a table"),
        ("x.parquet", "nonsense", "a Parquet file"),
        ("x.txt", "", r"NAME\.parquet"),
    ],
)
def test_import_refuses(path: Path, tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with Store.open(path) as store, pytest.raises(InputError, match=words):
        store.import_file(tmp_path / name)


def test_import_is_all_or_none(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    with Store.open(tmp_path / "other.sqlite") as other:
        other.put(SAMPLE)
        other.put(replace(SAMPLE, key="k1"))
        other.export_file(file)
    lines = file.read_text().splitlines()
    for old, new, words in [
        ("w8a8", "w4a8", "damaged row"),
        ('"generation": 1', '"generation": 0', "damaged row"),
        ('"generation": 1', '"generation": "1"', "generation"),
    ]:
        file.write_text("\n".join([*lines[:2], lines[2].replace(old, new)]))
        with pytest.raises(InputError, match=words):
            store.import_file(file)
        assert store.measurements() == []
    with pytest.raises(StoreError, match="No such file"):
        store.import_file(tmp_path / "missing.jsonl")


def test_a_file_of_version_1(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    with Store.open(tmp_path / "other.sqlite") as other:
        other.put_fact("s", "k", 1)
        other.export_file(file)
    old = file.read_text().replace('"origin": "local", ', "").replace('store": 2', 'store": 1')
    assert "origin" not in old
    file.write_text(old)
    assert store.import_file(file) == 1 and store.fact("s", "k") == 1


def test_parquet_without_pyarrow(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with Store.open(path) as store, pytest.raises(InputError, match=r"hwmpq\[parquet\]"):
        store.export_file(path.with_suffix(".parquet"))


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    name = environment.fingerprint()
    assert name == environment.fingerprint() and len(name) < 60
    assert environment.l2_bytes() > 0
    assert set(environment.conditions()) >= {"load", "kernel", "date"}
    assert [environment.parse_size(text) for text in ("512K", "1 MiB", "64", "?")] == [
        512 << 10,
        1 << 20,
        64,
        0,
    ]
    facts = environment.hardware()
    monkeypatch.setattr(environment, "hardware", lambda: {**facts, "flags": "other"})
    assert environment.fingerprint() != name
