"""Mode 'exact' of the simulator: design section 4, number by number."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hwmpq import requantize
from hwmpq.formats import encoding_named
from hwmpq.graph import Node
from hwmpq.quantize import exact_math, glue
from hwmpq.quantize.accumulate import Weight, accumulate, product
from hwmpq.quantize.interpret import Param, apply
from hwmpq.requantize import Quantizer
from hwmpq.resolve import Resolved, ResolvedLayer
from hwmpq.storage import is_integer


class Exact:
    """Tensors are held as stored: codes (in fp32, exact) of an integer, fp32 values of a float."""

    def __init__(self, resolved: Resolved, param: Param):
        self._resolved = resolved
        self._plan = resolved.plan
        self._param = param
        self._weights: dict[str, Weight] = {}

    def store(self, tensor: str, value: Tensor) -> Tensor:
        """fp32 values -> what is stored."""
        return self._encode(tensor, value, self._plan.stored[tensor])

    def read(self, node: Node, index: int, held: Tensor) -> Tensor:
        """What is stored of operand `index` -> codes or values in the demanded encoding."""
        tensor, demand = node.inputs[index], self._plan.demand[node.name, index]
        stored = self._plan.stored[tensor]
        if demand == stored:
            return held
        return self._encode(tensor, self._values(tensor, held, stored), demand)

    def layer(self, node: Node, args: Sequence[Tensor]) -> Tensor:
        """Operands as demanded -> the layer's result as stored."""
        layer = self._resolved.layers[node.name]
        if self._plain(layer):
            return apply(node, args, self._param)
        if node.op == "matmul":
            acc = product(layer, args[0], args[1])
        else:
            if node.name not in self._weights:
                self._weights[node.name] = Weight.of(layer)
            acc = accumulate(layer, args[0], self._weights[node.name])
        residual = args[-1] if node.residual else None
        axis = 1 if node.op == "conv2d" else -1
        y: Tensor = requantize.apply(acc, layer.epilogue, residual, axis)
        out = layer.epilogue.out
        return y if is_integer(out) else self._encode(node.name, y, out)

    def glue(self, node: Node, args: Sequence[Tensor]) -> Tensor:
        """Operands as demanded -> the operator's result as stored; rules: see `glue`."""
        plan = self._plan
        out = plan.stored[node.name]
        demands = [plan.demand[node.name, i] for i in range(len(args))]
        ruled = all(d == out for d in demands) or (node.op == "add" and len(args) == 2)
        if is_integer(out) and ruled and node.op in glue.RULES:
            held = [(d, self._quantizer(t, d)) for d, t in zip(demands, node.inputs, strict=True)]
            return glue.RULES[node.op](node, args, held, (out, self._quantizer(node.name, out)))
        values = [self._values(t, x, d) for t, x, d in zip(node.inputs, args, demands, strict=True)]
        if is_integer(out):
            held_out = (out, self._quantizer(node.name, out))
            return exact_math.encoded(node, values, self._param, held_out)
        return self._encode(node.name, exact_math.apply(node, values, self._param), out)

    def _plain(self, layer: ResolvedLayer) -> bool:
        """An fp32 layer in and out: the interpreter's own."""
        e = layer.epilogue
        return layer.format.name == e.out == "fp32" and e.residual in ("", "fp32")

    def _quantizer(self, tensor: str, encoding: str) -> Quantizer:
        return self._resolved.quantizer(tensor, encoding)

    def _values(self, tensor: str, held: Tensor, encoding: str) -> Tensor:
        if not is_integer(encoding):
            return held
        q = self._quantizer(tensor, encoding)
        value: Tensor = encoding_named(encoding).dequantize(held, q.scale, q.zero)
        return value

    def _encode(self, tensor: str, value: Tensor, encoding: str) -> Tensor:
        """fp32 values -> fp32-held codes, or values rounded to a float encoding."""
        if encoding == "fp32":
            return value
        if not is_integer(encoding):
            rounded: Tensor = encoding_named(encoding).fake(value)
            return rounded
        q = self._quantizer(tensor, encoding)
        codes: Tensor = encoding_named(encoding).quantize(value, q.scale, q.zero)
        return codes.float()
