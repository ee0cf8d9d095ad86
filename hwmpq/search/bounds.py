"""Lower bounds by Lagrangian relaxation, and the cells and transitions they rule out.

With prices on the budgets the rest is a sum over decisions and edges, whose minimum is exact
(`elimination`), together with the least value through every cell and every pair. What cannot beat a
known choice leaves the problem: a chain of 1000 layers keeps a few dozen open decisions, and the
exact solver becomes quick. The prices maximise the bound by cutting planes (Kelley, J. SIAM 8,
1960), each asked for half-way to the best ones known (Ben-Ameur and Neto, Networks 49, 2007).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hwmpq.search.decisions import Decisions
from hwmpq.search.elimination import Least, Order, edge_costs, order_of, relax
from hwmpq.search.evaluate import IndexArray, limit
from hwmpq.search.moves import improve, repair, sums
from hwmpq.types import FloatArray, Problem

#: Relative margin below which a bound rules nothing out: far above float64 rounding.
MARGIN = 1e-9
#: Relaxed problems that the search for the prices may solve, and the share of the bound that is
#: not worth another one.
ASKED, CLOSE = 60, 1e-6
#: The greatest price, where a unit makes a budget's whole range worth the objective's.
DEAR = 1e6
#: Relaxed choices, the best ones, that incumbents are made of.
STARTS = 6


@dataclass(frozen=True, eq=False)
class Reduced:
    """What is left: decisions with fewer open cells, the best choice [D] found, a proven bound.

    bound: of the objective over all feasible choices, -inf where nothing was relaxed. least: the
    relaxed sums, which are larger by `shift` than the objective. infeasible: proven.
    """

    decisions: Decisions
    incumbent: IndexArray | None
    bound: float
    least: Least | None = None
    shift: float = 0.0
    infeasible: bool = False

    def offered(self, index: IndexArray, value: float) -> Reduced:
        """With a better choice [D], and without what cannot beat its value."""
        assert self.least is not None
        left = close(self.decisions, self.least, value + self.shift)
        return replace(self, decisions=left, incumbent=index)

    def core(self, cells: int) -> Decisions | None:
        """The likeliest part: so many cells beyond one of each decision; None where no more is
        open."""
        legal = self.decisions.legal
        count = len(legal) + cells
        if self.least is None or int(legal.sum()) <= count:
            return None
        level = np.partition(self.least.through[legal], count)[count]
        return close(self.decisions, self.least, float(level))


def reduce(
    problem: Problem, decisions: Decisions, deadline: float, near: Sequence[IndexArray] = ()
) -> Reduced:
    """Bound the objective, find a good choice, and close every cell that cannot be better.

    near: choices [D] that may lie near a good one. deadline: time.perf_counter() seconds; work
    stops there with what is known.
    """
    order = order_of(decisions)
    for name, budget in problem.budgets.items():
        found = relax(decisions, order, {name: 1.0})
        edge = limit(budget) + MARGIN * (abs(budget) + size(decisions, found.index, {name: 1.0}))
        if not found.value <= edge:
            return Reduced(decisions, None, math.inf, infeasible=True)
        decisions = close(decisions, found, edge)

    duals, starts = _prices(problem, decisions, order, deadline)
    weights = _weights(problem, duals)
    found = relax(decisions, order, weights)
    shift = sum(duals[name] * limit(budget) for name, budget in problem.budgets.items())
    if not math.isfinite(found.value):
        return Reduced(decisions, None, math.inf, infeasible=True)
    slop = MARGIN * (abs(shift) + size(decisions, found.index, weights))
    bound = found.value - shift - 1e-5 * slop
    best = _best(problem, decisions, [found.index, *near, *starts], deadline)
    reduced = Reduced(decisions, None, bound, found, shift + slop)
    if best is None:
        return reduced
    return reduced.offered(best, sums(problem, decisions, best)[problem.minimize])


def _best(
    problem: Problem, decisions: Decisions, starts: Sequence[IndexArray], deadline: float
) -> IndexArray | None:
    """The best choice that the starts lead to; the first one is always tried."""
    best: IndexArray | None = None
    least = math.inf
    for start in starts:
        mended = repair(problem, decisions, start)
        if mended is not None:
            mended = improve(problem, decisions, mended)
            reached = sums(problem, decisions, mended)[problem.minimize]
            if reached < least:
                best, least = mended, reached
        if time.perf_counter() > deadline:
            break
    return best


def _weights(problem: Problem, duals: dict[str, float]) -> dict[str, float]:
    weights = dict(duals)
    weights[problem.minimize] = weights.get(problem.minimize, 0.0) + 1.0
    return weights


def _prices(
    problem: Problem, decisions: Decisions, order: Order, deadline: float
) -> tuple[dict[str, float], list[IndexArray]]:
    """The prices of the budgets whose bound is greatest, and choices that are best near them."""
    names, goal = list(problem.budgets), problem.minimize
    spans = {n: float(np.ptp(cells, axis=1).sum()) or 1.0 for n, cells in decisions.tables.items()}
    unit = np.array([spans[goal] / spans[name] for name in names])
    limits = np.array([problem.budgets[name] for name in names])
    cuts: list[FloatArray] = []
    met: list[tuple[float, IndexArray]] = []
    asked = best = np.zeros(len(names))
    value = bound = -math.inf
    for _ in range(ASKED):
        found = relax(decisions, order, _weights(problem, _named(names, asked * unit)), False)
        if not math.isfinite(found.value):
            break
        excess = unit * (np.array([_sum(decisions, order, found.index, n) for n in names]) - limits)
        value = found.value - float(asked * unit @ limits)
        met.append((value, found.index))
        cuts.append(np.append(excess, value - asked @ excess) / spans[goal])
        if value > bound:
            best, bound = asked, value
        top, height = _top(cuts)
        if height * spans[goal] - bound <= CLOSE * abs(bound) or time.perf_counter() > deadline:
            break
        # with one budget the crossing of two lines is where to ask; with more, that point swings
        asked = top if len(names) == 1 else best + 0.5 * (top - best)
    met.sort(key=lambda pair: -pair[0])
    return _named(names, best * unit), [index for _, index in met[:STARTS]]


def _named(names: list[str], values: FloatArray) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def _top(cuts: list[FloatArray]) -> tuple[FloatArray, float]:
    """Where the least of the lines slope·λ + level is greatest over 0 ≤ λ ≤ DEAR, and how high."""
    from scipy.optimize import linprog

    lines = np.array(cuts)
    sides = np.concatenate([-lines[:, :-1], np.ones((len(lines), 1))], axis=1)
    goal = np.append(np.zeros(lines.shape[1] - 1), -1.0)
    within = [(0.0, DEAR)] * (len(goal) - 1) + [(None, None)]
    found = linprog(goal, A_ub=sides, b_ub=lines[:, -1], bounds=within)
    return np.asarray(found.x[:-1]), float(found.x[-1])


def size(decisions: Decisions, index: IndexArray, weights: dict[str, float]) -> float:
    """The size of the numbers that a bound sums up: what its rounding error is relative to."""
    total = 0.0
    for name, weight in weights.items():
        cells = np.abs(decisions.tables[name][np.arange(len(index)), index]).sum()
        if name == "latency_s":
            a, b = index[decisions.ends].T
            cells += np.abs(decisions.edge_latency_s[np.arange(len(a)), a, b]).sum()
        total += abs(weight) * (float(cells) + abs(decisions.constant[name]))
    return total


def close(decisions: Decisions, found: Least, value: float) -> Decisions:
    """Forbid all cells and pairs through which every choice costs more than `value`."""
    legal = decisions.legal & (found.through <= value)
    allowed = decisions.allowed & (found.through_edge <= value)
    first, second = decisions.ends.T
    allowed &= legal[first][:, :, None] & legal[second][:, None, :]
    return replace(decisions, legal=legal, allowed=allowed)


def _sum(decisions: Decisions, order: Order, index: IndexArray, name: str) -> float:
    """A quantity of a choice [D] as the relaxed problem counts it."""
    total = float(decisions.tables[name][np.arange(len(index)), index].sum())
    total += decisions.constant[name]
    if name == "latency_s":
        inside = np.setdiff1d(np.arange(len(decisions.ends)), order.others)
        a, b = index[decisions.ends[inside]].T
        total += float(decisions.edge_latency_s[inside, a, b].sum())
        total += float(edge_costs(decisions, 1.0)[order.others].min((1, 2), initial=np.inf).sum())
    return total
