"""`weight-error`, the control: how far rounding moves a layer's own operands, the rest ignored.

‖Q(W) − W‖² / ‖W‖² + ‖Q(x) − x‖² / ‖x‖², x: the fp32 input over all samples; for a matmul the same
of its two operands. One fp32 run for all cells together.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hwmpq.formats import Format, encoding_named, format_named
from hwmpq.graph import Graph, Node
from hwmpq.quantize.interpret import Constants, evaluate
from hwmpq.quantizers import Quantizers
from hwmpq.sensitivity.task import Cell, Task
from hwmpq.storage import is_integer, quantizer_roots
from hwmpq.types import Sensitivity


def ESTIMATOR(task: Task) -> Sensitivity:
    """Relative squared error of the operands per cell, ≥ 0."""
    nodes = {node.name: node for node in task.graph.layers}
    formats = {cell: format_named(task.formats[cell[1]]) for cell in task.open_cells()}
    read = {cell: _reads(nodes[task.layers[cell[0]]], fmt) for cell, fmt in formats.items()}
    errors = _errors(task, {operand for operands in read.values() for operand in operands})

    def cells() -> Iterator[tuple[Cell, float]]:
        for cell, fmt in formats.items():
            node = nodes[task.layers[cell[0]]]
            moved = sum(errors[operand] for operand in read[cell])
            yield cell, moved + _weight_error(task.graph, task.quantizers, node, fmt)

    return task.result(task.table(cells()), "weight-error", "relative-squared-error")


def _reads(node: Node, fmt: Format) -> list[tuple[str, str]]:
    """(tensor, encoding) of the operands that the layer reads in its format."""
    operands = [(node.inputs[0], fmt.activation.name)]
    if node.op == "matmul":
        operands.append((node.inputs[1], fmt.weight.name))
    return operands


def _weight_error(graph: Graph, quantizers: Quantizers, node: Node, fmt: Format) -> float:
    if node.op == "matmul":
        return 0.0
    w = graph.constants[node.params["weight"]]
    rounded = fmt.dequantize_weight(quantizers.weight(node.name, fmt.name))
    return _ratio(np.sum((rounded - w) ** 2, dtype=np.float64), np.sum(w**2, dtype=np.float64))


def _errors(task: Task, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Relative squared error of each (tensor, encoding)."""
    encodings: dict[str, list[str]] = {}
    for tensor, encoding in sorted(wanted):
        encodings.setdefault(tensor, []).append(encoding)
    roots = quantizer_roots(task.graph)
    noise = dict.fromkeys(wanted, 0.0)
    signal = dict.fromkeys(encodings, 0.0)

    def observe(name: str, x: Tensor) -> None:
        if name in encodings:
            signal[name] += float(x.double().square().sum())
        for encoding in encodings.get(name, ()):
            scale, zero = 1.0, 0
            if is_integer(encoding):
                q = task.quantizers.activation(roots[name], encoding)
                scale, zero = q.scale, q.zero
            error = encoding_named(encoding).fake(x, scale, zero) - x
            noise[name, encoding] += float(error.double().square().sum())

    constants = Constants(task.graph)
    with torch.inference_mode():
        for inputs, _ in task.batches():
            evaluate(task.graph, inputs, observe, constants=constants)
    return {key: _ratio(value, signal[key[0]]) for key, value in noise.items()}


def _ratio(noise: float, signal: float) -> float:
    return float(noise) / float(signal) if signal else 0.0
