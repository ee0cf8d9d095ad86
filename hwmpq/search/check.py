"""Is a Problem consistent? Every refusal says what, got, allowed and the next step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from hwmpq.errors import InputError
from hwmpq.search.evaluate import QUANTITIES, table
from hwmpq.types import Problem


def check(problem: Problem) -> None:
    """Raise InputError for wrong shapes, unknown or repeated names, and missing quantities.

    Non-finite cells are no error here: they are illegal (a cell nobody estimated or measured).
    """
    _names("layers", problem.layers)
    _names("formats", problem.formats)
    count, width = len(problem.layers), len(problem.formats)
    for name in (*QUANTITIES, "legal"):
        _shape(name, getattr(problem, name), (count, width))
    _pairs(problem.pair_loss, count * width)
    for move in problem.transitions:
        what = f"transition {move.source!r} -> {move.target!r}"
        _known(what, (move.source, move.target), problem.layers)
        _shape(what, move.latency_s, (width, width))
    for group in problem.ties:
        _known("ties", group, problem.layers)
    if not math.isfinite(problem.fixed_latency_s):
        raise InputError("fixed_latency_s", problem.fixed_latency_s, "a finite number")
    if problem.latency_s is None and (problem.transitions or problem.fixed_latency_s):
        raise InputError(
            "transitions or fixed_latency_s without latency_s",
            next="Give latency_s, or leave both out.",
        )
    _goal(problem)


def _goal(problem: Problem) -> None:
    """The minimised and the budgeted quantities exist; budgets are finite."""
    if problem.minimize not in QUANTITIES:
        raise InputError("minimize", repr(problem.minimize), QUANTITIES)
    pairs = problem.minimize == "loss" and problem.pair_loss is not None
    if table(problem, problem.minimize) is None and not pairs:
        raise InputError(
            f"the minimised quantity {problem.minimize} is absent",
            next=f"Give {problem.minimize} or minimise another quantity.",
        )
    for name, limit in problem.budgets.items():
        if name not in QUANTITIES:
            raise InputError("budget", repr(name), QUANTITIES)
        if not math.isfinite(limit):
            raise InputError(f"budget {name}", limit, "a finite number", "Leave it out: no limit.")
        if table(problem, name) is None:
            raise InputError(
                f"the budgeted quantity {name} is absent",
                next=f"Give {name} or drop its budget.",
            )


def _names(what: str, names: tuple[str, ...]) -> None:
    if not names:
        raise InputError(f"{what} is empty", allowed="at least one name")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{what} has a name twice", ", ".join(twice), "distinct names")


def _known(what: str, names: Iterable[str], layers: tuple[str, ...]) -> None:
    known = set(layers)
    for name in names:
        if name not in known:
            raise InputError(f"{what} names an unknown layer", repr(name), "a name out of layers")


def _shape(what: str, values: Any, shape: tuple[int, ...]) -> None:
    if values is not None and np.shape(values) != shape:
        raise InputError(f"shape of {what}", list(np.shape(values)), str(list(shape)))


def _pairs(matrix: Any, size: int) -> None:
    if matrix is None:
        return
    _shape("pair_loss", matrix, (size, size))
    values = np.asarray(matrix)
    if not np.isfinite(values).all():
        raise InputError("pair_loss has a non-finite value", allowed="finite numbers")
    skew = float(np.abs(values - values.T).max())
    if skew > 1e-6 * float(np.abs(values).max()):
        raise InputError(
            "pair_loss is not symmetric", f"|C - Cᵀ| up to {skew:.3g}", next="Give (C + Cᵀ) / 2."
        )
