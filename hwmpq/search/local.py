"""Local search on a quadratic objective: the incumbents of iqp.

The best single change that stays within the budgets, then the best pair of changes (what a tight
budget asks for: one decision up, another down), until neither helps; from many starts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hwmpq.search.decisions import Decisions
from hwmpq.search.evaluate import IndexArray, limit
from hwmpq.search.moves import changes, feasible, repair, sums
from hwmpq.types import FloatArray, Problem

#: Single changes, the cheapest ones, that are tried in pairs.
PAIRED = 400
#: Random starts, and the share of decisions that a start out of the best choice draws anew.
STARTS = 24
SHAKEN = 0.25


@dataclass(frozen=True, eq=False)
class Quadratic:
    """xᵀCx over decisions: matrix [D·F, D·F], symmetric, off-diagonals inside a decision 0."""

    matrix: FloatArray
    width: int

    def cells(self, index: IndexArray) -> IndexArray:
        return np.arange(len(index)) * self.width + index

    def value(self, index: IndexArray) -> float:
        at = self.cells(index)
        return float(self.matrix[np.ix_(at, at)].sum())

    def prices(self, index: IndexArray) -> FloatArray:
        """By how much the value changes when decision d alone moves to format f: [D, F]."""
        at = self.cells(index)
        field = self.matrix[:, at].sum(1).reshape(-1, self.width)
        own = np.diagonal(self.matrix).reshape(-1, self.width)
        row = np.arange(len(index))
        delta = own + 2.0 * field - (2.0 * field - own)[row, index][:, None]
        # the field of a cell holds its own diagonal only while it is chosen
        delta[row, index] = 0.0
        return np.asarray(delta)


def descend(
    problem: Problem, decisions: Decisions, quadratic: Quadratic, index: IndexArray
) -> IndexArray:
    """Improve a feasible choice [D] by one and two changes until none helps."""
    index = index.copy()
    slack = 1e-12 * max(1e-300, abs(quadratic.value(index)))
    for _ in range(decisions.legal.size):
        now, delta = sums(problem, decisions, index), changes(decisions, index)
        price = quadratic.prices(index)
        blocked = ~decisions.legal
        for cells in delta.values():
            blocked |= ~np.isfinite(cells)
        room = {name: limit(budget) - now[name] for name, budget in problem.budgets.items()}
        good = ~blocked & (price < -slack)
        for name, left in room.items():
            good &= delta[name] <= left
        if good.any():
            spot = np.unravel_index(int(np.where(good, price, np.inf).argmin()), price.shape)
            index[spot[0]] = spot[1]
            continue
        pair = _best_pair(quadratic, index, np.where(blocked, np.inf, price), delta, room, slack)
        if pair is None:
            break
        other = index.copy()
        for d, f in pair:
            other[d] = f
        # an edge between the two, or rounding, can make the pair cost more than its parts
        if not feasible(problem, decisions, other):
            break
        index = other
    return index


def _best_pair(
    quadratic: Quadratic, index: IndexArray, price: FloatArray, delta: dict[str, FloatArray],
    room: dict[str, float], slack: float,
) -> tuple[tuple[int, int], tuple[int, int]] | None:  # fmt: skip
    price = price.copy()
    price[np.arange(len(index)), index] = np.inf
    order = np.argsort(price, axis=None, kind="stable")[:PAIRED]
    order = order[np.isfinite(price.reshape(-1)[order])]
    group, cell = np.divmod(order, quadratic.width)
    old = quadratic.cells(index)[group]
    matrix, flat = quadratic.matrix, price.reshape(-1)[order]
    both = matrix[np.ix_(order, order)] - matrix[np.ix_(order, old)]
    both += matrix[np.ix_(old, old)] - matrix[np.ix_(old, order)]
    total = flat[:, None] + flat + 2.0 * both
    good = (group[:, None] != group) & (total < -slack)
    for name, left in room.items():
        step = delta[name].reshape(-1)[order]
        good &= step[:, None] + step <= left
    if not good.any():
        return None
    a, b = np.unravel_index(int(np.where(good, total, np.inf).argmin()), total.shape)
    return (int(group[a]), int(cell[a])), (int(group[b]), int(cell[b]))


def settle(
    problem: Problem, decisions: Decisions, quadratic: Quadratic, index: IndexArray
) -> IndexArray | None:
    """The local optimum reached from any choice [D]; None as repair."""
    mended = repair(problem, decisions, index, quadratic.prices)
    return None if mended is None else descend(problem, decisions, quadratic, mended)


def multi_start(
    problem: Problem, decisions: Decisions, quadratic: Quadratic, first: Iterable[IndexArray],
    seed: int, deadline: float,
) -> IndexArray | None:  # fmt: skip
    """The best local optimum from the given choices, from random ones and from shaken best ones.

    deadline: time.perf_counter() seconds; at least one start is made.
    """
    rng = np.random.default_rng(seed)
    best: IndexArray | None = None
    least = np.inf

    def start(index: IndexArray) -> None:
        nonlocal best, least
        found = settle(problem, decisions, quadratic, index)
        if found is not None and (value := quadratic.value(found)) < least:
            best, least = found, value

    for index in first:
        start(index)
    for k in range(STARTS):
        if time.perf_counter() > deadline:
            break
        draw = np.where(decisions.legal, rng.random(decisions.legal.shape), -1.0).argmax(1)
        if best is not None and k % 3:
            draw = np.where(rng.random(len(draw)) < SHAKEN, draw, best)
        start(draw)
    return best
