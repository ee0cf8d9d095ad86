"""`output-error`: the squared error of the network's outputs with only one layer in a format.

Normalised: Σ (quantized − float)² / Σ float², over all samples, outputs and elements, which is the
inverse of the signal-to-noise ratio. Needs no labels. Runs like `measured`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwmpq.sensitivity.rerun import Outputs, Runs
from hwmpq.sensitivity.task import Task
from hwmpq.types import Sensitivity

LOSSES = ()


def ESTIMATOR(task: Task) -> Sensitivity:
    """Relative squared output error per cell, ≥ 0."""
    runs = Runs(task)
    reference = _flat(runs.reference)
    power = float(reference.square().sum(1).mean()) or 1.0

    def noise(outputs: Outputs) -> Tensor:
        return (_flat(outputs) - reference).square().sum(1) / power

    found = runs.estimates(task.singles(), noise)
    return task.result(found, "output-error", "relative-squared-error", runs.tally)


def _flat(outputs: Outputs) -> Tensor:
    """All outputs side by side, fp64 [N, elements]."""
    return torch.cat([torch.cat([y.double().flatten(1) for y in batch], 1) for batch in outputs])
