"""Mode 'fast' of the simulator: differentiable, for training and search.

Tensors are held as fp32 values rounded to what is stored; a layer multiplies rounded values and
adds its unrounded bias and its residual in fp32. Gradients go straight through a rounding, and are
zero where an activation was clipped; those of a weight always pass, so that it can come back.
Weights and biases are those of the quantizers; a trained one is rounded anew, in their scale.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwmpq.formats import encoding_named
from hwmpq.graph import Node
from hwmpq.quantize.interpret import Param, apply
from hwmpq.resolve import Resolved
from hwmpq.storage import is_integer


class Fast:
    """Same calls as `Exact`. param: constant name -> float tensor; trained: names of those that
    gradients reach."""

    def __init__(self, resolved: Resolved, param: Param, trained: Collection[str] = ()):
        self._resolved = resolved
        self._plan = resolved.plan
        self._param = param
        self._trained = frozenset(trained)
        self._own: dict[tuple[str, str], Tensor] = {}

    def store(self, tensor: str, value: Tensor) -> Tensor:
        """fp32 values -> those that are stored."""
        return self._rounded(tensor, value, self._plan.stored[tensor])

    def read(self, node: Node, index: int, held: Tensor) -> Tensor:
        """Stored values of operand `index` -> those in the demanded encoding."""
        if not self._plan.reencodes(node, index):
            return held
        return self._rounded(node.inputs[index], held, self._plan.demand[node.name, index])

    def layer(self, node: Node, args: Sequence[Tensor]) -> Tensor:
        """Operands as demanded -> the layer's result as stored."""

        def param(name: str) -> Tensor:
            return self.weight(node) if name == node.params["weight"] else self.bias(node)

        return self.store(node.name, apply(node, args, param))

    def glue(self, node: Node, args: Sequence[Tensor]) -> Tensor:
        """Operands as demanded -> the operator's result as stored."""
        return self.store(node.name, apply(node, args, self._param))

    def weight(self, node: Node) -> Tensor:
        """The rounded weight of a conv2d or linear."""
        name, layer = node.params["weight"], self._resolved.layers[node.name]
        fmt, rounded = layer.format, layer.weight
        assert rounded is not None
        if name in self._trained:
            value = self._param(name)
            codes = fmt.quantize_weight(value, rounded.scale)
            return straight_through(value, fmt.dequantize_weight(codes))
        return self._kept(node, "weight", lambda: fmt.dequantize_weight(rounded))

    def bias(self, node: Node) -> Tensor:
        """The bias of a layer that has one."""
        name, own = node.params["bias"], self._resolved.layers[node.name].bias
        if own is None or name in self._trained:
            return self._param(name)
        return self._kept(node, "bias", lambda: own)

    def _kept(self, node: Node, role: str, make: Callable[[], Any]) -> Tensor:
        """A constant of the quantizers as a tensor where the graph's constants are, made once."""
        if (node.name, role) not in self._own:
            array = np.require(make(), np.float32, ["C", "W"])
            device = self._param(node.params[role]).device
            self._own[node.name, role] = torch.from_numpy(array).to(device)
        return self._own[node.name, role]

    def _rounded(self, tensor: str, value: Tensor, encoding: str) -> Tensor:
        if encoding == "fp32":
            return value
        kind = encoding_named(encoding)
        if not is_integer(encoding):
            return straight_through(value, kind.fake(value))
        q = self._resolved.quantizer(tensor, encoding)
        low, high = (kind.qmin - q.zero) * q.scale, (kind.qmax - q.zero) * q.scale
        passed = torch.where((value >= low) & (value <= high), value, value.detach())
        return straight_through(passed, kind.fake(value, q.scale, q.zero))


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, exactly, with the gradient of x."""
    return rounded + (x - x.detach()) if x.requires_grad else rounded
