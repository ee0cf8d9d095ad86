"""The store in SQLite and in PostgreSQL: generations, concurrency, sudden death, lost and full
disks and servers, migrations."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from stores import SAMPLE, execute, generations

from hwmpq.errors import StoreError
from hwmpq.measure import engine, environment, schema
from hwmpq.measure.address import Address
from hwmpq.measure.store import Store

ROOT = Path(__file__).resolve().parents[2]

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


def writer(place: str, name: str, rows: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, place, name, str(rows)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


@contextlib.contextmanager
def holding(place: str) -> Iterator[None]:
    """Somebody else writes."""
    other = engine.connect(Address.of(place))
    with other.begin():
        yield
    other.dispose()


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
        assert fresh.fact("s", "k") is None and fresh.keys("s") == set()
        fresh.put(newer)
        fresh.put_fact("s", "k", 2)
        assert fresh.keys("s") == {"k"} and fresh.keys("t") == set()
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
