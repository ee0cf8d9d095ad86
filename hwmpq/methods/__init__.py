"""Methods: the named ways from facts to a plan, each a short composition of parts; one per file.

A method file states one constant, `METHOD`; its name is the file's, with '-' for '_'. Other
packages add some by the entry-point group `hwmpq.methods`.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points

from hwmpq.errors import InputError, UnknownName
from hwmpq.methods.study import Chosen, Method, Study
from hwmpq.stages.job import Options
from hwmpq.types import Problem


@cache
def _registry() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for item in pkgutil.iter_modules(__path__):
        method = getattr(importlib.import_module(f"{__name__}.{item.name}"), "METHOD", None)
        if method is not None:
            found[item.name.replace("_", "-")] = method
    for entry in entry_points(group="hwmpq.methods"):
        if entry.name in found:
            raise InputError("two methods have one name", entry.name, next="Uninstall one of them.")
        found[entry.name] = entry.load()
    return found


def names() -> tuple[str, ...]:
    """The names of all methods, sorted."""
    return tuple(sorted(_registry()))


def named(name: str) -> Method:
    """Raises UnknownName."""
    if name not in _registry():
        raise UnknownName("method", name, names())
    return _registry()[name]


def settle(options: Options) -> Options:
    """The options with the method's own estimator and solver where the user named none.

    Raises UnknownName for an unknown method, InputError for an estimator that is not its own, and
    for training asked of a method that does not train, or asked wrongly.
    """
    method = named(options.method)
    if method.trained:
        method.trained(options)
    elif options.train_data or options.train or options.train_out:
        raise InputError(
            f"--train, --train-data or --train-out of the method {options.method}", None,
            [name for name in names() if named(name).trained], "Give such a --method.",
        )  # fmt: skip
    if method.estimators and options.sensitivity not in (None, *method.estimators):
        raise InputError(
            f"sensitivity estimator of the method {options.method}", options.sensitivity,
            method.estimators, "The method auto takes any.",
        )  # fmt: skip
    own = method.estimators[0] if method.estimators else None
    return replace(
        options, sensitivity=options.sensitivity or own, search=options.search or method.solver
    )


def choose(study: Study, problem: Problem) -> Chosen:
    """The plan of least loss within the problem's budgets, by the job's method.

    Raises InfeasibleError naming the best possible plans.
    """
    return named(study.job.options.method).choose(study, problem)
