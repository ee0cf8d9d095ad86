"""One-shot search without TVM: the policy against `exhaustive`, and runs of a small network."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fliqs_run import MENU, SETTINGS, data, network, posed, run

from hwmpq.errors import InputError, UnknownName
from hwmpq.methods.fliqs.policy import DRAWS, Policy, gaps, shares
from hwmpq.methods.fliqs.searched import most_probable
from hwmpq.methods.fliqs.settings import Settings, parsed
from hwmpq.methods.fliqs.space import Space, space_of, with_blocks
from hwmpq.quantize.simulate import Simulator
from hwmpq.search import solve
from hwmpq.search.evaluate import evaluate, index_of
from hwmpq.types import Problem, Transition

STEPS = 500
PROGRAM = Path(__file__).with_name("fliqs_run.py")


def toy() -> Problem:
    """Layers of unlike size and need, and a time for one change of format."""
    rng, bits = np.random.default_rng(3), np.array([2.0, 4.0, 8.0])
    need, size = rng.uniform(0.1, 1.0, (5, 1)), rng.uniform(0.5, 2.0, (5, 1))
    change = Transition("l0", "l1", 0.5 * (1 - np.eye(3)))
    return Problem(
        tuple(f"l{i}" for i in range(5)), ("w2a2", "w4a4", "w8a8"), loss=need / bits**1.5,
        latency_s=size * bits, legal=np.ones((5, 3), bool), transitions=(change,),
        budgets={"latency_s": 30.0},
    )  # fmt: skip


def bandit(problem: Problem, settings: Settings) -> tuple[Space, Policy]:
    """The policy after many noisy looks at the losses of what it drew."""
    space = space_of(problem, settings.separate)
    policy, rng = Policy(space.allowed, STEPS, settings), np.random.default_rng(settings.seed)
    for step in range(STEPS):
        drawn = policy.draw(step)
        plans = space.formats(drawn)
        loss = float(evaluate(problem, plans[0]).of("loss")) + 0.02 * rng.standard_normal()
        policy.learn(step, drawn, -loss, gaps(shares(problem, plans)))
    return space, policy


def reward(problem: Problem, plan: np.ndarray) -> float:
    return -float(evaluate(problem, plan).of("loss")) - abs(1 - shares(problem, plan)["latency_s"])


def test_the_policy_finds_what_exhaustive_finds() -> None:
    problem = toy()
    space, policy = bandit(problem, Settings())
    without = bandit(problem, Settings(entropy=0.0))[1]
    assert policy.entropy() < 0.05 < without.entropy(), "the penalty forces a decision"
    plan = space.formats(policy.best())
    oracle = index_of(problem, solve(problem, "exhaustive").choice)
    others = np.indices((3,) * 5).reshape(5, -1).T
    better = sum(reward(problem, other) >= reward(problem, oracle) for other in others)
    assert better <= 5, "the oracle's plan is one of the best by the reward, too"
    assert reward(problem, plan) > reward(problem, oracle) - 0.03
    assert shares(problem, plan)["latency_s"] == pytest.approx(1, abs=0.05)


def test_the_penalty_on_entropy_rises_with_a_cosine() -> None:
    policy = Policy(np.ones((1, 2), bool), 100, Settings(warmup=0.2, entropy=0.5))
    assert [policy.penalty(k) for k in (0, 19, 20)] == [0, 0, 0]
    assert policy.penalty(60) == pytest.approx(0.25) and policy.penalty(100) == 0.5


def test_warming_up_draws_evenly_and_never_what_is_not_allowed() -> None:
    allowed = np.array([[True, False, True], [False, True, False], [True, True, True]])
    policy = Policy(allowed, 1000, Settings(warmup=0.5))
    drawn = np.array([policy.draw(k)[0] for k in range(1000)])
    assert set(drawn[:, 0]) == {0, 2} and set(drawn[:, 1]) == {1}
    assert np.bincount(drawn[:500, 2]).min() > 130
    policy.learn(0, policy.draw(0), 5.0, np.zeros(DRAWS))
    assert policy.entropy() == pytest.approx(1.0) and policy.baseline == 5.0


def test_a_plan_uses_its_budget_up() -> None:
    """One flip of the large layer is likelier, but leaves a fifth of the budget."""
    cells = np.array([[4.0, 8.0], [1.0, 2.0], [1.0, 2.0]])
    problem = Problem(("l", "s", "t"), ("w4a4", "w8a8"), bops=cells, budgets={"bops": 10.1})
    log_p = np.log([[0.1, 0.9]] * 3)
    found = most_probable(problem, log_p, solve)
    assert found.choice == {"l": "w8a8", "s": "w4a4", "t": "w4a4"} and found.bops == 10
    assert found.objective == pytest.approx(-np.log(0.9) - 2 * np.log(0.1))
    whole = most_probable(replace(problem, budgets={"bops": 12.1}), log_p, solve)
    assert set(whole.choice.values()) == {"w8a8"} and whole.status == "optimal"


def test_separate_decisions_need_a_grid() -> None:
    formats = ("w8a8", "w4a8", "w8a4", "w4a4")
    problem = replace(posed(network(), formats, 0.5), ties=(("a", "b"),))
    space = space_of(problem, separate=True)
    assert space.allowed.shape == (4, 2) and space.of_layer.tolist() == [0, 0, 1]
    plan = space.formats(np.array([1, 0, 0, 1]))
    assert [formats[f] for f in plan] == ["w4a8", "w4a8", "w8a4"]
    log_p = space.spread(np.log(np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.7, 0.3]])), 4)
    np.testing.assert_allclose(np.exp(log_p[0]), [0.18, 0.02, 0.72, 0.08])
    assert not log_p[1].any(), "a tie counts once"
    with pytest.raises(InputError, match="every weight encoding with every activation encoding"):
        space_of(posed(network(), MENU, 0.5), separate=True)


def test_blocks_decide_together() -> None:
    blocks = with_blocks(posed(network(), MENU, 0.5), network())
    assert space_of(blocks, False).of_layer.tolist() == [0, 1, 2]
    graph = network()
    a, b, *rest = graph.nodes
    second = replace(b, name="b2", inputs=("b", "a"))
    longer = replace(
        graph, nodes=(a, replace(b, inputs=("a",), attrs={**b.attrs, "residual": False}), second,
                      *(replace(n, inputs=("b2",)) if n.name == "pooled" else n for n in rest)),
        tensors={**graph.tensors, "b2": graph.tensors["b"]},
    )  # fmt: skip
    tied = with_blocks(posed(longer, MENU, 0.5), longer)
    assert tied.ties == (("b", "b2"),)


def test_the_settings_words() -> None:
    found = parsed(["steps=7", "separate=true", "rate=1e-3", "decide=block"], seed=3)
    assert (found.steps, found.separate, found.rate, found.seed) == (7, True, 1e-3, 3)
    with pytest.raises(UnknownName, match=r"setting of --train.*Nearest: steps"):
        parsed(["stepz=7"], 0)
    for word, text in (
        ("separate=1", "true or false"), ("steps=x", "int"), ("warmup=1", "below 1"),
        ("decide=net", "layer, block"), ("clip=0", "above 0"), ("cost=-1", "0 or more"),
        ("steps=0", "1 or more"), ("batch=0", "1 or more"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=text):
            parsed([word], 0)


def test_a_search_without_a_target_is_refused(tmp_path: Path) -> None:
    from hwmpq.methods.fliqs.train import search

    graph, problem = network(), replace(posed(network(), MENU, 0.5), budgets={})
    with pytest.raises(InputError, match="one-shot search without a target"):
        search(graph, problem, None, data(graph), SETTINGS, tmp_path)  # type: ignore[arg-type]


def test_a_menu_with_two_bits_learns(tmp_path: Path) -> None:
    """It does not diverge; the plan is within its budget; what was trained is what is simulated."""
    settings = replace(SETTINGS, steps=150, policy_rate=0.1)
    found = run(tmp_path, settings)
    loss = [row["loss"] for row in found.rows]
    assert np.mean(loss[-20:]) < 0.7 * np.mean(loss[20:40])
    plan = found.within(found.problem, solve).choice
    assert shares(found.problem, index_of(found.problem, plan))["bops"] <= 1
    images = data(network())
    x = torch.from_numpy(images.batch(range(len(images))))
    numbers, trained = found.shared.quantizers(plan), found.shared.simulator(plan)(x)[0]
    torch.testing.assert_close(Simulator(network(), plan, numbers, "fast")(x)[0], trained)
    exact = Simulator(network(), plan, numbers)(x)[0]
    assert (exact.argmax(1) == trained.argmax(1)).float().mean() > 0.9
    rows = list(csv.DictReader((tmp_path / "scalars.csv").read_text().splitlines()))
    assert len(rows) == 150 and float(rows[-1]["bops / target"]) > 0
    policy = json.loads((tmp_path / "policy.json").read_text())
    assert policy["rows"] == ["a", "b", "fc"] and policy["steps"][-1] == 150
    assert "entropy" in (tmp_path / "plots.html").read_text()


def test_stopped_and_resumed_is_never_stopped(tmp_path: Path) -> None:
    """Bit by bit. All that a run leaves is in its files, so an exception stands for a kill."""

    def stop(done: int, _of: int) -> None:
        if done == 27:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", note=stop)
    steps: list[int] = []
    resumed = run(tmp_path / "stopped", note=lambda done, _: steps.append(done))
    whole = run(tmp_path / "whole")
    assert steps[0] == 21 and resumed.rows == whole.rows
    np.testing.assert_array_equal(resumed.policy.probabilities(), whole.policy.probabilities())
    for name, value in whole.shared.parameters.items():
        assert torch.equal(resumed.shared.parameters[name], value), name
    with pytest.raises(InputError, match=r"checkpoint .* of another run"):
        run(tmp_path / "whole", replace(SETTINGS, rate=1e-3))


def test_two_processes_have_one_policy(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(tmp_path)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **group, "RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    told = [json.loads(text.splitlines()[-1]) for text in printed]
    assert told[0] == told[1]
    assert np.ptp(told[0]) > 0.1, "it has learned something"
    alone = run(tmp_path / "alone").rows
    rows = csv.DictReader((tmp_path / "scalars.csv").read_text().splitlines())
    together = [float(row["loss"]) for row in rows]
    assert together[0] == pytest.approx(alone[0]["loss"], rel=1e-4), "the same batch, divided"
