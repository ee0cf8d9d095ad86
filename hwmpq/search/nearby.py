"""The choices near a relaxed minimum, decision by decision, as a sphere decoder finds them.

What a choice costs above the bound of a convex form is a sum of squares and of reduced costs. With
a triangular factor of the form, each decision adds its own part once those before it are taken, so
partial choices are extended breadth first and dropped when they cost too much (Fincke and Pohst,
Math. Comp. 44, 1985; with at most so many kept at a time: K-best detection, Wong et al., ISCAS
2002). Where none had to be left out, nothing better is left: on matrices of low rank that is proof
where the relaxation's bound moves little, as thousands of partial choices cost a node's time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwmpq.search.bounds import MARGIN
from hwmpq.search.evaluate import IndexArray
from hwmpq.search.relaxation import Form, Frame, Relaxed, frame_of
from hwmpq.types import BoolArray, FloatArray

#: Of the form's scale: what keeps the factor of a form on the edge of convexity defined.
EDGE = 1e-13
#: Numbers that the partial choices may hold: fewer are kept of large problems.
SPACE = 10_000_000


@dataclass(frozen=True, eq=False)
class Near:
    """choices [N, D], the cheapest first, and the objective [N] of each; complete: every choice
    below the asked value is among them."""

    choices: IndexArray
    values: FloatArray
    complete: bool


@dataclass(frozen=True, eq=False)
class _Partial:
    """Partial choices: what they cost above the bound [N], their rows' sums [N, R], the formats
    taken [N, D], and what the squares of the cells still to come hold of them [N, n]."""

    cost: FloatArray
    used: FloatArray
    choices: IndexArray
    field: FloatArray


def near(
    form: Form, found: Relaxed, legal: BoolArray, rows: FloatArray, limits: FloatArray,
    below: float, width: int, through: bool,
) -> Near:  # fmt: skip
    """One-hot x in legal [D, F] with rows @ x ≤ limits whose objective is below a value.

    found: the form's minimum under these rows. width: partial choices that are kept; where there
    are more, the cheapest ones go on if `through`, else the search ends with no choice.
    """
    frame = frame_of(legal)
    slope = found.slope.reshape(-1) + found.price @ rows
    slope = np.where(legal, slope.reshape(legal.shape), np.inf)
    base = found.level - float(found.price @ limits) + float(slope.min(1).sum())
    extra = slope - slope.min(1, keepdims=True)
    tables = rows.reshape(-1, *legal.shape).transpose(1, 2, 0)
    least = np.where(legal[:, :, None], tables, np.inf).min(1)
    after = least.sum(0)
    none = Near(np.zeros((0, len(legal)), np.intp), np.zeros(0), False)
    try:
        order, half, unit = _factor(form, frame)
    except np.linalg.LinAlgError:  # a form on the edge of convexity has no factor
        return none
    width = min(width, SPACE // max(1, len(half)))
    room = below - base + MARGIN * (abs(below) + unit)
    place = np.full(legal.size, -1)
    place[frame.cells] = np.arange(len(frame.cells))

    part = _Partial(
        np.zeros(1), np.zeros((1, len(rows))), np.zeros((1, len(legal)), np.intp),
        np.zeros((1, len(half))),
    )  # fmt: skip
    complete, end = True, len(half)
    for d in order:
        formats = np.flatnonzero(legal[d])
        own = place.reshape(legal.shape)[d]
        held = np.flatnonzero(own >= 0)
        away = (formats[:, None] == held) - found.x[d, held]
        start, after = end - len(held), after - least[d]
        moved = away @ half[start:end, :end]  # [K, end]
        squares = (part.field[:, None, start:end] + moved[:, start:]) ** 2
        cost = part.cost[:, None] + squares.sum(2) + extra[d, formats]
        used = part.used[:, None] + tables[d, formats]
        line, pick = np.nonzero((cost < room) & (used + after <= limits + MARGIN).all(2))
        if len(line) > width:
            complete = False
            if not through:
                return none
            keep = np.argpartition(cost[line, pick], width)[:width]
            line, pick = line[keep], pick[keep]
        choices = part.choices[line]
        choices[:, d] = formats[pick]
        field = part.field[line, :start] + moved[pick, :start]
        part, end = _Partial(cost[line, pick], used[line, pick], choices, field), start
    values = base + part.cost + (limits - part.used) @ found.price
    first = np.argsort(values, kind="stable")
    return Near(part.choices[first], values[first], complete)


def _factor(form: Form, frame: Frame) -> tuple[list[int], FloatArray, float]:
    """The decisions in the order they are taken, the lower Cholesky factor of the form with their
    cells in the opposite order, and the form's scale.

    First is the decision that costs most to move off the minimum when those behind it follow at
    their best, so that most partial choices are dropped early.
    """
    bowl = frame.columns(frame.columns(form.matrix).T)
    bowl = 0.5 * (bowl + bowl.T)
    unit = float(np.diagonal(bowl).max(initial=1e-300))
    bowl[np.diag_indices(len(bowl))] += EDGE * unit
    spread = np.linalg.inv(bowl)
    order = sorted(set(range(len(frame.first))) - set(frame.owner.tolist()))
    left = np.arange(len(bowl))
    while len(left):
        widest = np.full(len(frame.first), -np.inf)
        np.maximum.at(widest, frame.owner[left], np.diagonal(spread)[left])
        widest[widest == -np.inf] = np.inf
        d = int(widest.argmin())
        order.append(d)
        own, left = left[frame.owner[left] == d], left[frame.owner[left] != d]
        across = np.linalg.solve(spread[np.ix_(own, own)], spread[np.ix_(own, left)])
        spread[np.ix_(left, left)] -= spread[np.ix_(left, own)] @ across
    rank = np.empty(len(order), np.intp)
    rank[order[::-1]] = np.arange(len(order))
    cells = np.argsort(rank[frame.owner], kind="stable")
    half: FloatArray = np.asarray(np.linalg.cholesky(bowl[np.ix_(cells, cells)]), np.float64)
    return order, half, unit
