"""Cells without a measured time: predicted, or refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_side_jobs import FORMATS, LAYERS

from hwmpq import targets
from hwmpq.errors import InputError
from hwmpq.formats import format_named
from hwmpq.kernels import best
from hwmpq.pipeline import Options
from hwmpq.predict import Predictor, Row, Settings
from hwmpq.predict.analytic import work
from hwmpq.stages import cells, predicted
from hwmpq.stages.choose import make_problem
from hwmpq.stages.job import Silent, open_job
from hwmpq.stages.latency import TIME_IS_UP, LatencyFacts, profile
from hwmpq.stages.menu import make_menu
from hwmpq.stages.pricing import table
from hwmpq.stages.result import layer_rows
from hwmpq.types import Sensitivity, Workload


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of cost models with one of x86-avx2: its rows are twice their static estimate."""
    target = targets.load("x86-avx2")
    shapes = [
        Workload.make("linear", "bias", m=m, k=k, n=n)
        for m in (1, 16) for k in (32, 64) for n in (10, 64, 128)
    ] + [
        Workload.make(
            "conv2d", "bias+relu", n=1, h=s, w=s, cin=c, cout=c, kh=3, kw=3, sh=1, sw=1, pt=1,
            pl=1, pb=1, pr=1, dh=1, dw=1, groups=1,
        )
        for s in (8, 16, 24) for c in (16, 32, 48, 64)
    ]  # fmt: skip
    rows = []
    for workload in shapes:
        for name in FORMATS:
            fmt = format_named(name)
            kernel = best(workload, fmt, target.features)
            assert kernel is not None
            seconds = 2 * float(work(workload, fmt, kernel, target).terms.sum()) / 3e9
            rows.append(Row(workload, name, kernel.name, 1, seconds))
    folder = tmp_path_factory.mktemp("models")
    Predictor.fit(rows, target, settings=Settings(trees=20, depth=3)).save(folder / target.name)
    return folder


@pytest.fixture
def unmeasured(shared_worker: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A job whose --max-time is used up by the glue (made-up times), its menu and facts."""
    made_up = {
        "glue": lambda _, calls: [(call, 1e-6) for call in calls],
        "layers": lambda _, block: pytest.fail("a layer's cell was measured"),
    }
    for name, function in made_up.items():
        monkeypatch.setattr(cells.CellBench, name, function)
    late = Options(
        "test_side_jobs:small", input_shape=(1, 1, 16, 16), target="x86-avx2",
        calib_data="digits#train", formats=tuple(FORMATS), store=str(tmp_path / "late.sqlite"),
        calib=64, max_time=1e-6,
    )  # fmt: skip
    job = open_job(late, Silent())
    with job.store:
        menu = make_menu(job.network, job.target, late.formats)
        yield job, menu, profile(job, menu)


def test_out_of_time(unmeasured: Any, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, menu, facts = unmeasured
    assert 0 < facts.new_timings <= len(facts.glue) and not facts.layers
    assert {*facts.unknown.values()} == {TIME_IS_UP}
    loss = Sensitivity(job.network.names, menu.formats, np.zeros(menu.legal.shape), "x", 1)
    with pytest.raises(InputError, match=r"layers without any usable format.*--max-time is used"):
        make_problem(job, menu, loss, table(job, menu, facts), {})

    known = "conv"
    measured = known_cell(job, facts, known)
    monkeypatch.setattr(predicted, "data_folder", lambda _: models)
    filled = predicted.fill_in(job, menu, measured)
    of = {layer.name: layer.workload for layer in job.network.layers}
    assert filled.cell(of[known], "fp32").latency_s == 0.5  # what was measured wins
    assert filled.cell(of["fc"], "fp32").source == "predicted"
    assert "seen no depthwise" in filled.unknown[of["depthwise"].key, "w8a8"]
    assert not job.store.measurements()
    low, high = predicted.spread(job, dict.fromkeys(of, "fp32"), filled)
    assert low < 0 < high

    filled.layers[of["depthwise"].key, "fp32"] = measured.layers[of[known].key, "fp32"]
    problem = make_problem(job, menu, loss, table(job, menu, filled), {})
    rows = layer_rows(job, menu, filled, problem, dict.fromkeys(LAYERS, "fp32"))
    source = {row.name: row.latency_source for row in rows}
    assert source["conv"] == "measured" and source["fc"] == "predicted"
    assert "seen no depthwise" in rows[1].why_not["w8a8"]


def known_cell(job: Any, facts: LatencyFacts, name: str) -> LatencyFacts:
    """The facts with half a second for a layer in fp32, and one wrong and one late cell."""
    from hwmpq.types import Measurement

    workload = job.network.layer(name).workload
    cell = Measurement("k", workload, "fp32", "kernel", 1, (0.5,))
    unknown = {k: v for k, v in facts.unknown.items() if k != (workload.key, "fp32")}
    unknown[job.network.layer("fc").workload.key, "w8a8"] = "wrong numbers: 3 of 10"
    return replace(facts, layers={(workload.key, "fp32"): cell}, unknown=unknown)


def test_a_wrong_kernel_is_never_predicted(
    unmeasured: Any, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, menu, facts = unmeasured
    monkeypatch.setattr(predicted, "data_folder", lambda _: models)
    filled = predicted.fill_in(job, menu, known_cell(job, facts, "conv"))
    key = job.network.layer("fc").workload.key
    assert filled.unknown[key, "w8a8"] == "wrong numbers: 3 of 10"
    assert (key, "w8a8") not in filled.layers and (key, "fp32") in filled.layers


@pytest.mark.parametrize(
    ("reason", "may"),
    [
        (TIME_IS_UP, True), ("timed out after 60 s in step 'time'", True), ("not timed", True),
        ("wrong numbers: off by 3", False), ("compile: no answer to 'call'", False),
        ("crashed: SIGSEGV in step 'check'", False), ("TVMError: no such function", False),
    ],
)  # fmt: skip
def test_which_failures_are_predicted(reason: str, may: bool) -> None:
    assert predicted.may_predict(reason) is may


def test_a_model_that_does_not_fit(
    unmeasured: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, menu, facts = unmeasured
    monkeypatch.setattr(predicted, "data_folder", lambda _: tmp_path / "none")
    filled = predicted.fill_in(job, menu, facts)
    assert not filled.layers and "there is no cost model" in next(iter(filled.unknown.values()))
    other = tmp_path / "other" / "x86-avx2"
    other.mkdir(parents=True)
    card = (models / "x86-avx2" / "card.toml").read_text()
    (other / "card.toml").write_text(card.replace("codegen = ", "codegen = 99"))
    monkeypatch.setattr(predicted, "data_folder", lambda _: other.parent)
    filled = predicted.fill_in(job, menu, facts)
    assert not filled.layers
    assert "version of the emitted kernels" in next(iter(filled.unknown.values()))
