"""Facts about solutions: prices, conflicts, several devices, alternatives; the HAWQ-V3 oracles."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from hwmpq import search
from hwmpq.errors import InputError
from hwmpq.search.alternatives import explain
from hwmpq.search.conflicts import conflict
from hwmpq.search.devices import Device, solve_devices, together
from hwmpq.search.evaluate import evaluate
from hwmpq.search.prices import prices
from hwmpq.types import FloatArray, Problem, Transition


def numbers(text: str) -> FloatArray:
    return np.array(text.split(), np.float64)


#: ResNet-18 of the released HAWQ-V3 notebook (ILP.ipynb): 19 convolutions, at 4 and at 8 bit.
TRACE = numbers(
    "0.068578 0.031624 0.032986 0.012057 0.022224 0.0059634 0.069318 0.0080713 0.003729 0.005307"
    " 0.0020901 0.0073757 0.0021045 0.001512 0.0015804 0.00078146 0.0045184 0.00098745 0.00072944"
)
ERROR8 = numbers(
    "0.0235 0.0125 0.0102 0.0082 0.0145 0.0344 0.0023 0.0287 0.0148 0.0333 0.0682 0.0027 0.0448"
    " 0.0336 0.0576 0.113 0.0102 0.0947 0.0532"
)
ERROR4 = numbers(
    "6.743 3.9691 3.3281 2.6796 4.7277 10.597 0.6827 9.0942 4.8857 10.76 21.755 0.8603 14.532"
    " 10.965 18.771 36.404 3.1572 29.699 17.402"
)
MIB8 = numbers(
    "0.035156 0.035156 0.035156 0.035156 0.070312 0.14062 0.0078125 0.14062 0.14062 0.28125 0.5625"
    " 0.03125 0.5625 0.5625 1.125 2.25 0.125 2.25 2.25"
)
MACS = numbers(
    "115.61 115.61 115.61 115.61 57.803 115.61 6.4225 115.61 115.61 57.803 115.61 6.4225 115.61"
    " 115.61 57.803 115.61 6.4225 115.61 115.61"
)
MS4 = numbers(
    "0.21094 0.21093 0.21104 0.21087 0.13642 0.19168 0.025322 0.19148 0.19143 0.11395 0.20556"
    " 0.019175 0.20567 0.20567 0.13185 0.22288 0.017901 0.22305 0.22286"
)
MS8 = numbers(
    "0.36189 0.36212 0.31142 0.30454 0.19185 0.38949 0.033417 0.38905 0.38929 0.19135 0.34307"
    " 0.028024 0.34313 0.34311 0.21117 0.37377 0.028968 0.37398 0.37405"
)
#: A strided convolution beside a block's main path takes what that path's end takes.
TIES = (("conv4", "conv6"), ("conv9", "conv11"), ("conv14", "conv16"))
#: (budgeted quantity, its share of the way from all-4-bit to all-8-bit, the released choice).
HAWQ = [
    ("nbytes", 0.25, "1111111111111100000"),
    ("nbytes", 0.5, "1111111111111110100"),
    ("nbytes", 0.75, "1111111111111011110"),
    ("bops", 0.25, "1110101000000000000"),
    ("bops", 0.5, "1110111101110000000"),
    ("bops", 0.75, "1111111101111010110"),
    ("latency_s", 0.25, "1110101000000000000"),
    ("latency_s", 0.5, "1111101101110010100"),
    ("latency_s", 0.75, "1111111101111010110"),
]


def hawq() -> Problem:
    return Problem(
        tuple(f"conv{i}" for i in range(19)), ("4", "8"),
        loss=np.stack([TRACE * ERROR4, TRACE * ERROR8], 1),
        latency_s=np.stack([MS4, MS8], 1), nbytes=np.stack([MIB8 / 2, MIB8], 1),
        bops=np.stack([MACS * 16, MACS * 64], 1), ties=TIES,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "share", "truth"), HAWQ)
@pytest.mark.parametrize("solver", ["ilp", "iqp"])
def test_the_released_hawq_v3_problems(name: str, share: float, truth: str, solver: str) -> None:
    """Budget: `share` of the way from all-4-bit to all-8-bit; for iqp the loss is a diagonal."""
    problem = hawq()
    cells = getattr(problem, name)
    problem = replace(
        problem, budgets={name: float(cells[:, 0].sum() + share * np.ptp(cells, 1).sum())}
    )
    if solver == "iqp":
        assert problem.loss is not None
        problem = replace(problem, pair_loss=np.diag(problem.loss.reshape(-1)), loss=None)
    found = search.solve(problem, solver)
    assert found.status == "optimal"
    assert "".join("01"[fmt == "8"] for fmt in found.choice.values()) == truth


def sample(seed: int, budgets: dict[str, float]) -> Problem:
    rng = np.random.default_rng(seed)
    tables = [np.sort(rng.uniform(0.1, 1.0, (5, 3)), axis=1) for _ in range(3)]
    loss = -tables[0]
    return Problem(
        tuple("abcde"), ("2", "4", "8"), loss, tables[1], tables[2],
        transitions=(Transition("a", "b", 0.1 * (1 - np.eye(3))),), budgets=budgets,
    )  # fmt: skip


def best(problem: Problem) -> float | None:
    return search.solve(problem, "exhaustive").objective


def test_prices_are_differences_of_optima() -> None:
    problem = sample(0, {"latency_s": 2.2, "nbytes": 2.6})
    found = search.solve(problem)
    told = prices(problem, found, share=0.1)
    assert set(told) == {"latency_s", "nbytes"}
    for name, price in told.items():
        budget = problem.budgets[name]
        for sign, value in ((1, price.more), (-1, price.less)):
            moved = {**problem.budgets, name: budget + sign * 0.1 * budget}
            other = best(replace(problem, budgets=moved))
            if other is None:
                assert value is None
            else:
                assert found.objective is not None
                assert value == pytest.approx(sign * (found.objective - other) / price.step)
        assert price.proven and price.more >= 0
    lost = search.solve(replace(problem, budgets={"nbytes": 0.0}))
    with pytest.raises(InputError, match="prices at a solution: got infeasible"):
        prices(problem, lost)


def test_conflicts_name_the_smallest_sets_and_the_way_out() -> None:
    free = sample(1, {})
    assert free.latency_s is not None and free.nbytes is not None
    fast = search.solve(replace(free, minimize="latency_s"))
    assert fast.objective is not None and fast.nbytes is not None
    trade = replace(free, nbytes=2.0 - free.nbytes)  # small is slow
    least = search.solve(replace(trade, minimize="nbytes")).objective
    assert least is not None
    bounds = {"latency_s": fast.objective * 1.02, "nbytes": least * 1.02, "loss": 0.0}
    problem = replace(trade, budgets=bounds)
    told = conflict(problem)
    assert told is not None and told.proven
    assert told.groups == (("latency_s", "nbytes"),)
    for name in ("latency_s", "nbytes"):
        raised = told.relaxed[name]
        assert raised is not None and raised > bounds[name]
        assert best(replace(problem, budgets={**bounds, name: raised})) is not None
        assert best(replace(problem, budgets={**bounds, name: raised * (1 - 1e-6)})) is None
    assert told.relaxed["loss"] is None
    alone = conflict(replace(problem, budgets={"nbytes": 0.5 * least, "loss": 0.0}))
    assert alone is not None and alone.groups == (("nbytes",),)
    assert conflict(replace(problem, budgets={"loss": 0.0})) is None
    shut = replace(free, legal=np.zeros((5, 3), bool))
    assert conflict(shut) is not None


def test_one_choice_for_several_devices_is_the_brute_force_best() -> None:
    rng = np.random.default_rng(2)
    shared = replace(sample(2, {"nbytes": 3.4}), latency_s=None, transitions=())
    devices = {}
    for name in ("phone", "board"):
        moves = (Transition("b", "c", rng.uniform(0, 0.2, (3, 3))),)
        devices[name] = Device(rng.uniform(0.1, 1.0, (5, 3)), 3.0, moves, 0.1)
    found, seconds = solve_devices(shared, devices)
    views = [
        replace(shared, latency_s=d.latency_s, transitions=d.transitions, fixed_latency_s=0.1)
        for d in devices.values()
    ]
    index = np.array(list(itertools.product(range(3), repeat=5)))
    good = evaluate(shared, index).of("nbytes") <= 3.4
    for view in views:
        good &= evaluate(view, index).of("latency_s") <= 3.0
    truth = evaluate(shared, index[good]).of("loss").min()
    assert found.status == "optimal" and found.objective == pytest.approx(float(truth))
    assert set(seconds) == {"phone", "board"} and max(seconds.values()) == found.latency_s <= 3.0
    files = {
        name: replace(view, budgets={"nbytes": 3.4, "latency_s": 3.0})
        for name, view in zip(devices, views, strict=True)
    }
    again, same = together(files)
    assert solve_devices(again, same)[0].choice == found.choice
    with pytest.raises(InputError, match="loss of board: got another one"):
        assert shared.loss is not None
        together({**files, "board": replace(files["board"], loss=shared.loss + 1.0)})
    with pytest.raises(InputError, match="latency budget of board"):
        together({**files, "board": replace(files["board"], budgets={})})
    tight = {name: replace(device, budget_s=0.2) for name, device in devices.items()}
    assert solve_devices(shared, tight)[0].status == "infeasible"
    with pytest.raises(InputError, match="problem of several devices: got 0 devices"):
        solve_devices(shared, {})


@pytest.mark.parametrize("solver", ["ilp", "iqp"])
def test_alternatives_are_exact_with_the_layer_pinned(solver: str) -> None:
    problem = sample(3, {"latency_s": 2.4})
    if solver == "iqp":
        root = np.random.default_rng(3).normal(size=(15, 15))
        problem = replace(problem, pair_loss=root @ root.T)
    found = search.solve(problem, solver)
    told = explain(problem, found, solver)
    assert problem.loss is not None
    for i, (name, row) in enumerate(told.items()):
        assert row.chosen == found.choice[name]
        assert row.formats["4"]["loss"] == problem.loss[i, 1]
        rank = problem.formats.index(row.chosen)  # the loss falls with the bits
        for step, at in ((row.up, rank + 1), (row.down, rank - 1)):
            if not 0 <= at < 3:
                assert step is None
                continue
            assert step is not None and step.fmt == problem.formats[at]
            legal = np.ones((5, 3), bool)
            legal[i] = np.arange(3) == at
            truth = best(replace(problem, legal=legal))
            if truth is None:
                assert step.status == "infeasible" and step.cost is None
            else:
                assert step.objective == pytest.approx(truth, rel=2e-6)
                assert step.cost is not None and step.cost >= -1e-5 * abs(truth)
