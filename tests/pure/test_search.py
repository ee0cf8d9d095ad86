"""The solvers: ilp agrees with the exhaustive oracle, and keeps every promise it makes."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from hwmpq import search
from hwmpq.errors import InputError, UnknownName
from hwmpq.search.decisions import merge
from hwmpq.search.elimination import order_of, relax
from hwmpq.search.evaluate import evaluate, index_of, within
from hwmpq.search.instances import chain
from hwmpq.search.pareto import frontier
from hwmpq.search.random import samples
from hwmpq.types import Problem, Solution, Transition

TABLES = ("loss", "latency_s", "nbytes", "bops")
BUDGETS = ((), ("latency_s",), ("loss",), ("latency_s", "nbytes"), ("loss", "nbytes", "bops"))


def layers(count: int) -> tuple[str, ...]:
    return tuple(f"layer{i}" for i in range(count))


def formats(count: int) -> tuple[str, ...]:
    return tuple(f"f{i}" for i in range(count))


def sample(
    rng: np.random.Generator,
    budgets: tuple[str, ...] = ("latency_s",),
    transitions: bool = True,
    ties: bool = False,
    illegal: bool = False,
    slack: float = 0.4,
    count: int = 6,
    width: int = 3,
) -> Problem:
    """A random problem whose budgets lie `slack` of the way from the least to the greatest sum."""
    shape = (count, width)
    loss = rng.normal(0.0, 1.0, shape) * 10.0 ** rng.integers(-3, 2, (count, 1))
    latency, nbytes = rng.uniform(1e-6, 1e-3, shape), rng.integers(1, 10**6, shape).astype(float)
    moves = []
    if transitions:
        for a, b in [*itertools.pairwise(range(count)), (0, count - 1), (2, 0)]:
            cost = rng.uniform(0.0, 3e-4, (width, width)) * (1 - np.eye(width))
            moves.append(Transition(f"layer{a}", f"layer{b}", cost))
    legal = None
    if illegal:
        legal = rng.random(shape) > 0.3
        legal[:, 0] = True
        loss[1, 2] = np.nan
    problem = Problem(
        layers(count),
        formats(width),
        loss,
        latency,
        nbytes,
        rng.uniform(1e6, 1e9, shape),
        legal,
        transitions=tuple(moves),
        fixed_latency_s=1e-4 if transitions else 0.0,
        ties=(("layer0", "layer3"), ("layer3", "layer4")) if ties else (),
    )
    limits = {}
    for name in budgets:
        cells = np.nan_to_num(getattr(problem, name))
        low, high = cells.min(1).sum(), cells.max(1).sum()
        limits[name] = float(low + slack * (high - low))
    return replace(problem, budgets=limits)


def certify(problem: Problem, found: Solution) -> None:
    """Legality, ties, budgets, sums and bound, all from the problem itself."""
    index = index_of(problem, found.choice)
    row = np.arange(len(index))
    if problem.legal is not None:
        assert problem.legal[row, index].all()
    for name in TABLES:
        cells = getattr(problem, name)
        assert cells is None or np.isfinite(cells[row, index]).all()
    for group in problem.ties:
        assert len({found.choice[name] for name in group}) == 1
    values = evaluate(problem, index)
    for name, budget in problem.budgets.items():
        assert float(values.of(name)) <= budget + 1e-12 * abs(budget)
    assert found.objective == float(values.of(problem.minimize))
    assert found.latency_s == values.latency_s and found.nbytes == values.nbytes
    if found.bound is not None:
        assert found.bound <= found.objective
        assert found.gap == (found.objective - found.bound) / max(abs(found.objective), 1e-12)


def agree(problem: Problem, **options: float) -> Solution:
    """ilp and the oracle give the same status and objective. Returns ilp's answer."""
    truth = search.solve(problem, "exhaustive")
    found = search.solve(problem, "ilp", **options)  # type: ignore[arg-type]
    assert found.status == truth.status
    if truth.objective is None:
        assert found.choice == {}
        assert dict(found.least) == pytest.approx(dict(truth.least), rel=1e-9, abs=1e-15)
        return found
    certify(problem, truth)
    certify(problem, found)
    assert found.objective == pytest.approx(truth.objective, rel=1e-9, abs=1e-15)
    assert found.gap is not None and found.gap <= 1e-6
    return found


@pytest.mark.parametrize("minimize", TABLES)
@pytest.mark.parametrize("budgets", BUDGETS, ids="+".join)
@pytest.mark.parametrize("transitions", [False, True], ids=["plain", "moves"])
@pytest.mark.parametrize("ties", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize("illegal", [False, True], ids=["all", "some"])
def test_ilp_equals_the_oracle(
    minimize: str, budgets: tuple[str, ...], transitions: bool, ties: bool, illegal: bool
) -> None:
    key = [TABLES.index(minimize), BUDGETS.index(budgets), transitions, ties, illegal]
    rng = np.random.default_rng([int(k) for k in key])
    for slack in (0.05, 0.45):
        problem = sample(rng, budgets, transitions, ties, illegal, slack)
        agree(replace(problem, minimize=minimize))


@pytest.mark.parametrize("loss_scale", [1e-7, 1.0, 1e3])
@pytest.mark.parametrize("time_scale", [1e-6, 1e3])
def test_scales_do_not_matter(loss_scale: float, time_scale: float) -> None:
    problem = sample(np.random.default_rng(1), slack=0.35)
    assert problem.loss is not None and problem.latency_s is not None
    moves = tuple(replace(t, latency_s=t.latency_s * time_scale) for t in problem.transitions)
    agree(
        replace(
            problem,
            loss=problem.loss * loss_scale,
            latency_s=problem.latency_s * time_scale,
            transitions=moves,
            fixed_latency_s=0.0,
            budgets={"latency_s": problem.budgets["latency_s"] * time_scale},
        )
    )


def test_losses_of_ten_orders_in_one_problem() -> None:
    rng = np.random.default_rng(2)
    for _ in range(5):
        problem = sample(rng, slack=0.4)
        assert problem.loss is not None
        scale = 10.0 ** np.array([[-7], [-5], [-3], [0], [2], [3]])
        agree(replace(problem, loss=np.abs(rng.normal(size=(6, 3))) * scale))


def test_a_budget_that_is_exactly_the_sum_of_a_choice_is_met() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        problem = sample(rng, transitions=False)
        index = rng.integers(0, 3, 6)
        values = evaluate(problem, index)
        limits = {name: float(values.of(name)) for name in ("latency_s", "nbytes")}
        agree(replace(problem, budgets=limits))
        agree(replace(problem, budgets={"latency_s": limits["latency_s"] * (1 - 1e-11)}))


def test_budget_at_the_least_sum() -> None:
    rng = np.random.default_rng(4)
    for name in ("latency_s", "nbytes", "loss"):
        problem = sample(rng, budgets=())
        least = search.solve(replace(problem, minimize=name)).objective
        assert least is not None
        goal = "bops" if name == "loss" else "loss"
        agree(replace(problem, minimize=goal, budgets={name: least}))
        below = least - 1e-6 * abs(least)
        assert agree(replace(problem, budgets={name: below})).status == "infeasible"


def test_one_byte_over_is_over() -> None:
    """Integer bytes around 1e8, where one byte is within a solver's usual tolerance."""
    rng = np.random.default_rng(5)
    for _ in range(5):
        nbytes = 1e7 + rng.integers(0, 40, (8, 3)).astype(float)
        loss = -(nbytes - 1e7) + rng.uniform(0, 0.1, (8, 3))
        low = nbytes.min(1).sum()
        problem = Problem(layers(8), formats(3), loss, nbytes=nbytes)
        agree(replace(problem, budgets={"nbytes": float(low + 57)}))


@pytest.mark.parametrize(("count", "width"), [(1, 1), (1, 4), (6, 1)])
def test_degenerate_shapes(count: int, width: int) -> None:
    rng = np.random.default_rng(6)
    cells = [rng.uniform(0, 1, (count, width)) for _ in range(2)]
    problem = Problem(layers(count), formats(width), *cells)
    agree(problem)
    agree(replace(problem, budgets={"latency_s": float(cells[1].min(1).sum() * 1.01)}))
    assert agree(replace(problem, budgets={"latency_s": 0.0})).status == "infeasible"


def test_all_layers_tied_and_ties_that_leave_nothing() -> None:
    problem = replace(sample(np.random.default_rng(7), slack=0.7), ties=(layers(6),))
    assert len(set(agree(problem).choice.values())) == 1
    legal = np.zeros((6, 3), bool)
    legal[::2, 0] = legal[1::2, 1] = True
    found = search.solve(replace(problem, legal=legal))
    assert found.status == "infeasible" and not found.least


def test_zero_losses_zero_budget_and_equal_cells() -> None:
    zero = np.zeros((4, 3))
    problem = Problem(layers(4), formats(3), zero, zero, budgets={"latency_s": 0.0})
    assert agree(problem).objective == 0.0
    assert agree(replace(problem, latency_s=zero + 0.25, budgets={"latency_s": 1.0})).gap == 0.0
    spread = np.array([[0.1, 1.0], [0.2, 1.0], [-0.3, 1.0]])
    agree(Problem(layers(3), formats(2), spread, budgets={"loss": 0.0}))
    agree(Problem(layers(3), formats(2), spread, budgets={"loss": 1e-15}))


def test_forbidden_transitions_are_never_taken() -> None:
    rng = np.random.default_rng(8)
    for trial in range(6):
        problem = sample(rng, () if trial % 2 else ("latency_s",), slack=0.6)
        moves = []
        for move in problem.transitions:
            hole = np.where(rng.random((3, 3)) < 0.3, np.nan, move.latency_s)
            moves.append(replace(move, latency_s=hole))
        agree(replace(problem, transitions=tuple(moves)))
    shut = (Transition("layer0", "layer1", np.full((3, 3), np.inf)),)
    assert agree(replace(problem, budgets={}, transitions=shut)).status == "infeasible"


def test_infeasible_names_the_least_of_each_budget() -> None:
    problem = sample(np.random.default_rng(9), ("latency_s", "nbytes"), ties=True, slack=-0.1)
    found = agree(problem)
    assert found.status == "infeasible" and set(found.least) == {"latency_s", "nbytes"}


def test_same_seed_same_answer() -> None:
    problem = sample(np.random.default_rng(10), ("latency_s", "nbytes"), count=20, width=4)
    for name in ("ilp", "greedy", "random"):
        first, second = (search.solve(problem, name, seed=3) for _ in range(2))
        assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
    draws = [[tuple(x) for x in samples(problem, 5, seed)] for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("name", ["greedy", "random"])
def test_controls_are_feasible_and_never_better_than_ilp(name: str) -> None:
    rng = np.random.default_rng(11)
    for _ in range(10):
        problem = sample(rng, ("latency_s", "nbytes"), ties=True, illegal=True, slack=0.5)
        best, found = search.solve(problem), search.solve(problem, name)
        assert found.status in ("feasible", "infeasible")
        if found.objective is not None and best.objective is not None:
            certify(problem, found)
            assert found.objective >= best.objective - 1e-9 * abs(best.objective)
    tight = replace(problem, budgets={"nbytes": 0.0})
    assert search.solve(tight, name).status == "infeasible"


def test_samples_are_feasible() -> None:
    problem = sample(np.random.default_rng(12), ("latency_s", "nbytes"), ties=True, slack=0.4)
    drawn = list(samples(problem, 20, 0))
    assert len(drawn) > 10
    assert all(within(problem, evaluate(problem, index)) for index in drawn)


@pytest.mark.parametrize("budgets", [("latency_s",), ("latency_s", "nbytes", "bops")], ids=len)
def test_long_chain_is_solved_to_optimality(budgets: tuple[str, ...]) -> None:
    problem = chain(300, budgets=budgets, tied=True)
    start = time.process_time()
    found = search.solve(problem)
    assert found.status == "optimal" and time.process_time() - start < 5.0
    certify(problem, found)


def test_elimination_is_exact_on_cycles_and_a_bound_beyond() -> None:
    """Least sums through every cell and pair against all choices; K5 leaves edges out."""
    rng = np.random.default_rng(18)
    ring = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (1, 4)]
    for ends, whole in ((ring, True), (list(itertools.combinations(range(5), 2)), False)):
        moves = []
        for a, b in ends:
            cost = np.where(rng.random((3, 3)) < 0.1, np.inf, rng.uniform(0, 1, (3, 3)))
            moves.append(Transition(f"layer{a}", f"layer{b}", cost))
        tables = {name: rng.uniform(0, 1, (5, 3)) for name in ("loss", "latency_s")}
        problem = Problem(layers(5), formats(3), **tables, transitions=tuple(moves))
        decisions = merge(problem)
        order = order_of(decisions)
        assert (len(order.others) == 0) == whole
        found = relax(decisions, order, {"loss": 2.0, "latency_s": 3.0})
        index = np.array(list(itertools.product(range(3), repeat=5)))
        values = evaluate(problem, index)
        cost = 2.0 * values.of("loss") + 3.0 * values.of("latency_s")
        for d, f in np.ndindex(5, 3):
            least = cost[index[:, d] == f].min()
            assert found.through[d, f] <= least + 1e-12
            if whole:
                assert found.through[d, f] == pytest.approx(least)
        for e, (p, c) in enumerate(decisions.ends):
            for f, g in np.ndindex(3, 3):
                least = cost[(index[:, p] == f) & (index[:, c] == g)].min()
                assert found.through_edge[e, f, g] <= least + 1e-12
                if whole:
                    assert found.through_edge[e, f, g] == pytest.approx(least)
        if whole:
            assert found.value == pytest.approx(cost.min())
            assert (index[cost.argmin()] == found.index).all()


def test_out_of_time_is_said() -> None:
    problem = chain(60)
    found = search.solve(problem, time_limit_s=1e-6)
    assert found.status == "feasible" and found.gap is not None and found.gap > 0
    certify(problem, found)
    assert found.bound is not None
    assert found.bound <= (search.solve(problem).objective or 0.0)


def test_pair_loss() -> None:
    rng = np.random.default_rng(13)
    root = rng.normal(size=(12, 12))
    problem = replace(sample(rng, count=4), pair_loss=root @ root.T)
    assert problem.pair_loss is not None
    best = search.solve(problem, "exhaustive")
    assert best.objective == best.raw_objective
    tries = []
    for index in itertools.product(range(3), repeat=4):
        x = np.zeros(12)
        x[np.arange(4) * 3 + index] = 1.0
        if within(problem, evaluate(problem, np.array(index))):
            tries.append(x @ problem.pair_loss @ x)
    assert best.objective == pytest.approx(min(tries), rel=1e-12)
    alone = search.solve(problem, "ilp")
    assert alone.objective == search.solve(replace(problem, pair_loss=None)).objective
    assert alone.raw_objective is not None and alone.raw_objective >= min(tries)
    with pytest.raises(InputError, match=r"loss table alone, and it is absent. Use the solver iqp"):
        search.solve(replace(problem, loss=None), "ilp")


def test_frontier_is_the_brute_force_frontier() -> None:
    rng = np.random.default_rng(14)
    for trial in range(3):
        budgets = ("nbytes",) if trial else ()
        problem = sample(rng, budgets, ties=trial == 2, count=5, slack=0.6)
        found = frontier(problem, points=None)
        index = np.array(list(itertools.product(range(3), repeat=5)))
        if problem.ties:
            index = index[(index[:, 0] == index[:, 3]) & (index[:, 3] == index[:, 4])]
        values = evaluate(problem, index)
        index = index[within(problem, values)]
        values = evaluate(problem, index)
        truth, least = [], np.inf
        for at in np.lexsort((values.of("loss"), values.of("latency_s"))):
            if values.of("loss")[at] < least:
                least = float(values.of("loss")[at])
                truth.append((float(values.of("latency_s")[at]), least))
        assert [(p.latency_s, p.objective) for p in found] == [
            (pytest.approx(x, rel=1e-9), pytest.approx(y, rel=1e-9)) for x, y in truth
        ]
        few = [(p.latency_s, p.objective) for p in frontier(problem, points=4)]
        assert len(few) >= 2 and set(few) <= {(p.latency_s, p.objective) for p in found}
        assert frontier(problem, x="nbytes", points=3)


def test_frontier_of_an_infeasible_problem_and_bad_arguments() -> None:
    problem = sample(np.random.default_rng(15), ("nbytes",), slack=-0.1)
    assert frontier(problem) == []
    with pytest.raises(InputError, match="x is the minimised quantity: got loss"):
        frontier(problem, x="loss")
    with pytest.raises(InputError, match=r"frontier points: got 0; allowed: a number >= 1"):
        frontier(problem, points=0)


BAD = [
    ({"layers": ()}, r"layers is empty; allowed: at least one name"),
    ({"layers": ("a",) * 6}, r"layers has a name twice: got a; allowed: distinct names"),
    ({"loss": np.zeros((2, 3))}, r"shape of loss: got \[2, 3\]; allowed: \[6, 3\]"),
    ({"legal": np.ones((6, 2), bool)}, r"shape of legal: got \[6, 2\]"),
    ({"pair_loss": np.zeros((3, 3))}, r"shape of pair_loss: got \[3, 3\]; allowed: \[18, 18\]"),
    ({"pair_loss": np.triu(np.ones((18, 18)))}, r"pair_loss is not symmetric: got \|C - Cᵀ\|"),
    ({"pair_loss": np.full((18, 18), np.nan)}, r"pair_loss has a non-finite value"),
    ({"ties": (("layer0", "nope"),)}, r"ties names an unknown layer: got 'nope'"),
    (
        {"transitions": (Transition("layer0", "nope", np.zeros((3, 3))),)},
        r"transition 'layer0' -> 'nope' names an unknown layer: got 'nope'",
    ),
    (
        {"transitions": (Transition("layer0", "layer1", np.zeros((2, 3))),)},
        r"shape of transition 'layer0' -> 'layer1': got \[2, 3\]; allowed: \[3, 3\]",
    ),
    ({"fixed_latency_s": np.nan}, r"fixed_latency_s: got nan; allowed: a finite number"),
    ({"latency_s": None, "budgets": {}}, r"transitions or fixed_latency_s without latency_s"),
    ({"minimize": "joy"}, r"minimize: got 'joy'; allowed: loss, latency_s, nbytes, bops"),
    ({"loss": None}, r"the minimised quantity loss is absent. Give loss or minimise another"),
    ({"nbytes": None, "budgets": {"nbytes": 1.0}}, r"the budgeted quantity nbytes is absent"),
    ({"budgets": {"joy": 1.0}}, r"budget: got 'joy'; allowed: loss, latency_s, nbytes, bops"),
    ({"budgets": {"nbytes": np.inf}}, r"budget nbytes: got inf; allowed: a finite number. Leave"),
]


@pytest.mark.parametrize(("change", "text"), BAD, ids=[text[:30] for _, text in BAD])
def test_refusals(change: dict[str, object], text: str) -> None:
    problem = replace(sample(np.random.default_rng(16)), **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=text):
        search.solve(problem)


def test_names_and_unknown_names() -> None:
    assert {"ilp", "exhaustive", "greedy", "random"} <= set(search.names())
    problem = sample(np.random.default_rng(17))
    with pytest.raises(UnknownName, match=r"unknown solver: got 'gredy'.*Nearest: greedy"):
        search.solve(problem, "gredy")
    with pytest.raises(InputError, match=r"time limit: got 0; allowed: a number of seconds > 0"):
        search.solve(problem, time_limit_s=0)
    large = sample(np.random.default_rng(17), count=20)
    with pytest.raises(InputError, match=r"too many combinations for exhaustive: got 3.49e\+09"):
        search.solve(large, "exhaustive")


def test_import_is_light() -> None:
    heavy = "{'torch', 'tvm', 'ortools', 'xgboost'}"
    code = f"import sys, hwmpq.search as s; s.names(); assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stdout_stays_clean() -> None:
    """HiGHS prints past its own log switch; stdout belongs to --json."""
    code = (
        "import ctypes; from hwmpq.search.quiet import stdout_to_stderr\n"
        "with stdout_to_stderr(): ctypes.CDLL(None).puts(b'noise')\n"
        "print('answer')"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "answer\n" and "noise" in done.stderr
