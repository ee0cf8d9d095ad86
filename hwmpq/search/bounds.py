"""Lower bounds by Lagrangian relaxation, and the cells and transitions they rule out.

With multipliers on the budgets the rest is a sum over decisions and edges; on a forest of edges
its minimum is found exactly by dynamic programming, together with the least value through every
cell and every pair. What cannot beat a known choice leaves the problem: a chain of 1000 layers
keeps a few dozen open decisions, and the exact solver becomes quick. Edges outside the forest
count with their least entry, which keeps the bound valid. Line search over a multiplier: Handler
and Zang, "A dual algorithm for the constrained shortest path problem", Networks 10 (1980).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hwmpq.search.decisions import Decisions
from hwmpq.search.evaluate import IndexArray, limit
from hwmpq.search.moves import improve, repair, sums
from hwmpq.types import BoolArray, FloatArray, Problem

#: Relative margin below which a bound rules nothing out: far above float64 rounding.
MARGIN = 1e-9


@dataclass(frozen=True, eq=False)
class Reduced:
    """What is left: decisions with fewer open cells, the best choice [D] found, a proven bound.

    infeasible: proven. bound: of the objective over all feasible choices.
    """

    decisions: Decisions
    incumbent: IndexArray | None
    bound: float
    infeasible: bool = False


@dataclass(frozen=True, eq=False)
class Forest:
    """levels: per depth ≥ 1 (child [n], parent [n], edge [n], turned [n]); turned: child first."""

    roots: IndexArray
    levels: tuple[tuple[IndexArray, IndexArray, IndexArray, BoolArray], ...]
    others: IndexArray


@dataclass(frozen=True, eq=False)
class _Relaxed:
    """The relaxed minimum, its choice [D], and the least value through each cell and edge pair."""

    value: float
    index: IndexArray
    through: FloatArray
    through_edge: FloatArray


def reduce(
    problem: Problem, decisions: Decisions, deadline: float, near: Sequence[IndexArray] = ()
) -> Reduced:
    """Bound the objective, find a good choice, and close every cell that cannot be better.

    near: choices [D] that may lie near a good one. deadline: time.perf_counter() seconds; work
    stops there with what is known.
    """
    forest = forest_of(decisions)
    for name, budget in problem.budgets.items():
        found = relax(decisions, forest, {name: 1.0})
        edge = limit(budget) + MARGIN * (abs(budget) + size(decisions, found.index, {name: 1.0}))
        if not found.value <= edge:
            return Reduced(decisions, None, math.inf, infeasible=True)
        decisions = close(decisions, found, edge)

    duals: dict[str, float] = dict.fromkeys(problem.budgets, 0.0)
    starts: list[IndexArray] = []
    for _ in range(3 if len(duals) > 1 else 1):
        for name in duals:
            if time.perf_counter() < deadline:
                duals[name], tried = _multiplier(problem, decisions, forest, duals, name)
                starts = [*tried, *starts][:4]
    weights = _weights(problem, duals)
    found = relax(decisions, forest, weights)
    shift = sum(duals[name] * limit(budget) for name, budget in problem.budgets.items())
    if not math.isfinite(found.value):
        return Reduced(decisions, None, math.inf, infeasible=True)
    slop = MARGIN * (abs(shift) + size(decisions, found.index, weights))
    bound = found.value - shift - 1e-5 * slop
    best: IndexArray | None = None
    value = math.inf
    for start in (found.index, *near, *starts):
        mended = repair(problem, decisions, start)
        if mended is not None:
            mended = improve(problem, decisions, mended)
            reached = sums(problem, decisions, mended)[problem.minimize]
            if reached < value:
                best, value = mended, reached
        if time.perf_counter() > deadline:
            break
    if best is not None:
        decisions = close(decisions, found, value + shift + slop)
    return Reduced(decisions, best, bound)


def _weights(problem: Problem, duals: dict[str, float]) -> dict[str, float]:
    weights = dict(duals)
    weights[problem.minimize] = weights.get(problem.minimize, 0.0) + 1.0
    return weights


def _multiplier(
    problem: Problem, decisions: Decisions, forest: Forest, duals: dict[str, float], name: str
) -> tuple[float, list[IndexArray]]:
    """The best multiplier of budget `name`, the others held, and the two choices that meet there.

    Handler and Zang: the next multiplier is where the lines of the best choice over and the best
    choice under the budget cross; the search ends when no choice lies below the crossing.
    """
    base = _weights(problem, {**duals, name: 0.0})
    budget = problem.budgets[name]

    def line(index: IndexArray) -> tuple[float, float]:
        """Objective part and excess of a choice in the relaxed problem."""
        parts = {n: _sum(decisions, forest, index, n) for n in decisions.tables}
        return sum(base[n] * parts[n] for n in base), parts[name] - budget

    over = relax(decisions, forest, base).index
    (cost_over, excess), under = line(over), relax(decisions, forest, {name: 1.0}).index
    cost_under, spare = line(under)
    if excess <= 0 or spare > 0 or excess == spare:
        return 0.0, [over]
    step = 0.0
    for _ in range(40):
        step = max(0.0, (cost_under - cost_over) / (excess - spare))
        crossing = cost_over + step * excess
        found = relax(decisions, forest, {**base, name: base.get(name, 0.0) + step})
        cost, rest = line(found.index)
        if cost + step * rest >= crossing - 1e-12 * (abs(crossing) + abs(step * budget)):
            break
        if rest > 0:
            over, cost_over, excess = found.index, cost, rest
        else:
            under, cost_under, spare = found.index, cost, rest
    return step, [under, over]


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


def close(decisions: Decisions, found: _Relaxed, value: float) -> Decisions:
    """Forbid all cells and pairs through which every choice costs more than `value`."""
    legal = decisions.legal & (found.through <= value)
    allowed = decisions.allowed & (found.through_edge <= value)
    first, second = decisions.ends.T
    allowed &= legal[first][:, :, None] & legal[second][:, None, :]
    return replace(decisions, legal=legal, allowed=allowed)


def forest_of(decisions: Decisions) -> Forest:
    """A spanning forest that prefers edges of wide cost range, by depth."""
    from scipy.sparse import coo_array, csr_array
    from scipy.sparse.csgraph import (
        breadth_first_order,
        connected_components,
        minimum_spanning_tree,
    )

    count, (first, second) = len(decisions.legal), decisions.ends.T
    reach = np.ptp(decisions.edge_latency_s.reshape(len(first), -1), axis=1) if len(first) else []
    top = max(reach, default=0.0) or 1.0
    graph = coo_array((2.0 - np.asarray(reach) / top, (first, second)), (count, count))
    tree = minimum_spanning_tree(csr_array(graph)).tocoo()
    number, part = connected_components(tree, directed=False)
    roots = np.array([int(np.argmax(part == k)) for k in range(number)], np.intp)
    # one extra node above all roots lets a single traversal order the whole forest
    up = np.concatenate([tree.row, np.full(number, count)])
    down = np.concatenate([tree.col, roots])
    whole = csr_array((np.ones(len(up)), (up, down)), (count + 1, count + 1))
    order, above = breadth_first_order(whole, count, directed=False)
    depth = np.zeros(count + 1, np.intp)
    for node in order[1:]:
        depth[node] = depth[above[node]] + 1
    place = {(int(a), int(b)): e for e, (a, b) in enumerate(decisions.ends)}
    levels, used = [], set()
    for level in range(2, int(depth.max()) + 1):
        child = np.flatnonzero(depth[:count] == level)
        parent = above[child].astype(np.intp)
        turned = child < parent
        edge = np.array(
            [place[min(c, p), max(c, p)] for c, p in zip(child, parent, strict=True)], np.intp
        )
        used.update(edge.tolist())
        levels.append((child, parent, edge, turned))
    others = np.array([e for e in range(len(first)) if e not in used], np.intp)
    return Forest(roots, tuple(levels), others)


def _sum(decisions: Decisions, forest: Forest, index: IndexArray, name: str) -> float:
    """A quantity of a choice [D] as the relaxed problem counts it."""
    total = float(decisions.tables[name][np.arange(len(index)), index].sum())
    total += decisions.constant[name]
    if name == "latency_s":
        inside = np.setdiff1d(np.arange(len(decisions.ends)), forest.others)
        a, b = index[decisions.ends[inside]].T
        total += float(decisions.edge_latency_s[inside, a, b].sum())
        total += float(_costs(decisions, 1.0)[forest.others].min((1, 2), initial=np.inf).sum())
    return total


def _costs(decisions: Decisions, weight: float) -> FloatArray:
    return np.where(decisions.allowed, weight * decisions.edge_latency_s, np.inf)


def relax(decisions: Decisions, forest: Forest, weights: dict[str, float]) -> _Relaxed:
    """Minimise the weighted sum of the quantities over the forest: one sweep up, one down."""
    local = np.where(decisions.legal, 0.0, np.inf)
    for name, weight in weights.items():
        local += weight * decisions.tables[name]
    costs = _costs(decisions, weights.get("latency_s", 0.0))
    rest = float(costs[forest.others].min((1, 2), initial=np.inf).sum())
    rest += sum(weight * decisions.constant[name] for name, weight in weights.items())
    total, sent, steps = local, np.zeros_like(local), []
    for _, _, edge, turned in forest.levels:
        steps.append(np.where(turned[:, None, None], costs[edge].swapaxes(1, 2), costs[edge]))
    for (child, parent, _, _), cost in zip(forest.levels[::-1], steps[::-1], strict=True):
        sent[child] = (total[child][:, None, :] + cost).min(2)
        np.add.at(total, parent, sent[child])

    least = total[forest.roots].min(1)
    value = float(least.sum() + rest)
    index = total.argmin(1)
    through = np.full_like(total, np.inf)
    if not math.isfinite(value):  # forbidden transitions leave no choice
        return _Relaxed(value, index, through, np.full_like(costs, np.inf))
    through[forest.roots] = total[forest.roots] + (value - least)[:, None]
    through_edge = np.where(decisions.allowed, -np.inf, np.inf)
    for (child, parent, edge, turned), cost in zip(forest.levels, steps, strict=True):
        n = np.arange(len(child))
        index[child] = (total[child] + cost[n, index[parent], :]).argmin(1)
        above = through[parent] - np.where(np.isfinite(sent[child]), sent[child], 0.0)
        pair = above[:, :, None] + total[child][:, None, :] + cost
        through[child] = pair.min(1)
        through_edge[edge] = np.where(turned[:, None, None], pair.swapaxes(1, 2), pair)
    return _Relaxed(value, index, through, through_edge)
