"""What an estimator is given, and what it finds: estimates with standard errors, item by item."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hwmpq.executor import Pool
from hwmpq.graph import Graph
from hwmpq.quantize.interpret import Constants
from hwmpq.quantize.scores import Score
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers
from hwmpq.types import BoolArray, FloatArray, Sensitivity

#: What is kept of an item: numbers, or the bytes of an array.
Kept = Sequence[float] | bytes
#: Called with (items done, items in all, expected seconds left).
Progress = Callable[[int, int, float], None]
#: Called with a finished item: (its name, what to keep of it).
Save = Callable[[str, Kept], None]
#: An item's name -> what an earlier run saved of it, or None.
Done = Callable[[str], Kept | None]
#: A cell: layer number, format number.
Cell = tuple[int, int]
#: Cells of different layers that are quantized together: none (fp32), one, or a pair in order.
Cells = tuple[Cell, ...]
#: So begin the names of items that are the same for every estimator, loss, labels and seed.
SHARED = "outputs|"
#: Standard errors are taken over so many groups of calibration samples.
GROUPS = 8


@dataclass(frozen=True)
class Forecast:
    """What an estimator is about to do. layer_runs: layers run, each over all samples, where a
    backward pass counts as two; without_reuse: what it were if every run began at the input."""

    layer_runs: int
    without_reuse: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """A mean over the calibration samples, its standard error (nan: unknown), and the means of its
    groups of samples, by which estimates are paired."""

    value: float
    error: float = math.nan
    groups: tuple[float, ...] = ()

    @staticmethod
    def of(samples: Tensor) -> Estimate:
        """From one value per sample, [N]; the groups follow each other."""
        values = samples.double().cpu().numpy()
        parts = np.array_split(values, min(GROUPS, len(values)))
        return Estimate.grouped(float(values.mean()), [float(part.mean()) for part in parts])

    @staticmethod
    def grouped(value: float, groups: Sequence[float]) -> Estimate:
        """groups: independent estimates of the same, of (nearly) equal weight."""
        many = len(groups) > 1
        error = float(np.std(groups, ddof=1)) / math.sqrt(len(groups)) if many else math.nan
        return Estimate(value, error, tuple(groups))

    @staticmethod
    def over_probes(values: FloatArray) -> Estimate:
        """From independent estimates of the same on all samples, [P]."""
        grouped = Estimate.grouped(float(values.mean()), values.tolist())
        return Estimate(grouped.value, grouped.error)

    @staticmethod
    def from_kept(kept: Kept) -> Estimate:
        """The inverse of `kept`."""
        value, error, *groups = (float(x) for x in kept)
        return Estimate(value, error, tuple(groups))

    def kept(self) -> list[float]:
        return [self.value, self.error, *self.groups]


@dataclass(frozen=True, eq=False)
class Task:
    """The arguments of `estimate`, completed and checked. inputs: by name, samples first; pool: the
    workers that do the items; None: this process does."""

    graph: Graph
    quantizers: Quantizers
    inputs: Mapping[str, Tensor]
    labels: Tensor | None
    layers: tuple[str, ...]
    formats: tuple[str, ...]
    legal: BoolArray
    progress: Progress | None
    done: Done
    save: Save | None
    forecast: Callable[[Forecast], None] | None
    batch: int
    seed: int
    loss: Score
    pool: Pool | None = None

    @property
    def samples(self) -> int:
        return int(next(iter(self.inputs.values())).shape[0])

    @property
    def device(self) -> torch.device:
        return next(iter(self.inputs.values())).device

    @cached_property
    def constants(self) -> Constants:
        """The graph's constants on the samples' device."""
        return Constants(self.graph, self.device)

    def batches(self) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """(inputs, labels) of `batch` samples at a time."""
        for start in range(0, self.samples, self.batch):
            part = slice(start, start + self.batch)
            labels = None if self.labels is None else self.labels[part]
            yield {name: x[part] for name, x in self.inputs.items()}, labels

    def assignment(self, cells: Cells) -> dict[str, str]:
        """These cells' layers in their formats and all else fp32."""
        everywhere = dict.fromkeys((node.name for node in self.graph.layers), "fp32")
        return everywhere | {self.layers[i]: self.formats[j] for i, j in cells}

    def simulator(self, cells: Cells) -> Simulator:
        """Runs `assignment(cells)`: exactly on the CPU, in mode 'fast' on another device."""
        assignment = self.assignment(cells)
        if self.device.type == "cpu":
            return Simulator(self.graph, assignment, self.quantizers)
        return Simulator(self.graph, assignment, self.quantizers, "fast", device=self.device)

    def singles(self) -> list[Cells]:
        """Every cell that is legal and not fp32, alone."""
        return [
            ((i, j),)
            for i in range(len(self.layers))
            for j, fmt in enumerate(self.formats)
            if self.legal[i, j] and fmt != "fp32"
        ]

    def item(self, cells: Cells) -> str:
        """The name under which the estimate of these cells is saved."""
        return "|".join(f"{self.layers[i]}|{self.formats[j]}" for i, j in cells)

    def outputs_item(self, cells: Cells) -> str:
        """The name under which the outputs with these cells quantized are saved."""
        return SHARED + self.item(cells)

    def open(self, wanted: Iterable[Cells]) -> list[Cells]:
        """Those without a saved estimate."""
        return [cells for cells in wanted if self.done(self.item(cells)) is None]

    def keep(self, item: str, value: Kept) -> None:
        if self.save:
            self.save(item, value)

    def fill(
        self,
        wanted: Sequence[Cells],
        found: Iterator[tuple[Cells, Estimate]],
        work: Mapping[Cells, float],
        ahead: int = 0,
    ) -> dict[Cells, Estimate]:
        """Estimates of all `wanted`: those saved, and those that `found` gives, saved at once.

        work: relative cost of each that `found` will give. ahead: items that were done before, for
        the progress.
        """
        saved = {cells: self.done(self.item(cells)) for cells in wanted if cells not in work}
        known = {cells: Estimate.from_kept(kept) for cells, kept in saved.items() if kept}
        start, spent, total = time.monotonic(), 0.0, sum(work.values())
        for count, (cells, estimate) in enumerate(found, ahead + 1):
            known[cells] = estimate
            self.keep(self.item(cells), estimate.kept())
            spent += work[cells]
            if self.progress:
                left = (time.monotonic() - start) / spent * max(total - spent, 0.0)
                self.progress(count, ahead + len(work), left)
        return known

    def result(
        self,
        found: Mapping[Cells, Estimate],
        estimator: str,
        metric: str,
        layer_runs: tuple[int, int] = (0, 0),
        pairs: tuple[FloatArray, FloatArray] | None = None,
    ) -> Sensitivity:
        """found: of the single cells. layer_runs: with and without reuse. pairs: terms, errors."""
        loss, error = np.full((2, len(self.layers), len(self.formats)), np.nan)
        for j, fmt in enumerate(self.formats):
            if fmt == "fp32":
                loss[self.legal[:, j], j] = error[self.legal[:, j], j] = 0.0
        for (cell,), estimate in ((c, e) for c, e in found.items() if len(c) == 1):
            loss[cell], error[cell] = estimate.value, estimate.error
        return Sensitivity(
            self.layers, self.formats, loss, estimator, self.samples, metric,
            pair_loss=None if pairs is None else pairs[0], loss_error=error,
            pair_error=None if pairs is None else pairs[1],
            layer_runs=layer_runs[0], layer_runs_without_reuse=layer_runs[1],
        )  # fmt: skip
