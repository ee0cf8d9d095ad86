"""The solver of pair losses: it agrees with the exhaustive oracle, and its bound is a bound."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from hwmpq import search
from hwmpq.errors import UnknownName
from hwmpq.search import iqp
from hwmpq.search.decisions import merge
from hwmpq.search.evaluate import evaluate, index_of, within
from hwmpq.search.instances import pairs
from hwmpq.search.local import Quadratic, multi_start
from hwmpq.search.pairs import mended, merged
from hwmpq.search.relaxation import convexify
from hwmpq.search.transport import flat_plane, plane_at
from hwmpq.types import FloatArray, Problem, Transition

KINDS = ("dense", "low rank", "indefinite", "zero")
BUDGETS = ((), ("latency_s",), ("loss", "nbytes"), ("latency_s", "nbytes", "bops"))


def pair_matrix(rng: np.random.Generator, size: int, kind: str) -> FloatArray:
    root = rng.normal(size=(size, size))
    if kind == "dense":
        return np.asarray(root @ root.T)
    if kind == "low rank":
        return np.asarray(root[:, :2] @ root[:, :2].T)
    return np.asarray(root + root.T if kind == "indefinite" else np.zeros((size, size)))


def sample(
    rng: np.random.Generator, kind: str, budgets: tuple[str, ...], moves: bool, ties: bool,
    slack: float = 0.4, count: int = 6, width: int = 3,
) -> Problem:  # fmt: skip
    """A random problem whose budgets lie `slack` of the way from the least to the greatest sum."""
    shape = (count, width)
    tables = {
        name: rng.uniform(0.1, 1.0, shape) for name in ("loss", "latency_s", "nbytes", "bops")
    }
    legal = rng.random(shape) > 0.15
    legal[:, 0] = True
    transitions = tuple(
        Transition(f"layer{a}", f"layer{b}", rng.uniform(0.0, 0.3, (width, width)))
        for a, b in [*itertools.pairwise(range(count)), (0, count - 1)]
        if moves
    )
    limits = {
        name: float(tables[name].min(1).sum() + slack * np.ptp(tables[name], axis=1).sum())
        for name in budgets
    }
    return Problem(
        tuple(f"layer{i}" for i in range(count)), tuple(f"f{i}" for i in range(width)),
        **tables, legal=legal, pair_loss=pair_matrix(rng, count * width, kind),
        transitions=transitions, ties=(("layer0", "layer3"), ("layer3", "layer4")) if ties else (),
        budgets=limits,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budgets", BUDGETS, ids="+".join)
@pytest.mark.parametrize("moves", [False, True], ids=["plain", "moves"])
@pytest.mark.parametrize("ties", [False, True], ids=["free", "tied"])
def test_iqp_equals_the_oracle(
    kind: str, budgets: tuple[str, ...], moves: bool, ties: bool
) -> None:
    rng = np.random.default_rng([KINDS.index(kind), BUDGETS.index(budgets), moves, ties])
    for slack in (0.15, 0.5):
        problem = sample(rng, kind, budgets, moves, ties, slack)
        truth = search.solve(problem, "exhaustive")
        found = search.solve(problem, "iqp", 30.0)
        assert found.status == truth.status
        if truth.objective is None:
            assert set(found.least) == set(problem.budgets)
            continue
        assert found.objective == pytest.approx(truth.objective, rel=2e-6, abs=1e-9)
        assert found.bound is not None and found.bound <= truth.objective + 1e-9
        assert found.raw_objective == pytest.approx(found.objective, rel=1e-9, abs=1e-12)
        index = index_of(problem, found.choice)
        assert within(problem, evaluate(problem, index))
        assert problem.legal is not None and problem.legal[np.arange(6), index].all()
        assert all(len({found.choice[name] for name in group}) == 1 for group in problem.ties)


def test_forbidden_transitions_are_never_taken() -> None:
    rng = np.random.default_rng(1)
    for _ in range(4):
        problem = sample(rng, "dense", ("latency_s",), True, False, 0.7)
        holes = tuple(
            replace(move, latency_s=np.where(rng.random((3, 3)) < 0.3, np.inf, move.latency_s))
            for move in problem.transitions
        )
        problem = replace(problem, transitions=holes)
        truth, found = search.solve(problem, "exhaustive"), search.solve(problem, "iqp")
        assert found.status == truth.status
        assert (found.objective is None) == (truth.objective is None)
        if truth.objective is not None:
            assert found.objective == pytest.approx(truth.objective, rel=2e-6)


def test_without_pairs_iqp_is_ilp() -> None:
    problem = sample(np.random.default_rng(2), "dense", ("nbytes",), True, True)
    for other in (replace(problem, pair_loss=None), replace(problem, minimize="bops")):
        assert search.solve(other, "iqp").choice == search.solve(other, "ilp").choice


def test_without_a_budget_on_a_convex_toy_the_highest_precision_is_chosen() -> None:
    """The sanity rule: errors that shrink with the bits and never help each other."""
    size = np.tile([1.0, 0.1, 0.01], 6)
    overlap = 0.3 + 0.7 * np.eye(18)
    problem = Problem(tuple("abcdef"), ("2", "4", "8"), pair_loss=np.outer(size, size) * overlap)
    assert set(search.solve(problem, "iqp").choice.values()) == {"8"}


@pytest.mark.parametrize("policy", ["clip", "shift", "none"])
def test_policies_bound_their_own_objective(policy: str) -> None:
    problem = sample(np.random.default_rng(3), "indefinite", ("nbytes",), False, False)
    assert problem.pair_loss is not None
    found = iqp.solve(problem, 30.0, 0, policy)  # type: ignore[arg-type]
    repaired = mended(problem.pair_loss, policy)  # type: ignore[arg-type]
    least = search.solve(replace(problem, pair_loss=repaired), "exhaustive")
    raw = search.solve(problem, "exhaustive")
    assert found.bound is not None and least.objective is not None
    assert found.bound <= least.objective + 1e-9
    assert least.raw_objective is not None and found.raw_objective is not None
    assert found.raw_objective >= (raw.objective or 0.0) - 1e-9
    same = evaluate(replace(problem, pair_loss=repaired), index_of(problem, found.choice))
    assert found.objective == pytest.approx(float(same.of("raw_objective")), rel=1e-9)
    if policy != "clip":  # the same added to every choice
        assert found.raw_objective == pytest.approx(raw.objective, rel=1e-6)
        assert found.status == "optimal"
    with pytest.raises(UnknownName, match="policy for negative eigenvalues"):
        mended(problem.pair_loss, "square")  # type: ignore[arg-type]


def test_the_convex_form_is_exact_at_every_choice_and_convex() -> None:
    rng = np.random.default_rng(4)
    for kind in ("dense", "indefinite"):
        matrix = pair_matrix(rng, 12, kind)
        for d in range(4):  # formats of one layer are never chosen together
            block = matrix[3 * d : 3 * d + 3, 3 * d : 3 * d + 3]
            block *= np.eye(3)
        legal = np.ones((4, 3), bool)
        form = convexify(matrix, legal, np.zeros((0, 12)), np.zeros(0), np.inf)
        assert form is not None
        for index in itertools.product(range(3), repeat=4):
            x = np.zeros(12)
            x[np.arange(4) * 3 + np.array(index)] = 1.0
            assert x @ form.matrix @ x + form.line @ x == pytest.approx(x @ matrix @ x)
        hold = np.kron(np.eye(4), np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        assert np.linalg.eigvalsh(hold.T @ form.matrix @ hold)[0] > -1e-9


def test_planes_lie_below_the_transitions() -> None:
    rng = np.random.default_rng(5)
    decisions = merge(sample(rng, "zero", (), True, False))
    shares = np.where(decisions.legal, rng.random((6, 3)), 0.0)
    shares /= shares.sum(1, keepdims=True)
    first, second = decisions.ends.T
    planes = [flat_plane(decisions), plane_at(decisions, shares)]
    assert (planes[1] * shares).sum() >= (planes[0] * shares).sum() - 1e-12
    for index in itertools.product(*(np.flatnonzero(row) for row in decisions.legal)):
        at = np.array(index)
        cost = decisions.edge_latency_s[np.arange(len(first)), at[first], at[second]].sum()
        for plane in planes:
            assert plane[np.arange(6), at].sum() <= cost + 1e-9


def test_merged_pairs_keep_every_value() -> None:
    rng = np.random.default_rng(6)
    problem = sample(rng, "indefinite", (), False, True)
    decisions = merge(problem)
    assert problem.pair_loss is not None
    quadratic = Quadratic(merged(problem.pair_loss, decisions), 3)
    for _ in range(20):
        index = np.array([rng.choice(np.flatnonzero(row)) for row in decisions.legal])
        raw = evaluate(problem, decisions.expand(index)).of("raw_objective")
        assert quadratic.value(index) == pytest.approx(float(raw))
        for d, f in zip(*np.nonzero(decisions.legal), strict=True):
            other = index.copy()
            other[d] = f
            change = quadratic.value(other) - quadratic.value(index)
            assert quadratic.prices(index)[d, f] == pytest.approx(change, abs=1e-9)


def test_out_of_time_is_said_and_the_gap_is_honest() -> None:
    problem = pairs(30)
    best = search.solve(problem, "iqp", 60.0)
    hasty = search.solve(problem, "iqp", 1e-3)
    assert best.status == "optimal" and best.gap is not None and best.gap <= 1.001e-6
    assert hasty.status == "feasible" and best.objective is not None
    assert hasty.objective is not None and hasty.objective >= best.objective * (1 - 1e-6)
    if hasty.bound is not None:
        assert hasty.bound <= best.objective and hasty.gap is not None and hasty.gap > 0


def test_never_worse_than_the_local_search_and_alike_each_time() -> None:
    problem = pairs(16, seed=3)
    assert problem.pair_loss is not None
    decisions = merge(problem)
    quadratic = Quadratic(merged(problem.pair_loss, decisions), 3)
    start = np.zeros(16, np.intp)
    local = multi_start(problem, decisions, quadratic, [start], 0, np.inf)
    first, second = (search.solve(problem, "iqp", seed=0) for _ in range(2))
    assert local is not None and first.objective is not None
    assert first.objective <= quadratic.value(local) * (1 + 1e-9)
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
