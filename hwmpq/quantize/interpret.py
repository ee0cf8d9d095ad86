"""The fp32 interpreter of the canonical graph, in torch: what every simulator is built on.

One small function per operator (`OPS`); nothing is written in place, so gradients flow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hwmpq.errors import InputError
from hwmpq.graph import Graph, Node
from hwmpq.quantize.rebatch import rebatch as rebatch

Param = Callable[[str], Tensor]
Op = Callable[[Node, Sequence[Tensor], Param], Tensor]


class Constants:
    """The graph's constants as tensors, each converted once."""

    def __init__(self, graph: Graph, device: torch.device | str = "cpu"):
        self.graph = graph
        self.device = device
        self._tensors: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = torch.from_numpy(self.graph.constants[name]).to(self.device)
        return self._tensors[name]


def evaluate(
    graph: Graph,
    inputs: Mapping[str, Tensor],
    observe: Callable[[str, Tensor], None] | None = None,
    overrides: Mapping[str, Op] | None = None,
    constants: Param | None = None,
) -> dict[str, Tensor]:
    """Run the graph; returns its outputs by tensor name (`graph.outputs` gives their order).

    inputs: by name, fp32; all may have another batch size than the traced one (`rebatch`).
    observe: called with every input and every node's result, in execution order.
    overrides: node name -> function(node, args, param) that computes it instead of `apply`.
    constants: name -> tensor; by default a new `Constants(graph)`.
    Raises InputError for missing inputs or shapes that do not fit.
    """
    graph = rebatch(graph, _batch_of(graph, inputs))
    param = constants or Constants(graph)
    overrides = overrides or {}
    last = {tensor: node.name for node in graph.nodes for tensor in node.inputs}
    values = {name: inputs[name] for name in graph.inputs}
    if observe:
        for name, value in values.items():
            observe(name, value)
    for node in graph.nodes:
        run = overrides.get(node.name, apply)
        values[node.name] = run(node, [values[name] for name in node.inputs], param)
        if observe:
            observe(node.name, values[node.name])
        for name in set(node.inputs):
            if last[name] == node.name and name not in graph.outputs:
                del values[name]
    return {name: values[name] for name in graph.outputs}


def _batch_of(graph: Graph, inputs: Mapping[str, Tensor]) -> int:
    """The batch size of the inputs, after checking their shapes."""
    missing = [name for name in graph.inputs if name not in inputs]
    if missing or not graph.inputs:
        raise InputError("missing inputs", ", ".join(missing), list(graph.inputs))
    batch = int(inputs[graph.inputs[0]].shape[0])
    traced = graph.tensors[graph.inputs[0]][0]
    for name in graph.inputs:
        first, *rest = graph.tensors[name]
        want = (batch if first == traced else first, *rest)
        if tuple(inputs[name].shape) != want:
            raise InputError(f"shape of input {name}", tuple(inputs[name].shape), str(want))
    return batch


def apply(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    """The fp32 result of one node. param: constant name -> tensor."""
    return OPS[node.op](node, args, param)


def linear_part(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A layer without its epilogue's residual and activation; for a matmul `weight` is B."""
    if node.op == "linear":
        return F.linear(x, weight, bias)
    if node.op == "matmul":
        y = x @ (weight.transpose(-2, -1) if node.attrs["trans_b"] else weight)
        return y if node.attrs["scale"] == 1.0 else y * node.attrs["scale"]
    top, left, bottom, right = node.attrs["padding"]
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    a = node.attrs
    return F.conv2d(x, weight, bias, a["stride"], (top, left), a["dilation"], a["groups"])


def activation(node: Node, y: Tensor) -> Tensor:
    """The layer's fused activation."""
    match node.attrs.get("act", ""):
        case "":
            return y
        case "relu":
            return F.relu(y)
        case "clamp":
            return y.clamp(node.attrs["act_lo"], node.attrs["act_hi"])
        case other:
            raise InputError("unknown activation", other, ["relu", "clamp"])


def _layer(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    weight = args[1] if node.op == "matmul" else param(node.params["weight"])
    bias = param(node.params["bias"]) if "bias" in node.params else None
    y = linear_part(node, args[0], weight, bias)
    return activation(node, y + args[-1] if node.residual else y)


def _operands(node: Node, args: Sequence[Tensor], param: Param) -> tuple[Tensor, Tensor]:
    return args[0], param(node.params["b"]) if "b" in node.params else args[1]


def _add(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    a, b = _operands(node, args, param)
    return a + b


def _mul(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    a, b = _operands(node, args, param)
    return a * b


def _unary(function: Callable[[Tensor], Tensor]) -> Op:
    return lambda node, args, param: function(args[0])


def _layer_norm(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    weight, bias = param(node.params["weight"]), param(node.params["bias"])
    return F.layer_norm(args[0], weight.shape, weight, bias, node.attrs["eps"])


def _batch_affine(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    shape = (-1, *[1] * (args[0].ndim - 2))
    scale, shift = (param(node.params[role]).reshape(shape) for role in ("scale", "shift"))
    return args[0] * scale + shift


def _max_pool2d(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    top, left, bottom, right = node.attrs["padding"]
    x = F.pad(args[0], (left, right, top, bottom), value=-math.inf)
    return F.max_pool2d(x, node.attrs["kernel"], node.attrs["stride"])


def _avg_pool2d(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    top, left, _, _ = node.attrs["padding"]
    a = node.attrs
    counted = a["count_include_pad"]
    return F.avg_pool2d(args[0], a["kernel"], a["stride"], (top, left), False, counted)


def _concat(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    """Constants (batch 1) are broadcast to the batch."""
    axis = node.attrs["axis"]
    shape = [max(sizes) for sizes in zip(*(x.shape for x in args), strict=True)]
    full = [x.expand(*shape[:axis], x.shape[axis], *shape[axis + 1 :]) for x in args]
    return torch.cat(full, axis)


def _pad(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    flat = [amount for pair in reversed(node.attrs["pads"]) for amount in pair]
    return F.pad(args[0], flat, value=node.attrs["value"])


def _rearrange(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    x = args[0]
    for step in node.attrs["steps"]:
        match step:
            case ["reshape", shape]:
                x = x.reshape(shape)
            case ["permute", axes]:
                x = x.permute(axes)
            case ["expand", shape]:
                x = x.expand(shape)
            case ["slice", axis, start, stop, stride]:
                x = x[(slice(None),) * axis + (slice(start, stop, stride),)]
    return x


OPS: dict[str, Op] = {
    "conv2d": _layer,
    "linear": _layer,
    "matmul": _layer,
    "add": _add,
    "mul": _mul,
    "relu": _unary(F.relu),
    "clamp": lambda node, args, param: args[0].clamp(node.attrs["lo"], node.attrs["hi"]),
    "gelu": lambda node, args, param: F.gelu(args[0], approximate=node.attrs["approximate"]),
    "silu": _unary(F.silu),
    "hardswish": _unary(F.hardswish),
    "sigmoid": _unary(torch.sigmoid),
    "hardsigmoid": _unary(F.hardsigmoid),
    "tanh": _unary(torch.tanh),
    "softmax": lambda node, args, param: args[0].softmax(node.attrs["axis"]),
    "layer_norm": _layer_norm,
    "batch_affine": _batch_affine,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "mean": lambda node, args, param: args[0].mean(node.attrs["axes"], node.attrs["keepdim"]),
    "concat": _concat,
    "pad": _pad,
    "rearrange": _rearrange,
    "constant": lambda node, args, param: param(node.params["value"]),
}
