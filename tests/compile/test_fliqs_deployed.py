"""What a one-shot search leaves behind, compiled: the artifact computes what was trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import hwmpq
from hwmpq import side_jobs
from hwmpq.errors import InputError
from hwmpq.frontend.model import load_model
from hwmpq.pipeline import Options
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers

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


def test_a_search_needs_a_target_that_a_reward_can_take() -> None:
    for change in ({"max_bops": None}, {"latency": "fastest"}, {"max_drop": 1.0}):
        with pytest.raises(InputError, match="budget of a search by fliqs"):
            side_jobs.search_by_training(replace(GIVEN, **change))  # type: ignore[arg-type]
