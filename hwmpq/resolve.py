"""Graph + assignment + quantizers -> every number of every layer, for simulator and lowering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.formats import Format, QuantizedWeight, encoding_named, format_named
from hwmpq.graph import Graph, Node, workload_of
from hwmpq.quantizers import Quantizers
from hwmpq.requantize import F32, Epilogue, Quantizer, constants
from hwmpq.storage import StoragePlan, is_integer, plan
from hwmpq.types import Workload


@dataclass(frozen=True, eq=False)
class ResolvedLayer:
    """x: the activation operand's encoding and quantizer; b: those of a matmul's second operand;
    weight: rounded codes (None for a matmul); bias: fp32 [channels], or None; epilogue: what
    happens to the accumulator."""

    node: Node
    workload: Workload
    format: Format
    x: str
    x_quantizer: Quantizer
    b: str
    b_quantizer: Quantizer
    weight: QuantizedWeight | None
    bias: F32 | None
    epilogue: Epilogue

    @property
    def bias_steps(self) -> tuple[NDArray[np.int32], F32] | None:
        """The bias as it joins an integer accumulator: int32 [channels], and the size of a step."""
        if self.bias is None or self.weight is None or not self.epilogue.integer:
            return None
        sums = self.weight.codes.reshape(len(self.bias), -1).astype(np.int64).sum(1)
        codes = self.epilogue.bias + self.x_quantizer.zero * sums
        step = np.float64(self.x_quantizer.scale) * np.asarray(self.weight.scale, np.float64)
        return codes.astype(np.int32), np.broadcast_to(step, codes.shape).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Resolved:
    """The graph with its storage plan and resolved layers."""

    graph: Graph
    plan: StoragePlan
    layers: Mapping[str, ResolvedLayer]
    quantizers: Quantizers

    def quantizer(self, tensor: str, encoding: str) -> Quantizer:
        """The quantizer of a tensor in an encoding; the identity for a float encoding."""
        if not is_integer(encoding):
            return Quantizer()
        return self.quantizers.activation(self.plan.root[tensor], encoding)


def resolve(graph: Graph, assignment: Mapping[str, str], quantizers: Quantizers) -> Resolved:
    """Raises InputError when the assignment and the layers do not match one to one."""
    graph = quantizers.graph(graph)
    names = {node.name for node in graph.layers}
    if set(assignment) != names:
        wrong = sorted(set(assignment) ^ names)
        raise InputError("assignment and layers differ", ", ".join(wrong), sorted(names))
    formats = {name: format_named(fmt) for name, fmt in assignment.items()}
    reads = {n: (f.activation.name, f.weight.name) for n, f in formats.items()}
    storage = plan(graph, reads)
    bare = Resolved(graph, storage, {}, quantizers)
    layers = {n.name: _layer(bare, n, formats[n.name]) for n in graph.layers}
    return Resolved(graph, storage, layers, quantizers)


def _layer(r: Resolved, node: Node, fmt: Format) -> ResolvedLayer:
    workload = workload_of(node, r.graph)
    x = r.plan.demand[node.name, 0]
    x_quantizer = r.quantizer(node.inputs[0], x)
    b, b_quantizer = "", Quantizer()
    grouped = fmt.group is not None
    integer = fmt.is_integer and not grouped
    weight = None
    if node.op == "matmul":
        b = r.plan.demand[node.name, 1]
        b_quantizer = r.quantizer(node.inputs[1], b)
        channels = workload["n"]
        weight_scale: np.ndarray | float = b_quantizer.scale
        # Σ of B's codes is only known when it runs: the kernel subtracts the zero point itself.
        weight_sum = None
    else:
        weight = r.quantizers.weight(node.name, fmt.name)
        channels = weight.codes.shape[0]
        # Scales that differ within a channel cannot wait for the epilogue: they go to the weights.
        weight_scale = 1.0 if weight.scale is None or grouped else weight.scale
        weight_sum = None
        if integer:
            weight_sum = weight.codes.reshape(channels, -1).astype(np.int64).sum(1)
    out = r.plan.stored[node.name]
    residual = ""
    residual_quantizer = Quantizer()
    if node.residual is not None:
        residual = r.plan.demand[node.name, len(node.inputs) - 1]
        residual_quantizer = r.quantizer(node.residual, residual)
    act_range: tuple[float | None, float | None] = (None, None)
    if node.attrs.get("act") == "relu":
        act_range = (0.0, None)
    elif node.attrs.get("act") == "clamp":
        act_range = (float(node.attrs["act_lo"]), float(node.attrs["act_hi"]))
    encoding = encoding_named(out)
    bias = r.quantizers.biases.get((node.name, fmt.name))
    if bias is None and "bias" in node.params:
        bias = r.graph.constants[node.params["bias"]]
    epilogue = constants(
        integer=integer,
        channels=channels,
        bias=bias,
        x=x_quantizer,
        weight_scale=weight_scale,
        weight_sum=weight_sum,
        out=out,
        out_quantizer=r.quantizer(node.name, out),
        out_range=(int(encoding.qmin), int(encoding.qmax)) if is_integer(out) else (0, 0),
        residual=residual,
        residual_quantizer=residual_quantizer,
        act_range=act_range,
        scale=float(node.attrs.get("scale", 1.0)),
    )
    return ResolvedLayer(
        node, workload, fmt, x, x_quantizer, b, b_quantizer, weight, bias, epilogue
    )  # fmt: skip
