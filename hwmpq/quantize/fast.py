"""Mode 'fast' of the simulator: differentiable, for training and search.

Tensors are held as fp32 values rounded to what is stored; a layer multiplies rounded values and
adds its unrounded bias and its residual in fp32. Gradients go straight through a rounding, and are
zero where an activation was clipped; those of a weight always pass, so that it can come back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hwmpq.formats import encoding_named
from hwmpq.graph import Node
from hwmpq.quantize.interpret import Param, apply
from hwmpq.resolve import Resolved
from hwmpq.storage import is_integer


class Fast:
    """Same calls as `Exact`. param: constant name -> float tensor, which gradients reach."""

    def __init__(self, resolved: Resolved, param: Param):
        self._resolved = resolved
        self._plan = resolved.plan
        self._param = param

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
            value = self._param(name)
            return self._weight(node, value) if name == node.params["weight"] else value

        return self.store(node.name, apply(node, args, param))

    def glue(self, node: Node, args: Sequence[Tensor]) -> Tensor:
        """Operands as demanded -> the operator's result as stored."""
        return self.store(node.name, apply(node, args, self._param))

    def _weight(self, node: Node, value: Tensor) -> Tensor:
        layer = self._resolved.layers[node.name]
        if layer.format.weight.name == "fp32" or layer.weight is None:
            return value
        codes = layer.format.quantize_weight(value, layer.weight.scale)
        return straight_through(value, layer.format.dequantize_weight(codes))

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
