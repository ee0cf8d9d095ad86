"""Learned step sizes: the differentiable arithmetic that quantization-aware training runs in.

LSQ (Esser et al., ICLR 2020, arXiv 1902.08153): x is rounded to (clamp(round(x/s + z)) − z) · s,
where rounding passes the gradient on, so that s has one too. What is trained is log s: s stays
positive and moves in proportion to itself, and Adam, which divides by the gradient's size, makes
LSQ's factor on that gradient needless. Zero points, and the fixed scale of a softmax, stay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from hwmpq.formats import Encoding, encoding_named
from hwmpq.graph import Node
from hwmpq.quantize.fast import Fast
from hwmpq.quantize.interpret import Param
from hwmpq.resolve import Resolved
from hwmpq.storage import is_integer


class Learned(Fast):
    """Mode 'fast' with trained scales, given as logarithms. weight_steps: layer -> [] or [out];
    steps: (quantizer root, encoding) -> [], for the tensors where it is trained."""

    def __init__(
        self,
        resolved: Resolved,
        param: Param,
        trained: Collection[str],
        weight_steps: Mapping[str, Tensor],
        steps: Mapping[tuple[str, str], Tensor],
    ):
        super().__init__(resolved, param, trained)
        self._weight_steps, self._steps = weight_steps, steps

    def weight(self, node: Node) -> Tensor:
        """Rounded by the learned scale where there is one."""
        step = self._weight_steps.get(node.name)
        if step is None:
            return super().weight(node)
        encoding = self._resolved.layers[node.name].format.weight
        value = self._param(node.params["weight"])
        return stepped(value, step.exp().reshape(-1, *[1] * (value.ndim - 1)), 0, encoding)

    def _rounded(self, tensor: str, value: Tensor, encoding: str) -> Tensor:
        key = self._plan.root[tensor], encoding
        if not is_integer(encoding) or key not in self._steps:
            return super()._rounded(tensor, value, encoding)
        zero = self._resolved.quantizer(tensor, encoding).zero
        return stepped(value, self._steps[key].exp(), zero, encoding_named(encoding))


def stepped(x: Tensor, step: Tensor, zero: int, encoding: Encoding) -> Tensor:
    """x rounded in a learned step."""
    inside = (x / step + zero).clamp(encoding.qmin, encoding.qmax)
    codes = inside + (inside.round() - inside).detach()
    return (codes - zero) * step
