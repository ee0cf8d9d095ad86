"""What a choice costs: the only place where the sums of a Problem are written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hwmpq.types import Assignment, FloatArray, Problem, Solution

IndexArray = NDArray[np.intp]
#: What can be minimised or budgeted: the names of a Problem's tables.
QUANTITIES = ("loss", "latency_s", "nbytes", "bops")
#: A budget counts as met up to this relative rounding error of float64 sums.
ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Values:
    """The sums of one choice (shape []) or of many ([N]); None where the problem has no table.

    latency_s: seconds, with transitions and the fixed part. raw_objective: xᵀCx, C = pair_loss.
    """

    loss: FloatArray | None
    latency_s: FloatArray | None
    nbytes: FloatArray | None
    bops: FloatArray | None
    raw_objective: FloatArray | None

    def of(self, name: str) -> FloatArray:
        """The sums of the quantity `name`. Raises KeyError when the problem has no such table."""
        values: FloatArray | None = getattr(self, name)
        if values is None:
            raise KeyError(name)
        return values


def table(problem: Problem, name: str) -> FloatArray | None:
    """The [L, F] table of a quantity, None when absent."""
    values: FloatArray | None = getattr(problem, name)
    return values


def evaluate(problem: Problem, index: IndexArray) -> Values:
    """Sums of choices. index: format numbers, [L] for one choice or [N, L] for many."""
    row = np.arange(len(problem.layers))

    def total(name: str) -> FloatArray | None:
        cells = table(problem, name)
        if cells is None:
            return None
        return np.asarray(np.ascontiguousarray(cells[row, index], np.float64).sum(-1))

    latency = total("latency_s")
    if latency is not None:
        if problem.transitions:
            place = {name: i for i, name in enumerate(problem.layers)}
            source = index[..., [place[move.source] for move in problem.transitions]]
            target = index[..., [place[move.target] for move in problem.transitions]]
            cost = np.stack([move.latency_s for move in problem.transitions])
            extra = cost[np.arange(len(cost)), source, target]
            latency = latency + np.ascontiguousarray(extra).sum(-1)
        latency = np.asarray(latency + problem.fixed_latency_s)
    raw = None
    if problem.pair_loss is not None:
        at = row * len(problem.formats) + index
        raw = np.asarray(problem.pair_loss[at[..., :, None], at[..., None, :]].sum((-2, -1)))
    return Values(total("loss"), latency, total("nbytes"), total("bops"), raw)


def limit(budget: float) -> float:
    """The largest float64 sum that counts as within the budget."""
    return budget + ROUNDING * abs(budget)


def within(problem: Problem, values: Values) -> NDArray[np.bool_]:
    """Are all budgets met? Shape as the values'. A non-finite sum meets none."""
    met = np.asarray(True)
    for name, budget in problem.budgets.items():
        met = met & (values.of(name) <= limit(budget))
    if values.latency_s is not None:
        met = met & np.isfinite(values.latency_s)  # a transition nobody measured
    return np.asarray(met)


def choice_of(problem: Problem, index: IndexArray) -> Assignment:
    """Format numbers [L] -> {layer: format}."""
    pairs = zip(problem.layers, index, strict=True)
    return {layer: problem.formats[int(f)] for layer, f in pairs}


def index_of(problem: Problem, choice: Mapping[str, str]) -> IndexArray:
    """{layer: format} -> format numbers [L]. Raises KeyError for a missing layer or format."""
    place = {name: i for i, name in enumerate(problem.formats)}
    return np.array([place[choice[layer]] for layer in problem.layers], np.intp)


def answer(
    problem: Problem,
    index: IndexArray,
    status: Literal["optimal", "feasible"],
    seconds: float,
    bound: float | None = None,
    objective: str = "",
) -> Solution:
    """The Solution of a choice [L]; bound: proven lower bound of the objective, None if unknown.

    objective: the member of Values that was minimised, `problem.minimize` if empty.
    """
    values = evaluate(problem, index)
    reached = float(values.of(objective or problem.minimize))
    gap = None
    if bound is not None:
        cells = table(problem, problem.minimize)
        size = 0.0 if cells is None else float(np.abs(cells[np.arange(len(index)), index]).sum())
        # a difference below the rounding error of the sum is no gap
        bound = reached if reached - bound <= ROUNDING * size else bound
        gap = (reached - bound) / max(abs(reached), 1e-12)
    rest: dict[str, Any] = {
        name: None if (value := getattr(values, name)) is None else float(value)
        for name in ("raw_objective", "latency_s", "nbytes", "bops")
    }
    choice = choice_of(problem, index)
    return Solution(status, choice, reached, bound=bound, gap=gap, seconds=seconds, **rest)
