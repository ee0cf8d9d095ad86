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
from hwmpq.predict.files import read_rows
from hwmpq.predict.levels import Net, as_text, levels
from hwmpq.predict.rows import Table, folds
from hwmpq.predict.spread import LEVELS, Spread
from hwmpq.predict.transfer import best_way, shots
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
    above = list(predictor.spread.above)
    assert len(above) == len(LEVELS) and above == sorted(above)
    assert predictor.upper([]).shape == (0,)
    with pytest.raises(InputError, match=r"share of an upper time: got 1\.5; allowed: 0\.5 to"):
        predictor.upper(cells, 1.5)


def test_heads_reach_further_where_times_scatter(rows: list[Row]) -> None:
    table = Table.of(rows, AVX2)
    wide = np.array([row.workload.op == "depthwise" for row in rows])
    noise = np.random.default_rng(0).normal(size=len(rows)) * np.where(wide, 0.6, 0.1)
    held = folds(table.group.tolist(), 2, 1) == 0
    spread = Spread.fit(table.x[~held], noise[~held], table.group[~held], 0, 3, 0.9)
    low, high = spread.band(table.x[held]).T
    assert np.mean((low <= noise[held]) & (noise[held] <= high)) > 0.85
    assert np.median((high - low)[wide[held]]) > 1.5 * np.median((high - low)[~wide[held]])


def test_a_prior_is_used_as_far_as_it_helps(rows: list[Row], tmp_path: Path) -> None:
    """The other device is the float half of the rows: other kernels, other speeds. A slower one
    like it is foretold by its speed alone."""
    floats = [row for row in rows if row.format in ("fp32", "bf16")]
    codes = [row for row in rows if row.format not in ("fp32", "bf16")]
    prior = Predictor.fit(floats, AVX2, 0, QUICK)
    found = shots(prior.point, codes, AVX2, (0, 200, 9999), 0, QUICK)
    assert set(found) == {0, 200} and found[0]["chosen"]["way"] == "prior"
    told = found[200]
    assert told["chosen"]["way"] == "alone"
    assert told["alone"]["rmspe_pct"] < 0.8 * told["stacked"]["rmspe_pct"]
    assert told["chosen"]["rmspe_pct"] == told["alone"]["rmspe_pct"]
    slow = [
        replace(r, latency_s=3 * r.latency_s, samples_s=tuple(3 * s for s in r.samples_s))
        for r in floats[:24]
    ]
    assert best_way(prior.point, Table.of(slow, AVX2), 0, QUICK) != "alone"
    assert best_way(prior.point, Table.of(slow[:1], AVX2), 0, QUICK) == "scaled"
    scaled = prior.point.scaled(Table.of(slow, AVX2))
    assert scaled.factors / prior.point.factors == pytest.approx(3.0, rel=0.05)

    few = Predictor.fit(codes[:30], AVX2, 0, QUICK, prior=prior)
    assert few.prior == "x86-avx2" and {"fp32", codes[0].format} <= few.scope.formats
    assert few.spread.booster is prior.spread.booster
    assert all(np.greater_equal(few.spread.above, prior.spread.above))
    few.save(tmp_path)
    assert Predictor.load(tmp_path).prior == "x86-avx2"


def test_sums_of_layers_are_judged_without_their_network(rows: list[Row]) -> None:
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.networks == ("resnet",) and row.workload.op == "conv2d":
            cells.setdefault(row.workload.key, {})[row.format] = row
    layers = tuple(layer for layer in cells.values() if len(layer) == 7)[:9]
    net = Net("chain", "resnet", layers, (0, 0, 0, 1, 1, 2, 2, 3, 3))
    found = levels([net], rows, AVX2, 0, replace(QUICK, trees=40), draws=20)
    l2, l3 = found["L2"]["hwmpq"], found["L3"]["hwmpq"]
    assert (l2["sums"], l3["sums"]) == (4 * 57, 57)  # 7 uniform assignments, 50 mixed ones
    low, high = l2["interval"]["rmspe_pct"]
    assert low <= l2["rmspe_pct"] <= high
    assert l3["rmspe_pct"] < l2["rmspe_pct"]  # errors of layers cancel
    assert l3["rmspe_pct"] < found["L3"]["bytes"]["rmspe_pct"] and l3["tau"] > 0.5
    assert found["L3"]["noise ceiling"]["within_10_pct"] > l3["within_10_pct"]
    assert "L3" in as_text(found) and "noise ceiling" in as_text(found)
    with pytest.raises(InputError, match="measured cells of lost: got layers without any"):
        Net("lost", "", ({},), (0,))


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
