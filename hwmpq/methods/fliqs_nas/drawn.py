"""A drawn network: an architecture under an assignment, computed with the shared weights.

Same walk as the simulator's mode 'fast', by the same storage rule, but for the BatchNorms, which
come between a product and its residual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from hwmpq.formats import format_named
from hwmpq.graph import Graph, Node
from hwmpq.methods.fliqs_nas.shared import SharedWeights
from hwmpq.quantize.fast import straight_through
from hwmpq.quantize.feed import named
from hwmpq.quantize.interpret import activation, apply, linear_part
from hwmpq.quantize.learned import stepped
from hwmpq.storage import plan

#: Layer -> mean and variance of each channel of what its BatchNorm reads.
Statistics = dict[str, tuple[Tensor, Tensor]]


class Drawn:
    """Called with images, it returns its outputs. delayed: activations are not rounded; seen:
    filled with what the BatchNorms saw, where it is given."""

    def __init__(
        self, shared: SharedWeights, graph: Graph, assignment: Mapping[str, str],
        delayed: bool = False, seen: Statistics | None = None,
    ):  # fmt: skip
        self._shared, self._graph, self._delayed, self._seen = shared, graph, delayed, seen
        self._formats = {name: format_named(fmt) for name, fmt in assignment.items()}
        reads = {name: (f.activation.name, f.weight.name) for name, f in self._formats.items()}
        self._plan = plan(graph, reads)

    def __call__(self, images: Tensor) -> list[Tensor]:
        held = {
            name: self._stored(name, value) for name, value in named(self._graph, images).items()
        }
        for node in self._graph.nodes:
            args = [self._read(node, i, held[tensor]) for i, tensor in enumerate(node.inputs)]
            result = self._layer(node, args) if node.is_layer else apply(node, args, _none)
            held[node.name] = self._stored(node.name, result)
        return [held[name] for name in self._graph.outputs]

    def _stored(self, tensor: str, value: Tensor) -> Tensor:
        return self._rounded(tensor, value, self._plan.stored[tensor])

    def _read(self, node: Node, index: int, held: Tensor) -> Tensor:
        if not self._plan.reencodes(node, index):
            return held
        return self._rounded(node.inputs[index], held, self._plan.demand[node.name, index])

    def _rounded(self, tensor: str, value: Tensor, encoding: str) -> Tensor:
        return value if self._delayed else self._shared.rounded(tensor, value, encoding)

    def _layer(self, node: Node, args: Sequence[Tensor]) -> Tensor:
        weight = self._weight(node)
        if node.op == "linear":
            bias = self._shared.part(node.params["bias"], tuple(weight.shape[:1]))
            return linear_part(node, args[0], weight, bias)
        y = linear_part(node, args[0], weight)
        if self._seen is not None:
            self._seen[node.name] = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
        norm, width = node.name.removesuffix("conv") + "norm", tuple(weight.shape[:1])
        scale, shift = (self._shared.part(f"{norm}.{word}", width) for word in ("weight", "bias"))
        y = F.batch_norm(y, None, None, scale, shift, training=True)
        return activation(node, y + args[-1] if node.residual else y)

    def _weight(self, node: Node) -> Tensor:
        """Rounded; gradients go straight through."""
        name, fmt = node.params["weight"], self._formats[node.name]
        value = self._shared.part(name, self._graph.constants[name].shape)
        if fmt.weight.name == "fp32":
            return value
        scale = self._shared.weight_scale(node.name, fmt, value)
        if scale is not None:
            return stepped(value, scale.reshape(-1, *[1] * (value.ndim - 1)), 0, fmt.weight)
        return straight_through(value, fmt.dequantize_weight(fmt.quantize_weight(value.detach())))


def _none(name: str) -> Tensor:
    raise KeyError(name)
