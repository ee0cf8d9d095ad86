"""Sums of products, exactly: integer accumulators computed in floating point.

fp32 holds all integers below 2^24. Codes of activations are not negative, so every partial sum of a
layer, in any order, lies between xmax · Σ(negative weights) and xmax · Σ(positive weights) of its
output channel. Where that bound reaches 2^24 the codes are split into two halves of four bits,
x = 16·high + low, and where this is not enough the sums are taken in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hwmpq.errors import InputError
from hwmpq.formats import encoding_named
from hwmpq.graph import Node
from hwmpq.quantize.interpret import linear_part
from hwmpq.resolve import ResolvedLayer

EXACT = 2**24


@dataclass(frozen=True, eq=False)
class Weight:
    """values: fp32, the weight's codes (with their scales where those differ within a channel);
    reach: largest |Σ| of the positive or of the negative weights of a channel."""

    values: Tensor
    reach: float

    @staticmethod
    def of(layer: ResolvedLayer) -> Weight:
        """The prepared weight of a layer that has one."""
        assert layer.weight is not None
        fmt = layer.format
        if fmt.group is None:
            values = fmt.weight.dequantize(layer.weight.codes)
        else:
            values = fmt.dequantize_weight(layer.weight)
        tensor = torch.from_numpy(np.require(values, np.float32, ["C", "W"]))
        if not layer.epilogue.integer:
            return Weight(tensor, 0.0)
        rows = tensor.flatten(1).double()
        reach = torch.maximum(rows.clamp(min=0).sum(1), -rows.clamp(max=0).sum(1))
        return Weight(tensor, float(reach.max()))


def accumulate(layer: ResolvedLayer, x: Tensor, weight: Weight) -> Tensor:
    """The accumulator of a conv2d or linear, before its bias.

    x: codes or values as the layer demands them. An integer accumulator is exact: int32, or fp32
    while it and its bias are below 2^24.
    """
    node, zero = layer.node, float(layer.x_quantizer.zero)
    if not layer.epilogue.integer:
        return linear_part(node, x - zero if zero else x, weight.values)
    if zero and node.op == "conv2d":
        top, left, bottom, right = node.attrs["padding"]
        x = F.pad(x, (left, right, top, bottom), value=zero)
        node = replace(node, attrs={**node.attrs, "padding": (0, 0, 0, 0)})
    if encoding_named(layer.x).qmax * weight.reach < EXACT:
        small = bool((np.abs(layer.epilogue.bias.astype(np.int64)) < EXACT).all())
        acc = _sums(node, x, weight.values)
        return acc if small else acc.to(torch.int32)
    if 15 * weight.reach < EXACT:
        high = (x * 0.0625).floor()
        low = x - high * 16.0
        halves = (_sums(node, half, weight.values).to(torch.int32) for half in (high, low))
        return next(halves) * 16 + next(halves)
    return _sums(node, x.double(), weight.values.double()).to(torch.int32)


def product(layer: ResolvedLayer, a: Tensor, b: Tensor) -> Tensor:
    """The accumulator of a matmul: (a − z_a) · b; exact int32 or fp32 for integers."""
    if layer.x_quantizer.zero:
        a = a - float(layer.x_quantizer.zero)
    if layer.node.attrs["trans_b"]:
        b = b.transpose(-2, -1)
    if not layer.epilogue.integer:
        return a @ b
    largest = encoding_named(layer.x).qmax * encoding_named(layer.b).qmax * a.shape[-1]
    with _plain_products():
        return a @ b if largest < EXACT else (a.double() @ b.double()).to(torch.int32)


def _sums(node: Node, x: Tensor, weight: Tensor) -> Tensor:
    with _plain_products():
        return linear_part(node, x, weight)


@contextmanager
def _plain_products() -> Iterator[None]:
    """Products of fp32 numbers as such. NNPACK may choose transforms with other sums; on chips with
    bf16 products torch may be told to use those, which is refused."""
    settings: Any = torch.backends.mkldnn
    for one in (settings.conv, settings.matmul):
        if one.fp32_precision not in ("none", "ieee"):
            raise InputError(
                "torch multiplies fp32 numbers in a lower precision",
                one.fp32_precision,
                "ieee",
                "Call torch.set_float32_matmul_precision('highest') before simulating.",
            )
    with torch.backends.nnpack.flags(enabled=False):
        yield
