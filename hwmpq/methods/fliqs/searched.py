"""What a one-shot search found: a policy, and the plans that it holds likely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hwmpq.methods.fliqs.loop import Row
from hwmpq.methods.fliqs.policy import Policy, shares
from hwmpq.methods.fliqs.shared import Shared
from hwmpq.methods.fliqs.space import Space
from hwmpq.search.evaluate import answer, choice_of, index_of, table
from hwmpq.types import Assignment, FloatArray, Problem, Solution

#: A plan within the budgets shall use this share of one of them at least, where any does.
NEAR = 0.98
#: How much likelihood (e to this power) all of a budget may be worth, from and to.
_WORTH = (1.0, 1e4)
_TRIES = 12


@dataclass(frozen=True, eq=False)
class Searched:
    """A finished run. rows: one per step; seconds: of this process, without what was resumed."""

    shared: Shared
    space: Space
    policy: Policy
    problem: Problem
    rows: list[Row]
    seconds: float

    @property
    def best(self) -> Assignment:
        """The most probable plan, whatever it costs: the paper's result."""
        return choice_of(self.problem, self.space.formats(self.policy.best()))

    def within(self, problem: Problem, solve: Callable[[Problem], Solution]) -> Solution:
        """The most probable plan within given budgets; objective: its −log p.

        It is `best` wherever that is within them. Groups, pins and ties hold.
        """
        log_p = self.space.spread(self.policy.log_probabilities(), len(problem.formats))
        ties = (*problem.ties, *self.problem.ties)
        return most_probable(replace(problem, ties=ties), log_p, solve)


def most_probable(
    problem: Problem, log_p: FloatArray, solve: Callable[[Problem], Solution]
) -> Solution:
    """The most probable plan within the budgets; objective: its −log p. log_p: [L, F].

    The reward wants targets hit. So where that plan leaves more than 2 % of every budget, what is
    used of them counts as well, just as much as it takes.
    """
    able = np.isfinite(log_p)
    legal = able if problem.legal is None else able & problem.legal
    # Adding 0.0: no negative zeros.
    base = replace(problem, loss=np.where(able, -log_p, 0.0) + 0.0, legal=legal, pair_loss=None)
    found = solve(base)
    if not found.choice or _used(base, found) >= NEAR:
        return found
    low, high = np.log(_WORTH)
    for _ in range(_TRIES):
        middle = (low + high) / 2
        tried = solve(_filled(base, np.exp(middle)))
        near = _used(base, tried) >= NEAR
        low, high = (low, middle) if near else (middle, high)
        if near or _used(base, found) < min(NEAR, _used(base, tried)):
            found = tried
    return answer(base, index_of(base, found.choice), "feasible", found.seconds)


def _used(problem: Problem, solution: Solution) -> float:
    """The share of the budget that a plan uses most of."""
    return max(map(float, shares(problem, index_of(problem, solution.choice)).values()))


def _filled(problem: Problem, worth: float) -> Problem:
    """The problem with the use of its budgets as a gain. worth: of all of them."""
    loss = problem.loss
    for name, budget in problem.budgets.items():
        cells = table(problem, name)
        assert loss is not None and cells is not None
        loss = loss - worth / len(problem.budgets) * cells / budget
    return replace(problem, loss=loss)
