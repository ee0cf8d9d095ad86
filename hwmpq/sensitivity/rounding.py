"""What a format does to a layer's own weights and inputs: rounded, and how far they move."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hwmpq.formats import Format, encoding_named, format_named
from hwmpq.graph import Node
from hwmpq.quantize.interpret import evaluate
from hwmpq.sensitivity.task import Cells, Task
from hwmpq.storage import is_integer, quantizer_roots


@dataclass(frozen=True)
class Moved:
    """Σ (rounded − x)² and Σ x², of a weight or of a tensor over all samples."""

    noise: float
    signal: float

    @property
    def ratio(self) -> float:
        return self.noise / self.signal if self.signal else 0.0


@dataclass(frozen=True)
class Errors:
    """weight: per cell, None for a matmul; operands: per cell and operand that has a format."""

    weight: dict[Cells, Moved | None]
    operands: dict[Cells, tuple[Moved, ...]]


def operand_encodings(node: Node, fmt: Format) -> tuple[tuple[str, str], ...]:
    """(tensor, encoding) of the operands that the layer reads in its format."""
    first = (node.inputs[0], fmt.activation.name)
    return (first, (node.inputs[1], fmt.weight.name)) if node.op == "matmul" else (first,)


def layer_of(task: Task, cells: Cells) -> tuple[Node, Format]:
    """The layer and the format of a single cell."""
    ((i, j),) = cells
    return task.graph.node(task.layers[i]), format_named(task.formats[j])


def rounded(task: Task, tensor: str, encoding: str, x: Tensor) -> Tensor:
    """x rounded as a reader of `tensor` does that demands `encoding`."""
    scale, zero = 1.0, 0
    if is_integer(encoding):
        q = task.quantizers.activation(quantizer_roots(task.graph)[tensor], encoding)
        scale, zero = q.scale, q.zero
    y: Tensor = encoding_named(encoding).fake(x, scale, zero)
    return y


def rounded_weight(task: Task, node: Node, fmt: Format) -> Tensor:
    """The weight that the layer's codes stand for, on the task's device."""
    values = fmt.dequantize_weight(task.quantizers.weight(node.name, fmt.name))
    return torch.from_numpy(np.require(values, np.float32, ["C", "W"])).to(task.device)


def errors(task: Task, wanted: Iterable[Cells]) -> Errors:
    """Of every cell, by one fp32 run."""
    layers = {cells: layer_of(task, cells) for cells in wanted}
    reads = {cells: operand_encodings(*layer) for cells, layer in layers.items()}
    moved = _moved(task, {key for keys in reads.values() for key in keys})
    return Errors(
        {cells: _weight_moved(task, *layer) for cells, layer in layers.items()},
        {cells: tuple(moved[key] for key in keys) for cells, keys in reads.items()},
    )


def _weight_moved(task: Task, node: Node, fmt: Format) -> Moved | None:
    if node.op == "matmul":
        return None
    w = task.constants(node.params["weight"]).double()
    error = rounded_weight(task, node, fmt).double() - w
    return Moved(float(error.square().sum()), float(w.square().sum()))


def _moved(task: Task, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], Moved]:
    """Of each (tensor, encoding), over all samples."""
    encodings: dict[str, list[str]] = {}
    for tensor, encoding in sorted(wanted):
        encodings.setdefault(tensor, []).append(encoding)
    noise = dict.fromkeys(wanted, 0.0)
    signal = dict.fromkeys(encodings, 0.0)

    def observe(name: str, x: Tensor) -> None:
        if name in encodings:
            signal[name] += float(x.double().square().sum())
        for encoding in encodings.get(name, ()):
            error = rounded(task, name, encoding, x) - x
            noise[name, encoding] += float(error.double().square().sum())

    with torch.no_grad():
        for inputs, _ in task.batches():
            evaluate(task.graph, inputs, observe, constants=task.constants)
    return {key: Moved(value, signal[key[0]]) for key, value in noise.items()}
