"""Sensitivity estimators: how much the loss grows per layer and format; one per file.

An estimator file states one constant, `ESTIMATOR`: a function (Task) -> Sensitivity. Its name is
the file's, with '-' for '_'. Other packages add some by the entry-point group `hwmpq.sensitivity`.
The file may also state `GRADIENTS = True` where it differentiates the loss, `PAIRS = True` where it
gives terms of pairs, and in `LOSSES` the names of all losses that it can take: () where it looks at
none.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import entry_points

import numpy as np
from torch import Tensor

from hwmpq.errors import InputError, UnknownName
from hwmpq.executor import Pool
from hwmpq.graph import Graph
from hwmpq.quantize.feed import Inputs, good_batch, named, samples
from hwmpq.quantize.scores import LOSSES, Score, default_loss, find_score
from hwmpq.quantizers import Quantizers
from hwmpq.sensitivity.task import Done, Forecast, Progress, Save, Task
from hwmpq.types import BoolArray, Sensitivity

Estimator = Callable[[Task], Sensitivity]


@cache
def _registry() -> dict[str, Estimator]:
    found: dict[str, Estimator] = {}
    for item in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{item.name}")
        if hasattr(module, "ESTIMATOR"):
            found[item.name.replace("_", "-")] = module.ESTIMATOR
    for entry in entry_points(group="hwmpq.sensitivity"):
        if entry.name in found:
            raise InputError(
                "two estimators have one name", entry.name, next="Uninstall one of them."
            )
        found[entry.name] = entry.load()
    return found


def names() -> tuple[str, ...]:
    """The names of all estimators, sorted."""
    return tuple(sorted(_registry()))


def needs_gradients(name: str) -> bool:
    """Whether an estimator differentiates the loss. Raises UnknownName."""
    return bool(getattr(_module(name), "GRADIENTS", False))


def has_pairs(name: str) -> bool:
    """Whether an estimator gives the terms of pairs, too. Raises UnknownName."""
    return bool(getattr(_module(name), "PAIRS", False))


def check_loss(name: str, loss: str) -> None:
    """Raises InputError where the estimator cannot take that loss, UnknownName."""
    able: tuple[str, ...] | None = getattr(_module(name), "LOSSES", None)
    if able is not None and loss not in able:
        others = [other for other in names() if getattr(_module(other), "LOSSES", None) is None]
        raise InputError(
            f"loss of the estimator {name}", loss, able or "none: it does not look at a loss",
            f"Estimators for any loss: {', '.join(others)}.",
        )  # fmt: skip


def _module(name: str) -> object:
    if name not in _registry():
        raise UnknownName("sensitivity estimator", name, names())
    return sys.modules[_registry()[name].__module__]


def estimate(
    name: str,
    graph: Graph,
    quantizers: Quantizers,
    inputs: Inputs,
    labels: Tensor | None = None,
    *,
    loss: str | Score = "",
    formats: Sequence[str],
    layers: Sequence[str] | None = None,
    legal: BoolArray | None = None,
    progress: Progress | None = None,
    done: Done | None = None,
    save: Save | None = None,
    forecast: Callable[[Forecast], None] | None = None,
    batch: int | None = None,
    seed: int = 0,
    pool: Pool | None = None,
) -> Sensitivity:
    """loss[l, f] by the estimator `name`; fp32 is exactly 0, an illegal cell is nan.

    inputs: calibration samples, on the device that is to compute; labels: their classes, or None.
    loss: by default cross entropy with labels and the distance to the float logits without; for an
    estimator that looks at no loss it must not be given. layers: all by default. legal: [L, F].
    save: called with the name of each finished item and what to keep of it, and done: what an
    earlier run with the same arguments gave `save` under a name, or None; a name that starts with
    `task.SHARED` means the same to every estimator, loss, labels and seed. forecast: called before
    the work starts; progress: with (items done, items, expected seconds left). batch: samples that
    run at once, by default what runs fastest. pool: workers that share the forward
    runs of variants; gradients are computed here. Same arguments, same result, however often it
    was interrupted and whoever ran.

    Raises UnknownName for an unknown estimator, loss or layer, InputError for shapes that do not
    fit and for a loss that the estimator cannot take.
    """
    if name not in _registry():
        raise UnknownName("sensitivity estimator", name, names())
    if isinstance(loss, str):
        score = find_score("loss", loss, LOSSES) if loss else default_loss(labels)
    else:
        score = loss
    if loss:
        check_loss(name, score.name)
    known = [node.name for node in graph.layers]
    layers = tuple(known if layers is None else layers)
    for layer in layers:
        if layer not in known:
            raise UnknownName("layer", layer, known)
    shape = (len(layers), len(formats))
    if legal is not None and legal.shape != shape:
        raise InputError("shape of legal", legal.shape, str(shape))
    if labels is not None and len(labels) != samples(inputs):
        raise InputError("labels", len(labels), f"{samples(inputs)}, one per sample")
    task = Task(
        graph=graph,
        quantizers=quantizers,
        inputs=named(graph, inputs),
        labels=labels,
        layers=layers,
        formats=tuple(formats),
        legal=np.ones(shape, bool) if legal is None else legal,
        progress=progress,
        done=done or (lambda item: None),
        save=save,
        forecast=forecast,
        batch=batch or good_batch(graph),
        seed=seed,
        loss=score,
        pool=pool,
    )
    return _registry()[name](task)
