"""Sensitivity estimators: how much the loss grows per layer and format; one per file.

An estimator file states one constant, `ESTIMATOR`: a function (Task) -> Sensitivity. Its name is
the file's, with '-' for '_'. Other packages add some by the entry-point group `hwmpq.sensitivity`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points

import numpy as np
from torch import Tensor

from hwmpq.errors import InputError, UnknownName
from hwmpq.graph import Graph
from hwmpq.quantize.feed import Inputs, good_batch, named, samples
from hwmpq.quantizers import Quantizers
from hwmpq.sensitivity.task import Progress, Save, Task
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


def estimate(
    name: str,
    graph: Graph,
    quantizers: Quantizers,
    inputs: Inputs,
    labels: Tensor | None = None,
    *,
    formats: Sequence[str],
    layers: Sequence[str] | None = None,
    legal: BoolArray | None = None,
    progress: Progress | None = None,
    done: Mapping[str, float] | None = None,
    save: Save | None = None,
    batch: int | None = None,
    seed: int = 0,
) -> Sensitivity:
    """loss[l, f] by the estimator `name`; fp32 is exactly 0, an illegal cell is nan.

    inputs: calibration samples; labels: their classes, or None for the distance to the float
    logits. layers: all by default. legal: [L, F]. done: cells known from an earlier run, and save:
    called with each new one, by the key "layer|format". progress: called with (cells done, cells,
    expected seconds left). batch: samples that run at once, by
    default what runs fastest. Same arguments, same result.

    Raises UnknownName for an unknown estimator or layer, InputError for shapes that do not fit.
    """
    if name not in _registry():
        raise UnknownName("sensitivity estimator", name, names())
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
        done=done or {},
        save=save,
        batch=batch or good_batch(graph),
        seed=seed,
    )
    return _registry()[name](task)
