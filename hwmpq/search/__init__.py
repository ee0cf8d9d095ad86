"""Solvers: a Problem goes in, a Solution comes out; one solver per file of this folder.

A solver file states one constant, `SOLVER`: a function (problem, time_limit_s, seed) -> Solution.
Its name is the file's. Other packages add solvers by the entry-point group `hwmpq.solvers`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points

from hwmpq.errors import InputError, UnknownName
from hwmpq.search.check import check
from hwmpq.types import Problem, Solution

Solver = Callable[[Problem, float, int], Solution]


@cache
def _registry() -> dict[str, Solver]:
    found: dict[str, Solver] = {}
    for item in pkgutil.iter_modules(__path__):
        solver = getattr(importlib.import_module(f"{__name__}.{item.name}"), "SOLVER", None)
        if solver is not None:
            found[item.name] = solver
    for entry in entry_points(group="hwmpq.solvers"):
        if entry.name in found:
            raise InputError("two solvers have one name", entry.name, next="Uninstall one of them.")
        found[entry.name] = entry.load()
    return found


def names() -> tuple[str, ...]:
    """The names of all solvers, sorted."""
    return tuple(sorted(_registry()))


def solve(
    problem: Problem, solver: str = "ilp", time_limit_s: float = 60.0, seed: int = 0
) -> Solution:
    """Choose one format per layer: the least `problem.minimize` within `problem.budgets`.

    time_limit_s: wall seconds. Raises UnknownName for an unknown solver and InputError for a
    problem that contradicts itself.
    """
    if solver not in _registry():
        raise UnknownName("solver", solver, names())
    if not time_limit_s > 0:
        raise InputError("time limit", time_limit_s, "a number of seconds > 0")
    check(problem)
    return _registry()[solver](problem, time_limit_s, seed)
