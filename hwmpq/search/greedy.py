"""The control: start at the least objective, buy the budgets at the best price, then refine.

Quick and without proof: `infeasible` means only that no single move led into the budgets.
"""

from __future__ import annotations

import time

import numpy as np

from hwmpq.search.decisions import merge
from hwmpq.search.evaluate import answer
from hwmpq.search.moves import improve, repair
from hwmpq.types import Problem, Solution


def solve(problem: Problem, time_limit_s: float, seed: int) -> Solution:
    """Best-ratio moves from the choice of least objective per layer; status feasible, no bound."""
    start = time.perf_counter()
    decisions = merge(problem)
    found = None
    if decisions.legal.any(1).all():
        goal = np.where(decisions.legal, decisions.tables[problem.minimize], np.inf)
        found = repair(problem, decisions, goal.argmin(1))
    if found is None:
        return Solution("infeasible", {}, seconds=time.perf_counter() - start)
    found = improve(problem, decisions, found)
    seconds = time.perf_counter() - start
    return answer(problem, decisions.expand(found), "feasible", seconds)


SOLVER = solve
