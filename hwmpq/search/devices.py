"""One choice for several devices at once, each with its own latency table and budget."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hwmpq.errors import InputError
from hwmpq.search.check import check
from hwmpq.search.decisions import merge
from hwmpq.search.evaluate import QUANTITIES, answer, evaluate, table, within
from hwmpq.search.ilp import CUTS, Program
from hwmpq.types import BoolArray, FloatArray, Problem, Solution, Transition


@dataclass(frozen=True, eq=False)
class Device:
    """The part of a Problem that depends on the device; budget_s: the latency it must keep."""

    latency_s: FloatArray
    budget_s: float
    transitions: tuple[Transition, ...] = ()
    fixed_latency_s: float = 0.0
    legal: BoolArray | None = None


def together(problems: Mapping[str, Problem]) -> tuple[Problem, dict[str, Device]]:
    """Problems that differ only in their device, as one problem and its devices.

    Formats that one of them does not have are left out; of two limits on bytes, bit operations or
    loss the lower holds. Raises InputError where other things differ or a latency budget is absent.
    """
    first = next(iter(problems.values()))
    formats = tuple(f for f in first.formats if all(f in p.formats for p in problems.values()))
    for name, problem in problems.items():
        _comparable(name, problem, first, formats)
    budgets: dict[str, float] = {}
    for problem in problems.values():
        for name, limit in problem.budgets.items():
            budgets[name] = min(limit, budgets.get(name, limit))
    del budgets["latency_s"]
    shared = _of_formats(first, formats)
    devices = {}
    for name, problem in problems.items():
        own = _of_formats(problem, formats)
        assert own.latency_s is not None  # it has a budget
        devices[name] = Device(
            own.latency_s, problem.budgets["latency_s"], own.transitions, own.fixed_latency_s,
            own.legal,
        )  # fmt: skip
    alone = replace(
        shared, latency_s=None, transitions=(), fixed_latency_s=0.0, legal=None, budgets=budgets
    )
    return alone, devices


def _comparable(name: str, problem: Problem, first: Problem, formats: tuple[str, ...]) -> None:
    """Raises InputError where a problem is not of the same network and aim."""
    if "latency_s" not in problem.budgets:
        raise InputError(f"latency budget of {name}", None, "one in every problem file")
    if not formats:
        raise InputError("formats that all devices have", None, "at least one")
    same: dict[str, bool] = {
        "layers": problem.layers == first.layers,
        "ties": set(map(frozenset, problem.ties)) == set(map(frozenset, first.ties)),
        "minimize": problem.minimize == first.minimize,
    }
    ours, theirs = _of_formats(problem, formats), _of_formats(first, formats)
    for quantity in ("loss", "nbytes", "bops") if same["layers"] else ():
        one, other = table(ours, quantity), table(theirs, quantity)
        both = True
        if one is not None and other is not None:
            both = np.allclose(one, other, equal_nan=True, rtol=1e-9)
        same[quantity] = both and (one is None) == (other is None)
    for what, agrees in same.items():
        if not agrees:
            raise InputError(f"{what} of {name}", "another one", "the first problem's")


def _of_formats(problem: Problem, formats: tuple[str, ...]) -> Problem:
    """The problem with these formats alone, in this order, without pairs."""
    at = [problem.formats.index(name) for name in formats]
    tables: dict[str, Any] = {
        name: None if (cells := getattr(problem, name)) is None else np.asarray(cells)[:, at]
        for name in (*QUANTITIES, "legal")
    }
    moves = tuple(
        replace(move, latency_s=np.asarray(move.latency_s)[np.ix_(at, at)])
        for move in problem.transitions
    )
    return replace(problem, formats=formats, transitions=moves, pair_loss=None, **tables)


def solve_devices(
    problem: Problem, devices: Mapping[str, Device], time_limit_s: float = 60.0, seed: int = 0
) -> tuple[Solution, dict[str, float]]:
    """The least `problem.minimize` within its budgets and every device's latency budget, proven.

    problem: without latency. Returns the solution, its latency_s that of the slowest device, and
    the seconds on each device. Raises InputError for a latency in the problem or no devices.
    """
    start = time.perf_counter()
    if problem.latency_s is not None or problem.minimize == "latency_s" or not devices:
        raise InputError(
            "problem of several devices", f"{len(devices)} devices",
            "one or more, and no latency in the problem itself",
        )  # fmt: skip
    parts = [_on(problem, device) for device in devices.values()]
    for part in parts:
        check(part)
    merged = [merge(part) for part in parts]
    legal = np.logical_and.reduce([decisions.legal for decisions in merged])
    merged = [decisions.restricted(legal) for decisions in merged]
    if not legal.any(1).all():
        return Solution("infeasible", {}, seconds=time.perf_counter() - start), {}
    program = Program(parts[0], merged[0])
    for part, decisions in zip(parts[1:], merged[1:], strict=True):
        program.also(decisions, part.budgets["latency_s"])
    outcome = "stopped"
    bound = -math.inf
    for _ in range(CUTS):
        left = start + time_limit_s - time.perf_counter()
        if left <= 0:
            break
        outcome, index, lower = program.run(left, seed)
        bound = max(bound, lower)
        if index is None:
            break
        layers = merged[0].expand(index)
        if all(within(part, evaluate(part, layers)) for part in parts):
            status: Any = "optimal" if outcome == "optimal" else "feasible"
            found = answer(parts[0], layers, status, time.perf_counter() - start, bound)
            seconds = {
                name: float(evaluate(part, layers).of("latency_s"))
                for name, part in zip(devices, parts, strict=True)
            }
            return replace(found, latency_s=max(seconds.values())), seconds
        program.cut(index)
    seconds_taken = time.perf_counter() - start
    if outcome == "infeasible":
        return Solution("infeasible", {}, seconds=seconds_taken), {}
    known = bound if math.isfinite(bound) else None
    return Solution("timeout", {}, bound=known, seconds=seconds_taken), {}


def _on(problem: Problem, device: Device) -> Problem:
    """The problem as one device sees it."""
    legal = problem.legal
    if device.legal is not None:
        legal = device.legal if legal is None else np.asarray(legal, bool) & device.legal
    return replace(
        problem, latency_s=device.latency_s, transitions=device.transitions, legal=legal,
        fixed_latency_s=device.fixed_latency_s, pair_loss=None,
        budgets={**problem.budgets, "latency_s": device.budget_s},
    )  # fmt: skip
