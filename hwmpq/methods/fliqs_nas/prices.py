"""What every layer of a space costs in every format: a table, looked up while the search runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np

from hwmpq.formats import bops, format_named
from hwmpq.graph import network_of
from hwmpq.kernels import best
from hwmpq.methods.fliqs.space import IntArray
from hwmpq.methods.fliqs_nas.network import Architecture
from hwmpq.methods.fliqs_nas.space import ArchitectureSpace, graph_of
from hwmpq.predict import Predictor
from hwmpq.predict.model import Cell
from hwmpq.types import BoolArray, FloatArray, Layer, Problem, Workload

#: Workloads and formats -> predicted seconds [W, F]; inf where no kernel runs one in the other.
Seconds = Callable[[Sequence[Workload], Sequence[str]], FloatArray]


def foretold(predictor: Predictor, threads: int) -> Seconds:
    """What a cost model foretells for its target: upper quantiles, as for every search."""

    def seconds(workloads: Sequence[Workload], formats: Sequence[str]) -> FloatArray:
        found = np.full((len(workloads), len(formats)), np.inf)
        cells: dict[tuple[int, int], Cell] = {}
        for place in np.ndindex(*found.shape):
            workload, fmt = workloads[place[0]], format_named(formats[place[1]])
            kernel = best(workload, fmt, predictor.target.features)
            if kernel is not None:
                cells[place] = workload, fmt, kernel, threads
        for place, value in zip(cells, predictor.upper(list(cells.values())), strict=True):
            found[place] = value
        return found

    return seconds


class Prices:
    """seconds: None where no budget asks for latencies. A plan costs the sum of its layers, as a
    `Problem` without transitions has it."""

    def __init__(self, space: ArchitectureSpace, formats: Sequence[str], seconds: Seconds | None):
        self.space, self.formats = space, tuple(formats)
        self._slots = [node.name for node in graph_of(space.largest, space.image[1:]).layers]
        layers: dict[Workload, Layer] = {}
        rows: dict[Workload, int] = {}
        self._row: dict[tuple[str, tuple[int, ...]], int] = {}
        for picks in space.cover():
            architecture = space.architecture(picks)
            where = _contexts(architecture)
            for layer in network_of(graph_of(architecture, space.image[1:])).layers:
                row = rows.setdefault(layer.workload, len(rows))
                layers[layer.workload] = layer
                self._row[layer.name, where[layer.name]] = row
        self._tables = {
            "nbytes": _table(layers.values(), formats, _nbytes),
            "bops": _table(layers.values(), formats, _bops),
        }
        if seconds is not None:
            self._tables["latency_s"] = seconds(list(layers), self.formats)
        self._layers = lru_cache(maxsize=4096)(self._layers_of)

    @property
    def slots(self) -> list[str]:
        """The layers of the largest architecture."""
        return self._slots

    @property
    def known(self) -> BoolArray:
        """[slots, formats]: has the layer a latency in every architecture, if latencies count?"""
        found = np.ones((len(self._slots), len(self.formats)), bool)
        if "latency_s" in self._tables:
            for (name, _), row in self._row.items():
                found[self._slots.index(name)] &= np.isfinite(self._tables["latency_s"][row])
        return found

    def costs(self, quantity: str, picks: IntArray, formats: IntArray) -> FloatArray:
        """[N] sums. picks: [N, rows of the space]; formats: [N, slots], of absent layers too."""
        row = np.array([self._layers(tuple(own)) for own in picks.tolist()])
        cells = self._tables[quantity][row, formats]
        return np.asarray(np.where(row < 0, 0.0, cells).sum(1))

    def problem(self, picks: IntArray) -> Problem:
        """Of one architecture's formats."""
        row = np.array(self._layers(tuple(picks.tolist())))
        names = tuple(name for name, r in zip(self._slots, row, strict=True) if r >= 0)
        # Solvers want numbers, also of cells that are not legal.
        tables = {
            quantity: np.where(np.isfinite(cells), cells, 1.0)[row[row >= 0]]
            for quantity, cells in self._tables.items()
        }
        return Problem(
            names, self.formats, latency_s=tables.get("latency_s"), nbytes=tables["nbytes"],
            bops=tables["bops"],
        )  # fmt: skip

    def _layers_of(self, picks: tuple[int, ...]) -> tuple[int, ...]:
        """Of each slot its row in the tables, -1 where the architecture does not have it."""
        where = _contexts(self.space.architecture(np.array(picks, np.intp)))
        return tuple(self._row[name, where[name]] if name in where else -1 for name in self._slots)


def _contexts(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Layer -> all that its workload depends on."""
    before = architecture.stem[0]
    found: dict[str, tuple[int, ...]] = {"stem.conv": ()}
    for s, stage in enumerate(architecture.stages):
        own = before, stage.channels, stage.kernel, stage.expansion
        for b in range(stage.blocks):
            for part in ("expand", "depthwise", "project"):
                found[f"stages.{s}.{b}.{part}.conv"] = own
        before = stage.channels
    return found | {"last.conv": (before,), "fc": ()}


def _nbytes(layer: Layer, name: str) -> float:
    return format_named(name).nbytes(layer.workload.weight_shape, layer.bias)


def _bops(layer: Layer, name: str) -> float:
    return bops(format_named(name), layer.workload.macs)


def _table(
    layers: Iterable[Layer], formats: Sequence[str], cost: Callable[[Layer, str], float]
) -> FloatArray:
    return np.array([[cost(layer, name) for name in formats] for layer in layers])
