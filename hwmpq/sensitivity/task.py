"""What an estimator is given, and the order in which the cells of its table are filled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hwmpq.graph import Graph
from hwmpq.quantizers import Quantizers
from hwmpq.types import BoolArray, FloatArray, Sensitivity

#: Called with (cells done, cells in all, expected seconds left).
Progress = Callable[[int, int, float], None]
#: Called with a finished cell: ("layer|format", value).
Save = Callable[[str, float], None]
#: A cell: layer number, format number.
Cell = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Task:
    """The arguments of `estimate`, completed and checked. inputs: by name, samples first."""

    graph: Graph
    quantizers: Quantizers
    inputs: Mapping[str, Tensor]
    labels: Tensor | None
    layers: tuple[str, ...]
    formats: tuple[str, ...]
    legal: BoolArray
    progress: Progress | None
    done: Mapping[str, float]
    save: Save | None
    batch: int
    seed: int

    @property
    def samples(self) -> int:
        return int(next(iter(self.inputs.values())).shape[0])

    def batches(self) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """(inputs, labels) of `batch` samples at a time."""
        for start in range(0, self.samples, self.batch):
            part = slice(start, start + self.batch)
            labels = None if self.labels is None else self.labels[part]
            yield {name: x[part] for name, x in self.inputs.items()}, labels

    def only(self, cell: Cell) -> dict[str, str]:
        """The assignment with one layer in its format and all else fp32."""
        everywhere = dict.fromkeys((node.name for node in self.graph.layers), "fp32")
        return {**everywhere, self.layers[cell[0]]: self.formats[cell[1]]}

    def open_cells(self) -> list[Cell]:
        """Cells that are legal, not fp32 and not done yet."""
        return [
            (i, j)
            for i, layer in enumerate(self.layers)
            for j, fmt in enumerate(self.formats)
            if self.legal[i, j] and fmt != "fp32" and f"{layer}|{fmt}" not in self.done
        ]

    def table(
        self, cells: Iterator[tuple[Cell, float]], work: Mapping[Cell, float] | None = None
    ) -> FloatArray:
        """loss[L, F] from the cells known and those still computed, saving each at once.

        work: relative cost per open cell, for the forecast; equal by default.
        """
        loss = np.full((len(self.layers), len(self.formats)), np.nan)
        for i, layer in enumerate(self.layers):
            for j, fmt in enumerate(self.formats):
                if self.legal[i, j]:
                    loss[i, j] = 0.0 if fmt == "fp32" else self.done.get(f"{layer}|{fmt}", np.nan)
        cost = dict(work or dict.fromkeys(self.open_cells(), 1.0))
        start, spent, total = time.monotonic(), 0.0, sum(cost.values())
        for count, (cell, value) in enumerate(cells, 1):
            loss[cell] = value
            if self.save:
                self.save(f"{self.layers[cell[0]]}|{self.formats[cell[1]]}", value)
            spent += cost[cell]
            if self.progress:
                left = (time.monotonic() - start) / spent * max(total - spent, 0.0)
                self.progress(count, len(cost), left)
        return loss

    def result(self, loss: FloatArray, estimator: str, metric: str) -> Sensitivity:
        return Sensitivity(self.layers, self.formats, loss, estimator, self.samples, metric)
