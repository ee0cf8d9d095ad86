"""Stores and exports written by older versions are still read, each row as it was.

A new version of the tables or of the files adds a pair here and keeps the old ones.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import hwmpq.cli
from hwmpq.measure.store import Store
from hwmpq.types import Measurement, Workload

KEPT = Path(__file__).resolve().parents[1] / "golden"
WORK = Workload.make("linear", "bias+relu", m=1, k=64, n=10)
ROWS = {
    "kept": Measurement(
        "kept", WORK, "w8a8", "linear.avx2_maddubs.s8", 1, (1.25e-6, 1.5e-6, 1 / 3e6),
        quality={"rounds": [0, 1, 2]},
    ),
    "failed": Measurement("failed", WORK, "w4a8", "linear.avx2_maddubs.s4", 2,
                          error="wrong numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["store.sqlite", "store.jsonl"])
def test_a_store_of_version_2(name: str, tmp_path: Path) -> None:
    place = tmp_path / "store.sqlite"
    if name.endswith(".sqlite"):
        shutil.copy(KEPT / name, place)
    else:
        assert hwmpq.cli.main(["store", "import", str(KEPT / name), "--store", str(place)]) == 0
    with Store.open(place) as store:
        rows = {row.measurement.key: row for row in store.rows()}
        assert {key: row.measurement for key, row in rows.items()} == ROWS
        assert (rows["kept"].target, rows["kept"].fingerprint) == ("x86-avx2", "machine")
        assert rows["kept"].toolchain == {"tvm": "0.27", "codegen": 5}
        assert store.fact("trace", "digits") == {"loss": [0.5, 1e-9], "names": ["conv1"]}
