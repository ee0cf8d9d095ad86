"""The plans next to a plan: one or two decisions changed, still within the budgets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hwmpq.search.decisions import merge
from hwmpq.search.evaluate import choice_of, evaluate, index_of, within
from hwmpq.types import Assignment, Problem

#: Single changes that are also tried in pairs: those that change the estimate least.
PAIRED = 40


def neighbours(problem: Problem, plan: Assignment) -> Iterator[Assignment]:
    """All legal plans within the budgets that are one change away, or two; the one with the least
    estimated loss first."""
    decisions = merge(problem)
    here = decisions.gather(index_of(problem, plan))
    row = np.arange(len(here))
    price = decisions.tables["loss"] - decisions.tables["loss"][row, here][:, None]
    open_ = decisions.legal.copy()
    open_[row, here] = False
    singles = np.argwhere(open_)
    order = np.argsort(np.abs(price[open_]), kind="stable")
    steps: list[tuple[tuple[int, int], ...]] = [((d, f),) for d, f in singles[order]]
    few = singles[order[:PAIRED]]
    steps += [
        ((a, f), (b, g)) for i, (a, f) in enumerate(few) for b, g in few[i + 1 :] if a != b
    ]  # fmt: skip
    if not steps:
        return
    moved = np.tile(here, (len(steps), 1))
    for n, step in enumerate(steps):
        for d, f in step:
            moved[n, d] = f
    layers = decisions.expand(moved)
    values = evaluate(problem, layers)
    met = np.flatnonzero(within(problem, values))
    for n in met[np.argsort(values.of("loss")[met], kind="stable")]:
        yield choice_of(problem, layers[n])
