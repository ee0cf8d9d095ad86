"""`measured`: the loss with only one layer in a format, minus the fp32 loss.

Cross entropy with labels; without, the Kullback-Leibler divergence KL(float ‖ quantized) of the
first output's softmax, whose fp32 value is 0. Means over samples, in fp64. Runs the exact simulator
once per cell, from the changed layer on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from hwmpq.sensitivity.rerun import fp32_outputs, outputs_per_cell, work_per_cell
from hwmpq.sensitivity.task import Cell, Task
from hwmpq.types import Sensitivity


def losses(outputs: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
    """The loss of each sample, fp64 [N]. outputs, reference: logits [N, classes]."""
    scores = outputs.double().flatten(1).log_softmax(1)
    if labels is not None:
        return F.nll_loss(scores, labels, reduction="none")
    truth = reference.double().flatten(1).log_softmax(1)
    return (truth.exp() * (truth - scores)).sum(1)


def ESTIMATOR(task: Task) -> Sensitivity:
    """ΔL per cell; may be negative where rounding happens to help."""
    reference = [outputs[0] for outputs in fp32_outputs(task)]

    def mean_loss(outputs: list[Tensor]) -> float:
        total = 0.0
        for y, ref, (_, labels) in zip(outputs, reference, task.batches(), strict=True):
            total += float(losses(y, ref, labels).sum())
        return total / task.samples

    base = mean_loss(reference)

    def cells() -> Iterator[tuple[Cell, float]]:
        for cell, outputs in outputs_per_cell(task):
            yield cell, mean_loss([y[0] for y in outputs]) - base

    metric = "kl" if task.labels is None else "cross-entropy"
    return task.result(task.table(cells(), work_per_cell(task)), "measured", metric)
