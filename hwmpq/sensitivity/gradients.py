"""What the estimators by gradients share: the loss to differentiate, the forecast of the cost."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from hwmpq.errors import InputError
from hwmpq.quantize.interpret import evaluate
from hwmpq.quantize.scores import Batch, Score
from hwmpq.sensitivity.task import Forecast, Task


def summed_loss(loss: Score, outputs: Tensor, labels: Tensor | None) -> Tensor:
    """The loss of a batch of fp32 outputs, to be differentiated.

    Raises InputError for a loss that is no function of the outputs by torch operations.
    """
    total = loss(outputs, Batch(outputs.detach(), labels)).sum()
    if not total.requires_grad:
        raise InputError(
            f"loss {loss.name} without a gradient", None, "torch operations on the outputs",
            "Or take an estimator without gradients: measured.",
        )  # fmt: skip
    return total


def announce(task: Task, layer_runs: int) -> None:
    """Tell the task's `forecast`: layer runs cost as one of the first batch, run forward."""
    if task.forecast is None:
        return
    inputs, _ = next(task.batches())
    start = time.monotonic()
    with torch.no_grad():
        evaluate(task.graph, inputs, constants=task.constants)
    share = len(next(iter(inputs.values()))) / task.samples * len(task.graph.layers)
    seconds = (time.monotonic() - start) / share * layer_runs
    task.forecast(Forecast(layer_runs, layer_runs, seconds))
