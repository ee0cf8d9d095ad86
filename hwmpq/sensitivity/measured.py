"""`measured`: the loss with only one layer in a format, minus the fp32 loss.

The loss is the task's (see `quantize.scores`): by default cross entropy with labels; without, the
Kullback-Leibler divergence KL(float ‖ quantized), whose fp32 value is 0. Means over samples, in
fp64. Runs the simulator once per cell, from the changed layer on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hwmpq.quantize.scores import Batch
from hwmpq.sensitivity.rerun import Outputs, Runs
from hwmpq.sensitivity.task import Task
from hwmpq.types import Sensitivity


def loss_increase(task: Task, reference: Outputs) -> Callable[[Outputs], Tensor]:
    """Outputs -> loss minus fp32 loss of each sample, fp64 [N]."""
    batch = Batch(_first(reference), task.labels)
    base = task.loss(batch.reference, batch)
    return lambda outputs: task.loss(_first(outputs), batch) - base


def _first(outputs: Outputs) -> Tensor:
    return torch.cat([batch[0] for batch in outputs])


def ESTIMATOR(task: Task) -> Sensitivity:
    """ΔL per cell; may be negative where rounding happens to help."""
    runs = Runs(task)
    found = runs.estimates(task.singles(), loss_increase(task, runs.reference))
    return task.result(found, "measured", task.loss.name, runs.tally)
