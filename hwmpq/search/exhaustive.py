"""The oracle: every legal choice is summed up. For small problems and for tests of the others."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from hwmpq.errors import InputError
from hwmpq.search.decisions import Decisions, merge
from hwmpq.search.evaluate import IndexArray, answer, evaluate, within
from hwmpq.types import Problem, Solution

#: More combinations than this are refused.
MOST = 2_000_000
_CHUNK = 1 << 14


def solve(problem: Problem, time_limit_s: float, seed: int) -> Solution:
    """The least objective by trying all choices; the first in counting order among equals.

    With `pair_loss` and minimize='loss' the objective is xᵀCx, as it is for iqp; a budget on the
    loss always means the table. Raises InputError for more than `MOST` combinations.
    """
    start = time.perf_counter()
    decisions = merge(problem)
    options = [np.flatnonzero(row) for row in decisions.legal]
    count = math.prod(len(row) for row in options)
    if count > MOST:
        raise InputError(
            "too many combinations for exhaustive", f"{count:.3g}", f"at most {MOST}", "Use ilp."
        )
    pairs = problem.minimize == "loss" and problem.pair_loss is not None
    goal = "raw_objective" if pairs else problem.minimize
    best: IndexArray | None = None
    least = math.inf
    reached = dict.fromkeys(problem.budgets, math.inf)
    for first in range(0, count, _CHUNK):
        if time.perf_counter() - start > time_limit_s:
            seconds = time.perf_counter() - start
            if best is None:
                return Solution("timeout", {}, seconds=seconds)
            return answer(problem, best, "feasible", seconds, objective=goal)
        index = _count_off(decisions, options, first, min(first + _CHUNK, count))
        values = evaluate(problem, index)
        runs = within(replace(problem, budgets={}), values)
        for name in reached:
            reached[name] = min(reached[name], float(np.where(runs, values.of(name), np.inf).min()))
        cost = np.where(within(problem, values), values.of(goal), np.inf)
        at = int(cost.argmin())
        if cost[at] < least:
            best, least = index[at], float(cost[at])
    seconds = time.perf_counter() - start
    if best is None:
        known = {name: value for name, value in reached.items() if math.isfinite(value)}
        return Solution("infeasible", {}, seconds=seconds, least=known)
    return answer(problem, best, "optimal", seconds, bound=least, objective=goal)


def _count_off(
    decisions: Decisions, options: list[IndexArray], first: int, last: int
) -> IndexArray:
    """The choices numbered first..last-1 in mixed radix, per layer: [last - first, L]."""
    rest = np.arange(first, last)
    index = np.empty((len(rest), len(options)), np.intp)
    for d in reversed(range(len(options))):
        rest, digit = np.divmod(rest, len(options[d]))
        index[:, d] = options[d][digit]
    return decisions.expand(index)


SOLVER = solve
