"""The exact frontier of two quantities by the epsilon-constraint method.

Haimes, Lasdon and Wismer, IEEE Trans. SMC 1 (1971): minimise one quantity under an upper limit on
the other, and lower the limit. Every point is two solves: the least objective, then the least x at
that objective, so that no point is dominated. Each solve starts at the choice of the one before.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from hwmpq.errors import InputError
from hwmpq.search.check import check
from hwmpq.search.evaluate import IndexArray, evaluate, index_of
from hwmpq.search.ilp import solve
from hwmpq.types import Problem, Solution

#: Two points are told apart when they differ in x by this share of the whole range of x.
STEP = 1e-9


def frontier(
    problem: Problem,
    x: str = "latency_s",
    points: int | None = 20,
    time_limit_s: float = 60.0,
    seed: int = 0,
) -> list[Solution]:
    """The non-dominated choices of (x, problem.minimize) within the budgets, sorted by x.

    points: how many limits on x are tried, evenly spread over its range; None: every point of the
    frontier, whose number can grow exponentially with the layers. An infeasible problem has an
    empty frontier. The list is short if the time is up.
    Raises InputError when x is the minimised quantity or absent.
    """
    if x == problem.minimize:
        raise InputError("the frontier's x is the minimised quantity", x, next="Choose another x.")
    if points is not None and points < 1:
        raise InputError("frontier points", points, "a number >= 1, or None for all")
    check(replace(problem, minimize=x))
    check(problem)
    end = time.perf_counter() + time_limit_s

    found: list[Solution] = []

    def near() -> IndexArray | None:
        """The last point's choice: a start for the next solve."""
        return index_of(problem, found[-1].choice) if found else None

    def best(limit: float | None) -> Solution | None:
        """The least objective with x ≤ limit, and of those the least x."""
        budgets = dict(problem.budgets)
        if limit is not None:
            budgets[x] = min(limit, budgets.get(x, limit))
        bounded = replace(problem, budgets=budgets)
        first = solve(bounded, max(0.1, end - time.perf_counter()), seed, near())
        if first.objective is None:
            return None
        budgets[y] = min(first.objective, budgets.get(y, first.objective))
        polish = replace(problem, minimize=x, budgets=budgets)
        here = index_of(problem, first.choice)
        second = solve(polish, max(0.1, end - time.perf_counter()), seed, here)
        if not second.choice or _value(problem, second, x) > _value(problem, first, x):
            return first
        value = _value(problem, second, y)
        return replace(second, objective=value, bound=first.bound, gap=first.gap)

    y = problem.minimize
    right = best(None)
    if right is None:
        return []
    lowest = solve(replace(problem, minimize=x), max(0.1, end - time.perf_counter()), seed)
    low = _value(problem, lowest, x) if lowest.choice else _value(problem, right, x)
    high = _value(problem, right, x)
    found.append(right)
    if points is None:
        point: Solution | None = right
        while point is not None and time.perf_counter() < end:
            limit = _value(problem, point, x) - STEP * (high - low)
            point = best(limit) if limit >= low and high > low else None
            found += [point] if point is not None else []
    elif high > low:
        for limit in np.linspace(low, high, points, endpoint=False):
            if time.perf_counter() < end and (point := best(float(limit))) is not None:
                found.append(point)
    return _undominated(problem, found, x)


def _value(problem: Problem, solution: Solution, name: str) -> float:
    return float(evaluate(problem, index_of(problem, solution.choice)).of(name))


def _undominated(problem: Problem, found: list[Solution], x: str) -> list[Solution]:
    """Sorted by x, each strictly better in the objective than all before it."""
    kept: list[Solution] = []
    least = np.inf
    at = {id(point): _value(problem, point, x) for point in found}
    for point in sorted(found, key=lambda p: (at[id(p)], p.objective)):
        if point.objective is not None and point.objective < least:
            kept.append(point)
            least = point.objective
    return kept
