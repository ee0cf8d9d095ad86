"""What a one-shot search leaves behind, compiled: the artifact computes what was trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hwmpq
from hwmpq import side_jobs, targets
from hwmpq.errors import InputError
from hwmpq.frontend.model import load_model
from hwmpq.methods.fliqs_nas.designed import absolute
from hwmpq.methods.fliqs_nas.space import ArchitectureSpace, StageSpace
from hwmpq.pipeline import Options
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers
from hwmpq.stages.budget import parse_latency, parse_sums

GIVEN = Options(
    "zoo:digits_cnn", target="x86-avx2", calib_data="digits#train", data="digits#test", calib=64,
    eval=64, formats=("w8a8", "w4a8", "w2a8"), max_bops="0.03x", method="fliqs",
    train=("steps=25", "batch=16"),
)  # fmt: skip


def test_deployed_is_simulated(tmp_path: Path) -> None:
    options = replace(GIVEN, train_out=str(tmp_path / "run"), store=str(tmp_path / "s.sqlite"))
    found = side_jobs.search_by_training(options)
    assert found["bops"] <= found["budget"]["bops"] and found["steps"] == 25
    assignment, quantizers = found["files"]
    plan = json.loads(Path(assignment).read_text())
    again = side_jobs.search_by_training(options)
    assert again["assignment"] == plan and again["seconds"] < found["seconds"], "it was kept"
    made = replace(options, out=str(tmp_path / "made"))
    side_jobs.compile_model(made, plan, quantizers)
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    graph = load_model(GIVEN.model, None, None).graph()
    simulated = Simulator(graph, plan, Quantizers.load(Path(quantizers)))(x)[0].numpy()
    deployed = hwmpq.load(tmp_path / "made")
    each = np.concatenate([deployed(x[i : i + 1].numpy()) for i in range(len(x))])
    np.testing.assert_array_equal(each, simulated)


class Foreteller:
    """A cost model that goes by operations and weights' bits alone."""

    target = targets.load("x86-avx2")

    def upper(self, cells: list[Any]) -> np.ndarray:
        return np.array([1e-9 * w.macs * (8 + fmt.weight.bits) for w, fmt, _, _ in cells])


def test_a_network_that_was_found_is_a_model_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searched by predicted latency, left as files, compiled: deployed is simulated."""
    stage = StageSpace((3, 5), (2,), (8,), (1,), 2)
    space = ArchitectureSpace((1, 16, 16), (8, 2), (stage,), 16, 10)
    monkeypatch.setattr("hwmpq.methods.fliqs_nas.designed.space_for", lambda *_: space)
    monkeypatch.setattr("hwmpq.methods.fliqs_nas.designed.predictor_of", lambda _: Foreteller())
    options = replace(
        GIVEN, method="fliqs-nas", max_bops=None, latency="0.3x", train_out=str(tmp_path / "run"),
        store=str(tmp_path / "s.sqlite"),
    )  # fmt: skip
    found = side_jobs.search_network(options)
    assert 0 < found["latency_s"] <= found["budget"]["latency_s"]
    monkeypatch.syspath_prepend(tmp_path / "run")
    made = replace(
        options, model="network:build", input_shape=(1, 1, 16, 16), out=str(tmp_path / "made")
    )
    side_jobs.compile_model(made, found["assignment"], found["files"][-1])
    graph = load_model("network:build", None, (1, 1, 16, 16)).graph()
    numbers = Quantizers.load(Path(found["files"][-1]))
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    simulated = Simulator(graph, found["assignment"], numbers)(x)[0].numpy()
    deployed = hwmpq.load(tmp_path / "made")
    each = np.concatenate([deployed(x[i : i + 1].numpy()) for i in range(len(x))])
    np.testing.assert_array_equal(each, simulated)


def test_a_search_needs_a_target_that_a_reward_can_take() -> None:
    for change in ({"max_bops": None}, {"latency": "fastest"}, {"max_drop": 1.0}):
        with pytest.raises(InputError, match="budget of a search by fliqs"):
            side_jobs.search_by_training(replace(GIVEN, **change))  # type: ignore[arg-type]


def test_budgets_of_the_found_network_are_those_of_the_given_one() -> None:
    given = replace(GIVEN, latency="p95:0.5x", max_bops="0.5x", max_size="0.25x")
    budgets = {"latency_s": 2.5e-4, "bops": 123456789.0, "nbytes": 4321.0}
    found = absolute(given, budgets, parse_latency(given.latency))
    limit = parse_latency(found.latency)
    assert limit is not None and limit.statistic == "p95"
    assert limit.seconds == pytest.approx(2.5e-4)
    assert parse_sums(found.max_size, found.max_bops) == pytest.approx(
        {"nbytes": 4321, "bops": 123456789}
    )
