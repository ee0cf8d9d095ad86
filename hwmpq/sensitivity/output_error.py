"""`output-error`: the squared error of the network's outputs with only one layer in a format.

Normalised: Σ (quantized − float)² / Σ float², over all samples, outputs and elements, which is the
inverse of the signal-to-noise ratio. Needs no labels. Runs like `measured`.
"""

from __future__ import annotations

from collections.abc import Iterator

from hwmpq.sensitivity.rerun import fp32_outputs, outputs_per_cell, work_per_cell
from hwmpq.sensitivity.task import Cell, Task
from hwmpq.types import Sensitivity


def ESTIMATOR(task: Task) -> Sensitivity:
    """Relative squared output error per cell, ≥ 0."""
    reference = [y.double() for outputs in fp32_outputs(task) for y in outputs]
    signal = sum(float(y.square().sum()) for y in reference) or 1.0

    def cells() -> Iterator[tuple[Cell, float]]:
        for cell, found in outputs_per_cell(task):
            outputs = [y for batch in found for y in batch]
            noise = sum(
                float((y - ref).square().sum()) for y, ref in zip(outputs, reference, strict=True)
            )
            yield cell, noise / signal

    return task.result(
        task.table(cells(), work_per_cell(task)), "output-error", "relative-squared-error"
    )
