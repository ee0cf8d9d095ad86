"""`fisher`: ½ · mean over samples of Σ (g · ΔY)² at the layer's output, g = dLoss/dY.

The diagonal of the Fisher matrix at the output (as NVIDIA ModelOpt's `auto_quantize` scores a
layer), ΔY: how the output changes when the layer alone reads and weighs in the format. For the loss
`kl`, whose gradient is 0 at the float outputs, `DRAWS` labels per sample are drawn from the float
softmax and cross entropy is taken. One forward and backward pass for all cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hwmpq.errors import InputError
from hwmpq.graph import Node
from hwmpq.quantize.interpret import Param, apply, evaluate
from hwmpq.quantize.scores import LOSSES as KNOWN
from hwmpq.sensitivity.gradients import announce, summed_loss
from hwmpq.sensitivity.rounding import layer_of, operand_encodings, rounded, rounded_weight
from hwmpq.sensitivity.task import GROUPS, Cells, Estimate, Task
from hwmpq.types import Sensitivity

GRADIENTS = True
DRAWS = 4


@dataclass(frozen=True)
class Seen:
    """A layer in an fp32 run: its node (of the batch's graph), operands, result, and g²."""

    node: Node
    args: list[Tensor]
    result: Tensor
    power: Tensor


def ESTIMATOR(task: Task) -> Sensitivity:
    """The estimate per cell, ≥ 0; all are saved when the pass is over."""
    task = replace(task, batch=min(task.batch, math.ceil(task.samples / GROUPS)))
    wanted = task.singles()
    open_ = task.open(wanted)
    draws = DRAWS if task.loss == KNOWN["kl"] else 1
    runs = len(task.graph.layers) * (1 + 2 * draws) + len(open_) if open_ else 0
    announce(task, runs)

    def found() -> Iterator[tuple[Cells, Estimate]]:
        sums: dict[Cells, list[float]] = {cells: [] for cells in open_}
        sizes = []
        for number, (inputs, labels) in enumerate(task.batches()):
            seen = _gradients(task, inputs, labels, number)
            for cells in open_:
                sums[cells].append(_damage(task, cells, seen[task.layers[cells[0][0]]]))
            sizes.append(len(next(iter(inputs.values()))))
        for cells in open_:
            means = [total / size for total, size in zip(sums[cells], sizes, strict=True)]
            yield cells, Estimate.grouped(sum(sums[cells]) / task.samples, means)

    known = task.fill(wanted, found() if open_ else iter(()), dict.fromkeys(open_, 1.0))
    return task.result(known, "fisher", task.loss.name, (runs, runs))


def _gradients(
    task: Task, inputs: dict[str, Tensor], labels: Tensor | None, number: int
) -> dict[str, Seen]:
    """Every layer of the batch, by one forward pass and one backward pass per draw."""
    shifts: dict[str, Tensor] = {}
    ran: dict[str, tuple[Node, list[Tensor], Tensor]] = {}

    def run(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
        y = apply(node, args, param)
        ran[node.name] = (node, [x.detach() for x in args], y.detach())
        shifts[node.name] = torch.zeros_like(y, requires_grad=True)
        return y + shifts[node.name]

    overrides = {node.name: run for node in task.graph.layers}
    outputs = evaluate(task.graph, inputs, overrides=overrides, constants=task.constants)
    logits = outputs[task.graph.outputs[0]]
    power = {name: torch.zeros_like(shift) for name, shift in shifts.items()}
    score, targets = task.loss, [labels]
    if score == KNOWN["kl"]:
        score = KNOWN["cross-entropy"]
        targets = [*_drawn(logits.detach().flatten(1), task.seed, number)]
    for target in targets:
        loss = summed_loss(score, logits, target)
        grads = torch.autograd.grad(
            loss, list(shifts.values()), retain_graph=True, materialize_grads=True
        )
        for name, g in zip(shifts, grads, strict=True):
            power[name] += g.square() / len(targets)
    if not any(part.any() for part in power.values()):
        raise InputError(
            f"gradient of the loss {score.name} at the float outputs", "0 everywhere", None,
            "Take an estimator that measures the loss: measured.",
        )  # fmt: skip
    return {name: Seen(*ran[name], power[name]) for name in shifts}


def _drawn(logits: Tensor, seed: int, number: int) -> list[Tensor]:
    """DRAWS labels per sample from the softmax, the same for the same seed and batch number."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    picked = torch.multinomial(logits.cpu().softmax(1), DRAWS, True, generator=generator)
    return list(picked.to(logits.device).T)


def _damage(task: Task, cells: Cells, seen: Seen) -> float:
    """½ Σ (g · ΔY)² over the samples of a batch."""
    node, fmt = layer_of(task, cells)
    args = list(seen.args)
    with torch.no_grad():
        for index, (tensor, encoding) in enumerate(operand_encodings(node, fmt)):
            args[index] = rounded(task, tensor, encoding, args[index])

        def param(name: str) -> Tensor:
            weight = name == node.params.get("weight")
            return rounded_weight(task, node, fmt) if weight else task.constants(name)

        change = apply(seen.node, args, param) - seen.result
        return float((seen.power * change.square()).double().sum()) / 2
