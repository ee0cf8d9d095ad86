"""Weights ready to be multiplied: in place, or decoded to a small panel with their group scales.

A scale that all weights of a channel share waits for the epilogue. Scales of groups of weights
cannot: each decoded weight is multiplied by its own, rounded to fp32 as `Format.dequantize_weight`
does. They lie as [groups of a row][padded channels].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.kernels.micro import Micro
from hwmpq.kernels.nests import Buffers, Call, Nest
from hwmpq.types import Workload

if TYPE_CHECKING:
    from hwmpq.kernels.nests.gemm import Packing
    from hwmpq.kernels.nests.image import Geometry


def pack_scales(
    nest: Nest, scales: NDArray[np.float32], workload: Workload, micro: Micro
) -> NDArray[np.float32]:
    """[cout, groups of a row] -> [groups of a row][padded channels], flat."""
    return np.concatenate([nest.pad(column, workload, micro) for column in scales.T])


def panel(
    ir: IR, call: Call, g: Geometry, p: Packing, micro: Micro, decoder: Decoder, bufs: Buffers,
    group: Expr, vector: Expr, count: int, begin: Expr, steps: int,
) -> tuple[Buffer, Expr, int]:  # fmt: skip
    """`steps` steps from `begin` on of the weights of `count` vectors of channels.

    Gives their buffer, the step of it at which they begin, and the steps between two vectors.
    """
    first = group * p.vectors + vector
    if decoder.identity:
        return bufs.weight, first * p.steps + begin, p.steps
    to = ir.scratch(count * steps * p.width, micro.w_dtype)
    with ir.loop(count) as j, ir.loop(steps // decoder.unit) as block:
        packed = ((first + j) * p.steps + begin) // decoder.unit + block
        at = j * steps + block * decoder.unit
        decoder.expand(ir, bufs.weight, packed * decoder.rows * p.width, to, at * p.width, p.width)
        if bufs.scales is not None:
            for i in range(decoder.unit):
                channel = (first + j) * micro.lanes
                row = _group_of(ir, call, g, p, begin + block * decoder.unit + i)
                place = row * (g.groups * p.vectors * micro.lanes) + channel
                scale = ir.load(bufs.scales, place, micro.lanes)
                value = ir.load(to, (at + i) * p.width, micro.lanes) * scale
                ir.store(to, (at + i) * p.width, value, micro.lanes)
    return to, 0, steps


def _group_of(ir: IR, call: Call, g: Geometry, p: Packing, step: Expr) -> Expr:
    """The group, counted in torch's order (channel, row, column), of a reduction step."""
    size = call.format.group
    assert size is not None
    tap, element = step // p.per_segment, step % p.per_segment
    gin = g.cin // g.groups
    if g.merged:
        row, column = tap, element // gin
    else:
        row, column = tap // g.kw, tap % g.kw
    at = ((element % gin) * g.kh + row) * g.kw + column
    last = gin * g.kh * g.kw - 1  # steps behind the last weight hold zeros
    return ir.minimum(at, last) // size
