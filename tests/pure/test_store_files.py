"""Rows that leave a store and come in: exports, imports, merges, dropped rows."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from stores import SAMPLE, generations

from hwmpq.errors import InputError, StoreError, UnknownName
from hwmpq.measure.store import Store


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
        ("x.jsonl", "[1]\n", "a file of `hwmpq store export`"),
        ("x.jsonl", "nonsense\n", "a file of `hwmpq store export`"),
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
