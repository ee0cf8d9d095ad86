"""The control: the best of some random choices within the budgets."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from hwmpq.search.decisions import merge
from hwmpq.search.evaluate import IndexArray, answer, evaluate
from hwmpq.search.moves import changes, feasible, sums
from hwmpq.types import Problem, Solution

#: Choices that `solve` draws.
DRAWS = 20


def samples(problem: Problem, count: int, seed: int) -> Iterator[IndexArray]:
    """Up to `count` random feasible choices [L], alike for the same seed.

    Each starts uniform over the legal cells; then random decisions, one by one, take the format
    that brings them nearest to the budgets, until all are met. A draw that never meets them is
    left out, so a tight problem yields fewer, and perhaps none.
    """
    rng = np.random.default_rng(seed)
    decisions = merge(problem)
    if not decisions.legal.any(1).all():
        return
    unit = {name: float(np.ptp(decisions.tables[name], axis=1).sum()) for name in problem.budgets}
    for _ in range(count):
        noise = np.where(decisions.legal, rng.random(decisions.legal.shape), -1.0)
        index = noise.argmax(1)
        for d in rng.permutation(len(index)):
            if feasible(problem, decisions, index):
                break
            now, delta = sums(problem, decisions, index), changes(decisions, index)
            over = np.zeros(decisions.legal.shape[1])
            for name, budget in problem.budgets.items():
                excess = np.maximum(0.0, now[name] + delta[name][d] - budget)
                over += excess / (unit[name] or 1.0)
            index[d] = over.argmin()
        if feasible(problem, decisions, index):
            yield decisions.expand(index)


def solve(problem: Problem, time_limit_s: float, seed: int) -> Solution:
    """The best of up to `DRAWS` samples; status feasible, or infeasible (no proof) when none."""
    start = time.perf_counter()
    best: IndexArray | None = None
    least = np.inf
    for index in samples(problem, DRAWS, seed):
        value = float(evaluate(problem, index).of(problem.minimize))
        if value < least:
            best, least = index, value
        if time.perf_counter() - start > time_limit_s:
            break
    seconds = time.perf_counter() - start
    if best is None:
        return Solution("infeasible", {}, seconds=seconds)
    return answer(problem, best, "feasible", seconds)


SOLVER = solve
