"""The problem put together, and the plan chosen for each kind of objective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hwmpq.errors import InfeasibleError, InputError
from hwmpq.formats import bops, format_named
from hwmpq.search import solve
from hwmpq.search.conflicts import conflict
from hwmpq.search.pareto import frontier as exact_frontier
from hwmpq.stages.budget import parse_sums
from hwmpq.stages.job import Job, solver_of
from hwmpq.stages.menu import Menu
from hwmpq.stages.pricing import LatencyTable
from hwmpq.types import Assignment, Problem, Sensitivity, Solution


def make_problem(
    job: Job, menu: Menu, loss: Sensitivity, table: LatencyTable, limits: Mapping[str, float]
) -> Problem:
    """Arrays of the whole network. Cells without a time or a loss are illegal.

    limits: budgets besides the latency's (`given_limits`).
    """
    layers = job.network.layers
    nbytes = np.zeros((len(layers), len(menu.formats)))
    work = np.zeros_like(nbytes)
    for i, layer in enumerate(layers):
        for j, name in enumerate(menu.formats):
            fmt = format_named(name)
            if layer.workload.has_weight:
                nbytes[i, j] = fmt.nbytes(layer.workload.weight_shape, layer.bias)
            work[i, j] = bops(fmt, layer.workload.macs)
    legal = menu.legal & np.isfinite(table.latency_s) & np.isfinite(loss.loss)
    empty = [layers[i].name for i in np.flatnonzero(~legal.any(axis=1))]
    if empty:
        reasons = sorted({*table.unknown.get(empty[0], {}).values()})
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise InputError(
            "layers without any usable format", f"{', '.join(empty[:5])}{why}", None,
            "See `hwmpq inspect`; loosen --pin or --formats, or measure more: what was measured "
            "is kept.",
        )  # fmt: skip
    values = np.where(legal, loss.loss, 0.0)
    return Problem(
        layers=job.network.names,
        formats=menu.formats,
        loss=np.where(np.isfinite(values), values, 0.0),
        latency_s=np.where(legal, table.latency_s, 1.0),
        nbytes=nbytes,
        bops=work,
        legal=legal,
        pair_loss=loss.pair_loss,
        transitions=table.transitions,
        fixed_latency_s=table.fixed_s,
        ties=menu.ties,
        budgets=dict(limits),
    )


def given_limits(job: Job) -> dict[str, float]:
    """The budgets of --max-size and --max-bops; relative ones are of the fp32 model's layers."""
    layers, o = job.network.layers, job.options
    size = 4 * sum(layer.parameters + layer.bias for layer in layers)
    fp32 = format_named("fp32")
    work = sum(bops(fp32, layer.workload.macs) for layer in layers)
    return parse_sums(o.max_size, o.max_bops, size, work)


def within(problem: Problem, latency_s: float | None) -> Problem:
    """The problem with a latency budget."""
    if latency_s is None:
        return problem
    return replace(problem, budgets={**problem.budgets, "latency_s": latency_s})


def least_loss(job: Job, problem: Problem) -> Solution:
    """Least loss within the budgets. Raises InfeasibleError naming the best possible plans."""
    solver = solver_of(job.options)
    solution = solve(problem, solver, solver_limit_s(job), job.options.seed)
    if solution.status == "infeasible":
        raise infeasible(problem, solution)
    if not solution.choice:
        raise InputError(
            f"solver {solver} found no plan in its time", solution.status, None,
            "Give it more time with --max-time.",
        )  # fmt: skip
    return solution


def infeasible(problem: Problem, solution: Solution) -> InfeasibleError:
    """What the budgets ask and what is the least that can be had."""
    asked, least, best = [], [], []
    for name, budget in problem.budgets.items():
        asked.append(f"{_words(name, budget)}")
        if name in solution.least:
            least.append(f"{_words(name, solution.least[name])}")
        alone = solve(replace(problem, minimize=name, budgets={}))
        if alone.choice:
            best.append(f"the {_BEST.get(name, f'least {name}')} plan is {_plan(alone)}")
    named = f"{'; '.join(best)}. ".capitalize() if best else ""
    return InfeasibleError(
        "no plan meets the budgets", " and ".join(asked),
        f"at least {' and '.join(least)}" if least else None,
        f"{named}{_way_out(problem)}Loosen the budget, add formats, or drop pins.",
    )  # fmt: skip


def _way_out(problem: Problem) -> str:
    """What one of several budgets would have to be, the others held."""
    found = conflict(problem) if len(problem.budgets) > 1 else None
    raised = {} if found is None else found.relaxed
    ways = [_words(name, value) for name, value in raised.items() if value is not None]
    return f"One change is enough: {' or '.join(ways)}. " if ways else ""


_BEST = {"latency_s": "fastest", "nbytes": "smallest"}


def _plan(solution: Solution) -> str:
    """How many layers are in which format."""
    counts = Counter(solution.choice.values())
    return ", ".join(f"{count} × {name}" for name, count in counts.most_common())


def _words(name: str, value: float) -> str:
    if name == "latency_s":
        return f"{value * 1e3:.4g} ms"
    if name == "nbytes":
        return f"{value / 1e6:.4g} MB"
    if name == "bops":
        return f"{value / 1e9:.4g} G bit operations"
    return f"{name} {value:.4g}"


def solver_limit_s(job: Job) -> float:
    """What --max-time leaves a solver: 10 s at least, for measuring may have used it up."""
    return min(max(job.options.max_time or 60.0, 10.0), 60.0)


@dataclass(frozen=True)
class Point:
    """A plan on the latency–loss frontier, fastest first; drop: filled in when judged."""

    assignment: Assignment
    loss: float
    latency_s: float
    nbytes: float


def walk_frontier(job: Job, problem: Problem, points: int = 12) -> list[Point]:
    """Non-dominated plans from the fastest to the least lossy. Raises InfeasibleError."""
    solutions = exact_frontier(
        problem, "latency_s", points, time_limit_s=solver_limit_s(job), seed=job.options.seed
    )
    if not solutions:
        raise infeasible(problem, solve(problem, "ilp", time_limit_s=solver_limit_s(job)))
    return sorted(map(_point, solutions), key=lambda p: p.latency_s)


def fastest_within_drop(
    points: Sequence[Point], judge: Callable[[Assignment], float], max_drop: float
) -> int:
    """Index of the fastest plan whose judged drop is within max_drop, by bisection.

    The drop is taken to fall along the frontier; the found plan itself was judged. When even the
    slowest plan drops more, that one is returned: the caller reports it.
    """
    low, high = 0, len(points) - 1
    while low < high:
        middle = (low + high) // 2
        if judge(points[middle].assignment) <= max_drop:
            high = middle
        else:
            low = middle + 1
    return high


def refined(
    problem: Problem, points: Sequence[Point], index: int, allows: Callable[[Assignment], bool],
    steps: int = 3,
) -> tuple[list[Point], int]:  # fmt: skip
    """The points with those of the exact frontier that bisecting the gap before `index` finds, and
    the index of the fastest of them that is allowed: points[index] was, its predecessor was not.

    steps: solves at most.
    """
    found = list(points)
    for _ in range(steps if index else 0):
        fast, slow = found[index - 1], found[index]
        middle = within(problem, (fast.latency_s + slow.latency_s) / 2)
        solution = solve(middle)
        point = _point(solution)
        if not solution.choice or point.assignment in (fast.assignment, slow.assignment):
            break
        found.insert(index, point)
        if not allows(point.assignment):
            index += 1
    return found, index


def _point(solution: Solution) -> Point:
    """A solution as a point; without a choice, an empty one."""
    return Point(
        solution.choice, float(solution.objective or 0.0), float(solution.latency_s or 0.0),
        float(solution.nbytes or 0),
    )  # fmt: skip


def frontier_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """loss_per_s: what a second more buys from here to the next slower plan; None at the last."""
    rows = []
    for p, slower in zip(points, [*points[1:], None], strict=True):
        buys = None
        if slower is not None:
            buys = (p.loss - slower.loss) / (slower.latency_s - p.latency_s)
        rows.append({
            "loss": p.loss, "latency_s": p.latency_s, "nbytes": p.nbytes, "loss_per_s": buys,
            "assignment": p.assignment,
        })  # fmt: skip
    return rows


def loss_of(problem: Problem, assignment: Mapping[str, str]) -> dict[str, float]:
    """Each layer's loss under an assignment."""
    assert problem.loss is not None
    return {
        layer: float(problem.loss[i, problem.formats.index(assignment[layer])])
        for i, layer in enumerate(problem.layers)
    }
