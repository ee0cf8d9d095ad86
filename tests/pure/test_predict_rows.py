"""The cost model on the rows that are shipped with x86-avx2: real times, and their noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hwmpq import targets
from hwmpq.errors import InputError
from hwmpq.formats import format_named
from hwmpq.predict import Predictor, Row, Settings, evaluate
from hwmpq.predict.boost import Point
from hwmpq.predict.files import read_rows
from hwmpq.predict.model import LEVELS
from hwmpq.predict.rows import Table, folds
from hwmpq.predict.transfer import shots
from hwmpq.report.parity import write_parity

AVX2 = targets.load("x86-avx2")
QUICK = Settings(trees=80, depth=4, rate=0.15, folds=3, forest=6)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(read_rows(targets.data_folder("cost_models") / "x86-avx2" / "rows.jsonl"))


def test_an_upper_time_holds_new_shapes_as_often_as_it_says(rows: list[Row]) -> None:
    table = Table.of(rows, AVX2)
    held = folds(table.group.tolist(), 2, 1) == 0
    known = [row for row, out in zip(rows, held, strict=True) if not out]
    asked = [row for row, out in zip(rows, held, strict=True) if out]
    predictor = Predictor.fit(known, AVX2, 0, QUICK)
    cells = [(r.workload, format_named(r.format), r.kernel, r.threads) for r in asked]
    y = np.array([r.latency_s for r in asked])
    below = {q: np.mean(y <= predictor.upper(cells, q)) for q in (0.5, 0.8, 0.95)}
    # 52 shapes on each side: twice the standard error of a share is 11 points
    assert below[0.8] == pytest.approx(0.8, abs=0.11)
    assert below[0.5] < below[0.8] < below[0.95]
    assert len(predictor.above) == len(LEVELS) and list(predictor.above) == sorted(predictor.above)
    assert predictor.upper([]).shape == (0,)
    with pytest.raises(InputError, match=r"share of an upper time: got 1\.5; allowed: 0\.5 to"):
        predictor.upper(cells, 1.5)


def test_more_rows_correct_a_prior(rows: list[Row], tmp_path: Path) -> None:
    """The other device is the float half of the rows: other kernels, other speeds."""
    floats = [row for row in rows if row.format in ("fp32", "bf16")]
    codes = [row for row in rows if row.format not in ("fp32", "bf16")]
    prior = Predictor.fit(floats, AVX2, 0, QUICK)
    found = shots(prior.point, codes, AVX2, (0, 10, 200, 9999), 0, QUICK)
    assert set(found) == {0, 10, 200} and set(found[0]) == {"prior"}
    off = {k: found[k]["prior"]["rmspe_pct"] for k in found}
    assert off[0] > off[10] > off[200]
    again = Point.fit(Table.of(codes, AVX2), 0, QUICK, prior.point)
    assert prior.point.booster.num_boosted_rounds() == QUICK.trees
    assert again.booster.num_boosted_rounds() > QUICK.trees

    few = Predictor.fit(codes[:30], AVX2, 0, QUICK, prior=prior)
    assert few.prior == "x86-avx2" and {"fp32", codes[0].format} <= few.scope.formats
    assert few.known[0] <= prior.known[0] and few.known[1] >= prior.known[1]
    few.save(tmp_path)
    assert Predictor.load(tmp_path).prior == "x86-avx2"


def test_ceiling_time_split_seeds_and_plot(rows: list[Row], tmp_path: Path) -> None:
    some = [row for row in rows if row.format in ("fp32", "w8a8", "w4a8")]
    once = [replace(row, again_s=()) for row in some if len(row.samples_s) >= 8][:90]
    first = evaluate(once, AVX2, 0, QUICK, splits=("S4",), draws=20)
    assert first["splits"] == {} and first["noise_ceiling"]["cells"] == 90  # halves of the samples
    twice = [
        Row(r.workload, r.format, r.kernel, r.threads, r.latency_s, r.weight, ("a", "b")[i % 2 :],
            r.samples_s, (1.08 * r.latency_s,) if i % 3 == 0 else ())
        for i, r in enumerate(some)
    ]  # fmt: skip
    found = evaluate(twice, AVX2, 0, QUICK, splits=("S1", "S4"), draws=20, seeds=2)
    assert found["noise_ceiling"]["within_10_pct"] == 100.0
    assert found["noise_ceiling"]["within_5_pct"] == 0.0
    assert found["splits"]["S4"]["hwmpq"]["rows"] == found["noise_ceiling"]["cells"]
    ours = found["splits"]["S1"]["hwmpq"]
    assert ours["spread"]["rmspe_pct"] > 0
    assert ours["rmspe_pct"] < found["splits"]["S1"]["nn-meter"]["rmspe_pct"]
    strata = found["strata"]
    near = [v["within_10_pct"] for v in strata.values() if v["rows"] >= 20]
    assert strata[found["worst"]]["within_10_pct"] == min(near)
    write_parity(found["points"], "held out", tmp_path / "parity.html")
    page = (tmp_path / "parity.html").read_text()
    assert "w4a8" in page and '<script src="http' not in page
    with pytest.raises(InputError, match="points of the parity plot"):
        write_parity([], "", tmp_path / "none.html")
