"""Why this choice: what each layer's other formats cost, alone and with all else re-solved."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hwmpq.search import solve
from hwmpq.search.evaluate import QUANTITIES, index_of, table
from hwmpq.types import BoolArray, FloatArray, Problem, Solution


@dataclass(frozen=True)
class Step:
    """One layer moved to `fmt`, all others chosen again within the budgets.

    objective: of the re-solved whole, None when nothing fits or the time was up. cost: objective
    minus that of the solution. changed: layers that then take another format, the moved one aside.
    """

    fmt: str
    status: str
    objective: float | None
    cost: float | None
    changed: tuple[str, ...]


@dataclass(frozen=True)
class Alternatives:
    """formats: legal format -> quantity -> the layer's own cell. up: the next format with less
    loss, down: with more; None at an end, or when the time was up before its solve."""

    chosen: str
    formats: Mapping[str, Mapping[str, float]]
    up: Step | None
    down: Step | None


def explain(
    problem: Problem, found: Solution, solver: str = "ilp", time_limit_s: float = 60.0,
    seed: int = 0,
) -> dict[str, Alternatives]:  # fmt: skip
    """Every layer's alternatives at a solution of `solver`; up to two exact solves per layer.

    The loss of a cell is `loss`, or ½ of the pair matrix's diagonal where that is absent. Raises
    KeyError for a solution without a choice.
    """
    end = time.perf_counter() + time_limit_s
    index = index_of(problem, found.choice)
    loss, legal = _losses(problem), _legal(problem)
    told = {}
    for i, layer in enumerate(problem.layers):
        open_ = np.flatnonzero(legal[i])
        ranked = open_[np.argsort(loss[i, open_], kind="stable")]
        at = int(np.flatnonzero(ranked == index[i])[0])
        steps: list[Step | None] = []
        for place in (at - 1, at + 1):
            left = end - time.perf_counter()
            inside = 0 <= place < len(ranked) and left > 0
            steps.append(
                _moved(problem, found, solver, i, int(ranked[place]), left, seed)
                if inside else None
            )  # fmt: skip
        cells = {problem.formats[f]: _cells(problem, loss, i, int(f)) for f in open_}
        told[layer] = Alternatives(found.choice[layer], cells, steps[0], steps[1])
    return told


def _moved(
    problem: Problem, found: Solution, solver: str, layer: int, fmt: int, seconds: float, seed: int
) -> Step:
    legal = _legal(problem)
    legal[layer] = False
    legal[layer, fmt] = True
    other = solve(replace(problem, legal=legal), solver, seconds, seed)
    name = problem.layers[layer]
    changed = tuple(
        n for n in problem.layers
        if other.choice and n != name and other.choice[n] != found.choice[n]
    )  # fmt: skip
    cost = None
    if other.objective is not None and found.objective is not None:
        cost = other.objective - found.objective
    return Step(problem.formats[fmt], other.status, other.objective, cost, changed)


def _legal(problem: Problem) -> BoolArray:
    legal = np.ones((len(problem.layers), len(problem.formats)), bool)
    if problem.legal is not None:
        legal &= np.asarray(problem.legal, bool)
    for name in QUANTITIES:
        cells = table(problem, name)
        if cells is not None:
            legal &= np.isfinite(cells)
    return legal


def _losses(problem: Problem) -> FloatArray:
    """What ranks a layer's formats [L, F]."""
    shape = (len(problem.layers), len(problem.formats))
    if problem.loss is not None:
        return np.asarray(problem.loss, np.float64)
    if problem.pair_loss is not None:
        return np.asarray(0.5 * np.diagonal(problem.pair_loss).reshape(shape))
    cells = table(problem, problem.minimize)
    assert cells is not None  # solve() refused a problem without it
    return np.asarray(cells)


def _cells(problem: Problem, loss: FloatArray, layer: int, fmt: int) -> dict[str, float]:
    cells = {"loss": float(loss[layer, fmt])}
    for name in QUANTITIES[1:]:
        values = table(problem, name)
        if values is not None:
            cells[name] = float(values[layer, fmt])
    return cells
