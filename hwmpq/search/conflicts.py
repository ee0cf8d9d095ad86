"""Why nothing fits: the smallest sets of budgets that contradict, and the least way out."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace

from hwmpq.search import ilp
from hwmpq.search.check import check
from hwmpq.search.evaluate import limit
from hwmpq.types import Problem


@dataclass(frozen=True)
class Conflict:
    """groups: sets of budgets that no choice meets together while it meets any smaller set;
    relaxed: budget -> the value it must be raised to, the others held; None where raising that
    budget alone helps nothing. proven: no solve ran out of time. A group of one budget whose
    relaxed value is None: legal cells, ties or forbidden transitions leave no choice at all.
    """

    groups: tuple[tuple[str, ...], ...]
    relaxed: dict[str, float | None]
    proven: bool


def conflict(problem: Problem, time_limit_s: float = 60.0, seed: int = 0) -> Conflict | None:
    """Explain an infeasible problem; None for one that has a choice. Raises InputError as solve.

    Every subset of at most four budgets is one solve: minimise its last member within the others.
    """
    check(problem)
    end = time.perf_counter() + time_limit_s
    proven = True

    def least(name: str, held: tuple[str, ...]) -> float | None:
        """The least `name` within the budgets held; None when nothing meets those."""
        nonlocal proven
        budgets = {other: problem.budgets[other] for other in held}
        alone = replace(problem, minimize=name, budgets=budgets, pair_loss=None)
        found = ilp.solve(alone, max(0.5, end - time.perf_counter()), seed)
        proven = proven and found.status in ("optimal", "infeasible")
        return found.objective

    names = tuple(problem.budgets)
    groups: list[tuple[str, ...]] = []
    for size in range(1, len(names) + 1):
        for some in itertools.combinations(names, size):
            if any(set(group) <= set(some) for group in groups):
                continue
            reached = least(some[-1], some[:-1])
            if reached is None or reached > limit(problem.budgets[some[-1]]):
                groups.append(some)
    if not groups and (names or ilp.solve(problem, time_limit_s, seed).choice):
        return None
    relaxed = {name: least(name, tuple(n for n in names if n != name)) for name in names}
    return Conflict(tuple(groups), relaxed, proven)
