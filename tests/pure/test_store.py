"""The store: generations, concurrency, sudden death, damage, full disk, export and import."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from hwmpq.errors import InputError, StoreError
from hwmpq.measure import environment, schema
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


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store.open(path) as opened:
        yield opened


def writer(path: Path, name: str, rows: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(rows)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def generations(path: Path, table: str = "measurements") -> int:
    with sqlite3.connect(path) as connection:
        count: int = connection.execute(f"select count(*) from {table}").fetchone()[0]
    connection.close()
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
    store: Store, path: Path
) -> None:
    for _ in range(3):
        store.put(SAMPLE)
    assert generations(path) == 1
    newer = replace(SAMPLE, samples_s=(2e-6,))
    store.put(newer)
    assert generations(path) == 2
    assert store.measurement("k0") == newer
    assert store.measurements() == [newer]
    store.put(SAMPLE)  # an earlier content again is news
    assert store.measurement("k0") == SAMPLE and generations(path) == 3


def test_facts(store: Store, path: Path) -> None:
    value = {"loss": [0.0, 1.5], "name": "ü", "none": None}
    store.put_fact("sensitivity", "a", value)
    store.put_fact("sensitivity", "a", value)
    assert store.fact("sensitivity", "a") == value
    assert store.fact("sensitivity", "b") is None and store.fact("calibration", "a") is None
    store.put_fact("calibration", "a", b"\x00\xff")
    assert store.fact("calibration", "a") == b"\x00\xff"
    store.put_fact("sensitivity", "nan", [math.nan, 1.0])
    assert math.isnan(store.fact("sensitivity", "nan")[0])
    assert generations(path, "facts") == 3


def test_fresh_reads_only_its_own_and_deletes_nothing(store: Store, path: Path) -> None:
    store.put(SAMPLE)
    store.put_fact("s", "k", 1)
    newer = replace(SAMPLE, samples_s=(9e-6,))
    with Store.open(path, fresh=True) as fresh:
        assert fresh.measurement("k0") is None and fresh.measurements() == []
        assert fresh.fact("s", "k") is None
        fresh.put(newer)
        fresh.put_fact("s", "k", 2)
        assert fresh.measurement("k0") == newer and fresh.measurements() == [newer]
        assert fresh.fact("s", "k") == 2
    assert store.measurement("k0") == newer
    assert generations(path) == 2


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


def test_two_writers_at_once(store: Store, path: Path) -> None:
    workers = [writer(path, name, 25) for name in "ab"]
    for worker in workers:
        worker.communicate(timeout=120)
        assert worker.returncode == 0
    keys = {m.key for m in store.measurements()}
    assert keys == {f"{name}{i}" for name in "ab" for i in range(25)} | {"shared"}
    assert generations(path) == 100  # 50 rows of their own, 50 generations of the shared one


@pytest.mark.parametrize("acknowledged", [1, 7])
def test_every_acknowledged_row_survives_kill_9(path: Path, acknowledged: int) -> None:
    worker = writer(path, "w", 100_000)
    assert worker.stdout is not None
    last = -1
    while last < acknowledged:
        last = int(worker.stdout.readline())
    os.kill(worker.pid, signal.SIGKILL)
    rest, _ = worker.communicate(timeout=60)
    last = max([last, *map(int, rest.split())])  # what was acknowledged before the signal came
    with Store.open(path) as store:
        for i in range(last + 1):
            found = store.measurement(f"w{i}")
            assert found is not None and found.samples_s == (1e-6 * (i + 1),)
            assert store.fact("stage", f"w{i}")["i"] == i
        store.put(SAMPLE)


def test_newer_version_is_refused(store: Store, path: Path) -> None:
    store.put(SAMPLE)
    with sqlite3.connect(path) as connection:
        connection.execute("update hwmpq_schema set version = 7")
    connection.close()
    with pytest.raises(StoreError, match=r"version 7; allowed: up to version 1\. Upgrade hwmpq"):
        Store.open(path)


def test_migration_backs_up_first(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(SAMPLE)
    with sqlite3.connect(path) as connection:
        connection.execute("alter table measurements rename column kernel to kern")
        connection.execute("update hwmpq_schema set version = 0")
    connection.close()
    with pytest.raises(StoreError, match="cannot be migrated"):
        Store.open(path)

    def broken(connection: sa.Connection) -> None:
        connection.exec_driver_sql("alter table measurements rename column kern to kernel")
        raise OSError("No space left on device")

    monkeypatch.setitem(schema.MIGRATIONS, 0, broken)
    with pytest.raises(StoreError, match="Make room"):
        Store.open(path)

    def rename(connection: sa.Connection) -> None:
        connection.exec_driver_sql("alter table measurements rename column kern to kernel")

    monkeypatch.setitem(schema.MIGRATIONS, 0, rename)
    with Store.open(path) as migrated:
        assert migrated.measurement("k0") == SAMPLE
    backups = list(path.parent.glob("store.sqlite.v0.*.backup"))
    assert backups and generations(backups[0]) == 1
    with sqlite3.connect(backups[0]) as connection:
        assert connection.execute("select version from hwmpq_schema").fetchall() == [(0,)]
        assert connection.execute("select kern from measurements").fetchall() == [("gemm",)]
    connection.close()


def test_failed_backup_stops_the_migration(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("update hwmpq_schema set version = 0")
    connection.close()

    def fail(path: Path, version: int) -> Path:
        raise StoreError("backup", "disk full")

    def never(connection: sa.Connection) -> None:
        raise AssertionError("migrated without a backup")

    monkeypatch.setattr(schema, "back_up", fail)
    monkeypatch.setitem(schema.MIGRATIONS, 0, never)
    with pytest.raises(StoreError, match="disk full"):
        Store.open(path)


def test_damaged_and_foreign_files(store: Store, path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.sqlite"
    text.write_text("not a database at all, but longer than a header would be" * 50)
    with pytest.raises(StoreError, match=r"not a database\. Move the file away"):
        Store.open(text)
    assert text.read_text().startswith("not a database")
    for i in range(200):
        store.put_fact("s", str(i), "x" * 500)
    store.close()
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8192] = os.urandom(8192)
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"damaged|malformed"):
        Store.open(path)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("create table facts (x)")
    connection.close()
    with pytest.raises(StoreError, match="another program's database"):
        Store.open(other)
    with pytest.raises(StoreError, match="Check that the file"):
        Store.open(tmp_path)  # a folder


def test_a_password_is_not_shown() -> None:
    with pytest.raises(StoreError) as caught:
        Store.open("nosuchdatabase://me:secret@host/db")
    assert "secret" not in str(caught.value)


def test_full_disk(store: Store, path: Path) -> None:
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


def test_locked_store(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_BUSY_S", 0.05)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(StoreError, match=r"locked.*Another process"):
            Store.open(path)
        assert store.fact("s", "k") is None  # readers are not kept out
    finally:
        holder.close()


def test_export_and_import_are_lossless(store: Store, tmp_path: Path) -> None:
    store.put(SAMPLE, target="t", fingerprint="f", toolchain={"tvm": "1"}, origin="board")
    store.put(replace(SAMPLE, samples_s=(0.1 + 0.2,)))
    store.put(replace(SAMPLE, key="k1", samples_s=(), error="ü\n"))
    store.put_fact("s", "blob", bytes(range(256)))
    store.put_fact("s", "nan", [math.nan])
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    assert store.export_jsonl(first) == 5
    with Store.open(tmp_path / "copy.sqlite") as copy:
        assert copy.import_jsonl(first) == 5
        assert copy.import_jsonl(first) == 0
        copy.export_jsonl(second)
        assert first.read_text() == second.read_text()
        assert copy.rows() == store.rows()
        assert copy.fact("s", "blob") == bytes(range(256))


def test_import_does_not_hide_newer_rows(store: Store, tmp_path: Path) -> None:
    older, newer = SAMPLE, replace(SAMPLE, samples_s=(7e-6,))
    store.put(older)
    store.export_jsonl(tmp_path / "old.jsonl")
    with Store.open(tmp_path / "other.sqlite") as other:
        other.put(newer)
        assert other.import_jsonl(tmp_path / "old.jsonl") == 1
        assert other.measurement("k0") == newer
        assert generations(tmp_path / "other.sqlite") == 2


def test_import_refuses(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    for text, words in [
        ("", "an empty file"),
        ("{}\n", "version 1"),
        ("nonsense\n", "one JSON object per line"),
        ('{"hwmpq_store": 1}\n{"table": "users"}\n', "columns of a table"),
    ]:
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            store.import_jsonl(file)
    store.put(SAMPLE)
    store.put(replace(SAMPLE, key="k1"))
    store.export_jsonl(file)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], lines[2].replace("w8a8", "w4a8")]))
    with Store.open(tmp_path / "empty.sqlite") as empty:
        with pytest.raises(InputError, match="damaged row"):
            empty.import_jsonl(file)
        assert empty.measurements() == []  # all or none
    with pytest.raises(StoreError, match="No such file"):
        store.import_jsonl(tmp_path / "missing.jsonl")


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
