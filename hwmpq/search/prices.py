"""What a budget is worth: exact re-solves beside an optimum, no duals.

A problem of choices has no derivative: its optimum is a staircase over each budget, and the dual of
its relaxation prices a staircase's hull. So the price of a unit (a second, a byte) is the finite
difference of two proven optima, with the step and both sides stated.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from hwmpq.errors import InputError
from hwmpq.search import solve
from hwmpq.types import Problem, Solution

#: A step of a budget, as a share of it.
STEP = 0.01


@dataclass(frozen=True)
class Price:
    """What one unit of a budget buys, in units of the objective per second, byte or bit operation.

    step: how far the budget was moved. more: objective saved per unit when the budget grows by the
    step, ≥ 0. less: objective lost per unit when it shrinks by it; None when nothing fits then.
    proven: all solves were optimal.
    """

    budget: float
    step: float
    more: float
    less: float | None
    proven: bool


def prices(
    problem: Problem, found: Solution, solver: str = "ilp", time_limit_s: float = 60.0,
    seed: int = 0, share: float = STEP,
) -> dict[str, Price]:  # fmt: skip
    """The price of each budget at a solution that `solver` found. Two solves per budget.

    A price per millisecond is Price.more · 1e-3, per megabyte · 1e6. The list is short if the time
    is up. Raises InputError for a solution without a choice or a share that is not positive.
    """
    if found.objective is None:
        raise InputError("prices at a solution", found.status, "one with a choice")
    if not share > 0:
        raise InputError("share of a budget", share, "a number > 0")
    end = time.perf_counter() + time_limit_s
    told: dict[str, Price] = {}
    for name, budget in problem.budgets.items():
        step = share * abs(budget)
        sides = []
        for moved in (budget + step, budget - step):
            if time.perf_counter() >= end:
                return told
            other = replace(problem, budgets={**problem.budgets, name: moved})
            sides.append(solve(other, solver, end - time.perf_counter(), seed))
        more, less = sides
        if step == 0 or more.objective is None:
            continue
        proven = all(side.status in ("optimal", "infeasible") for side in (found, *sides))
        gain = max(0.0, found.objective - more.objective) / step
        loss = None if less.objective is None else (less.objective - found.objective) / step
        told[name] = Price(budget, step, gain, loss, proven)
    return told
