"""Changes of one decision at a time: shared by greedy, random and the incumbents of ilp."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hwmpq.search.decisions import Decisions
from hwmpq.search.evaluate import IndexArray, evaluate, limit, within
from hwmpq.types import FloatArray, Problem


def changes(decisions: Decisions, index: IndexArray) -> dict[str, FloatArray]:
    """By how much each quantity changes when decision d alone moves to format f: [D, F].

    index: [D]. Illegal cells and forbidden transitions give inf.
    """
    row = np.arange(len(index))
    delta = {name: cells - cells[row, index][:, None] for name, cells in decisions.tables.items()}
    blocked = ~decisions.legal
    if len(decisions.ends):
        edge = np.arange(len(decisions.ends))
        first, second = decisions.ends.T
        a, b = index[first], index[second]
        cost, shut = decisions.edge_latency_s, ~decisions.allowed
        now = cost[edge, a, b][:, None]
        np.add.at(delta["latency_s"], first, cost[edge, :, b] - now)
        np.add.at(delta["latency_s"], second, cost[edge, a, :] - now)
        np.logical_or.at(blocked, first, shut[edge, :, b])
        np.logical_or.at(blocked, second, shut[edge, a, :])
    for cells in delta.values():
        cells[blocked] = np.inf
    return delta


def sums(problem: Problem, decisions: Decisions, index: IndexArray) -> dict[str, float]:
    """Every quantity of the choice [D]."""
    values = evaluate(problem, decisions.expand(index))
    return {name: float(values.of(name)) for name in decisions.tables}


def feasible(problem: Problem, decisions: Decisions, index: IndexArray) -> bool:
    """Does the choice [D] meet every budget when it is summed again?"""
    return bool(within(problem, evaluate(problem, decisions.expand(index))))


def repair(
    problem: Problem,
    decisions: Decisions,
    index: IndexArray,
    prices: Callable[[IndexArray], FloatArray] | None = None,
) -> IndexArray | None:
    """Move towards the budgets, the least extra objective per removed excess first.

    Excess: the sum over budgets of what is too much, in units of that quantity's whole range.
    prices: choice [D] -> extra objective of every move [D, F], `problem.minimize`'s if not given.
    Returns None when no single move helps, or a transition is forbidden: that proves nothing.
    """
    index = index.copy()
    unit = {name: float(np.ptp(decisions.tables[name], axis=1).sum()) for name in problem.budgets}
    now = sums(problem, decisions, index)
    if not np.isfinite(list(now.values())).all():
        return None
    for _ in range(decisions.legal.size):
        if all(now[name] <= limit(budget) for name, budget in problem.budgets.items()):
            if feasible(problem, decisions, index):
                return index
            now = sums(problem, decisions, index)
        delta = changes(decisions, index)
        gain = np.zeros(decisions.legal.shape)
        for name, budget in problem.budgets.items():
            over = now[name] - budget
            gain += (max(0.0, over) - np.maximum(0.0, over + delta[name])) / (unit[name] or 1.0)
        useful = gain > 0
        if not useful.any():
            return None
        gain = np.where(useful, gain, 1.0)
        price = delta[problem.minimize] if prices is None else prices(index)
        # a move that costs nothing: the larger gain first; else the least price per gain
        score = np.where(useful, np.where(price <= 0, -gain, price / gain), np.inf)
        spot = np.unravel_index(int(score.argmin()), score.shape)
        index[spot[0]] = spot[1]
        now = {name: value + float(delta[name][spot]) for name, value in now.items()}
    return None


def improve(problem: Problem, decisions: Decisions, index: IndexArray) -> IndexArray:
    """Take the best single move of a feasible choice that stays feasible, until none is left."""
    index, start = index.copy(), index
    now = sums(problem, decisions, index)
    for _ in range(decisions.legal.size):
        delta = changes(decisions, index)
        price = delta[problem.minimize]
        good = price < -1e-15 * abs(now[problem.minimize])
        for name, budget in problem.budgets.items():
            good &= now[name] + delta[name] <= limit(budget)
        if not good.any():
            break
        spot = np.unravel_index(int(np.where(good, price, np.inf).argmin()), price.shape)
        index[spot[0]] = spot[1]
        now = {name: value + float(delta[name][spot]) for name, value in now.items()}
    return index if feasible(problem, decisions, index) else start
