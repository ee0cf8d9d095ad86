"""`clado-gn`: pair terms in Gauss-Newton form, from runs with a single layer in a format.

With Δz the change of the first output when only cell i is quantized, and p its fp32 softmax:
C_ij = mean over samples of Δz_iᵀ (diag(p) − p pᵀ) Δz_j, the second order of cross entropy and of
KL(float ‖ quantized) in the logits. Positive semidefinite by construction, the terms between
options of one layer included. What it leaves out: the gradient of the mean loss (0 at an optimum),
higher orders, and that one layer's error changes how another's spreads.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hwmpq.sensitivity.rerun import Outputs, Runs
from hwmpq.sensitivity.task import GROUPS, Cells, Estimate, Task
from hwmpq.types import FloatArray, Sensitivity

PAIRS = True
LOSSES = ("cross-entropy", "kl")


def ESTIMATOR(task: Task) -> Sensitivity:
    """½ C_ii per cell, ≥ 0, and the terms of all pairs of cells."""
    runs, singles = Runs(task), task.singles()
    logits = _logits(runs.reference)
    p = logits.softmax(1)

    def change(outputs: Outputs) -> Tensor:
        """√p ∘ (Δz − pᵀΔz): its products over all samples are the terms."""
        moved = _logits(outputs) - logits
        return (p.sqrt() * (moved - (p * moved).sum(1, keepdim=True))).float().cpu()

    changes = {cells: change(runs.load(cells)) for cells in runs.saved(singles)}
    fresh = task.open(changes)
    schedule = runs.schedule(cells for cells in singles if cells not in changes)
    runs.announce(schedule)

    def found() -> Iterator[tuple[Cells, Estimate]]:
        for cells in fresh:
            yield cells, _alone(changes[cells])
        for cells, outputs in runs.outputs(schedule):
            changes[cells] = change(outputs)
            yield cells, _alone(changes[cells])

    work = dict.fromkeys(fresh, 1.0) | runs.work(schedule)
    known = task.fill(singles, found(), work)
    terms = _terms(task, {cells: changes[cells] for cells in singles})
    return task.result(known, "clado-gn", task.loss.name, runs.tally, terms)


def _logits(outputs: Outputs) -> Tensor:
    return torch.cat([batch[0] for batch in outputs]).double().flatten(1)


def _alone(change: Tensor) -> Estimate:
    return Estimate.of(change.double().square().sum(1) / 2)


def _terms(task: Task, changes: dict[Cells, Tensor]) -> tuple[FloatArray, FloatArray]:
    """The matrix C and its standard errors, [(L·F), (L·F)], group by group of the samples."""
    width = len(task.formats)
    size = len(task.layers) * width
    total, error = np.zeros((2, size, size))
    rows = [i * width + j for ((i, j),) in changes]
    if not rows:
        return total, error
    groups = min(GROUPS, task.samples)
    parts = zip(*(torch.tensor_split(change, groups) for change in changes.values()), strict=True)
    means, weights = [], []
    for part in parts:
        flat = torch.stack(part).double().flatten(1)
        means.append((flat @ flat.T).numpy() / len(part[0]))
        weights.append(len(part[0]) / task.samples)
    at = np.ix_(rows, rows)
    mean = np.tensordot(weights, np.stack(means), 1)
    total[at] = (mean + mean.T) / 2
    error[at] = np.std(means, axis=0, ddof=1) / groups**0.5 if groups > 1 else np.nan
    return total, error
