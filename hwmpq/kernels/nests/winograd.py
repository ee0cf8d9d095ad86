"""3 × 3 convolution of stride 1 by exact integer transforms (`toom`): a quarter of the products.

Weights stay packed in memory and are transformed inside the call; products of a point are a matrix
product of tiles by channels. Which operand waits in memory is the order of the loops: 'vectors',
all tiles, while blocks of channels are walked; 'rows', all weights, while blocks of tiles are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.formats import Format
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.ir import IR
from hwmpq.kernels.micro import Micro
from hwmpq.kernels.nests import Buffers, Call, Nest, Schedule, conv2d
from hwmpq.kernels.nests.gemm import blocks
from hwmpq.kernels.nests.image import Geometry
from hwmpq.kernels.nests.tiling import Tiling
from hwmpq.kernels.nests.toom import LIMIT, POINTS
from hwmpq.kernels.nests.winograd_loops import Emitter
from hwmpq.types import Workload

#: Bytes of transformed inputs or weights that the L2 cache keeps, and bytes per cycle of those it
#: keeps and of others, as far as products do not hide them.
_KEPT, _NEAR, _FAR = 320 * 1024, 128.0, 48.0
#: Measured cycles: to transform a vector of inputs of a tile, a step of weights of a vector of
#: channels and the sums of a vector of channels of a tile; to begin and end a block of products
#: and each vector of it.
_DATA, _WEIGHT, _RESULT, _BEGIN, _VECTOR = 110.0, 100.0, 120.0, 10.0, 2.0
#: Estimated slowdown of what is not counted: it replaces the direct nest where it wins clearly.
_DOUBT = 1.32


@dataclass(frozen=True)
class Cycles:
    """Estimated cycles of a call by what they are spent on; stream: operands from L2 and beyond."""

    products: float
    data: float
    weights: float
    results: float
    stream: float

    @property
    def total(self) -> float:
        return self.products + self.data + self.weights + self.results + self.stream


def cycles(t: Tiling, schedule: Schedule, micro: Micro, fmt: Format) -> Cycles:
    """The estimate that orders schedules and kernels, and that the predictor starts from."""
    block = t.block(schedule)
    times = -(-t.tiles // block)
    rows = min(schedule.rows, block)
    one = sum(
        n * (micro.cycles(rows, v, fmt) * micro.kstep * t.used + _BEGIN + rows * v * _VECTOR)
        for n, v in blocks(t.vectors, schedule.vectors)
    )
    weights = t.vectors * t.steps * t.width * POINTS * 2
    inputs = t.tiles * t.depth * POINTS * 2
    kept, passes = weights, times
    if schedule.order == "vectors":
        kept, passes = inputs, -(-t.vectors // schedule.vectors)
    return Cycles(
        times * -(-block // rows) * POINTS * one,
        times * block * -(-t.g.cin // t.width) * _DATA,
        t.vectors * t.steps * _WEIGHT,
        times * block * t.vectors * _RESULT,
        kept * passes / (_NEAR if kept <= _KEPT else _FAR),
    )


@cache
def _ordered(t: Tiling, micro: Micro, fmt: Format) -> tuple[tuple[float, Schedule], ...]:
    """(estimate, schedule) of the register blocks that fit, in both orders, best first."""
    found = [
        Schedule(rows, vectors, order)
        for rows in range(1, min(8, t.tiles) + 1)
        for vectors in range(1, min(2, t.vectors) + 1)
        if rows * vectors + vectors + micro.spare <= micro.registers
        for order in ("vectors", "rows")
    ]
    costs = [(cycles(t, schedule, micro, fmt).total, schedule) for schedule in found]
    return tuple(sorted(costs, key=lambda c: (round(c[0]), -c[1].rows * c[1].vectors, c[1].text)))


class Winograd(Nest):
    name = "winograd"
    ops = ("conv2d",)

    def why_not(self, workload: Workload, fmt: Format, micro: Micro) -> str | None:
        if workload.op not in self.ops:
            return f"the winograd nest does not run {workload.op}"
        g = Geometry.of(workload)
        if (g.kh, g.kw, g.sh, g.sw, g.dh, g.dw, g.groups) != (3, 3, 1, 1, 1, 1, 1):
            return "the winograd nest runs 3 × 3 windows, stride 1, no dilation, no groups"
        if micro.a_dtype != "int16" or not fmt.is_integer:
            return f"the winograd nest multiplies 16-bit integers, {micro.name} does not"
        largest = max(fmt.weight.qmax, -fmt.weight.qmin)
        deepest = (LIMIT - 1) // int(9 * fmt.activation.qmax * largest)
        if g.cin > deepest:
            return f"the winograd nest sums {fmt.name} exactly up to {deepest} channels"
        return None

    def channels(self, workload: Workload, micro: Micro) -> int:
        return conv2d.NEST.channels(workload, micro)

    def pad(self, values: NDArray[Any], workload: Workload, micro: Micro) -> NDArray[Any]:
        return conv2d.NEST.pad(values, workload, micro)

    def pack(
        self, codes: NDArray[Any], workload: Workload, micro: Micro, decoder: Decoder
    ) -> NDArray[Any]:
        """[vectors][steps][9 taps] vectors of [lanes][kstep]."""
        t = Tiling.of(workload, micro, decoder.unit)
        wide = np.zeros((t.vectors * micro.lanes, t.steps * micro.kstep, 9), codes.dtype)
        wide[: t.g.cout, : t.g.cin] = codes.reshape(t.g.cout, t.g.cin, 9)
        steps = wide.reshape(t.vectors, micro.lanes, t.steps, micro.kstep, 9)
        return decoder.pack(steps.transpose(0, 2, 4, 1, 3).reshape(-1, t.width))

    def schedules(self, call: Call, micro: Micro) -> list[Schedule]:
        t = Tiling.of(call.workload, micro, 1)
        return [schedule for _, schedule in _ordered(t, micro, call.format)]

    def products(self, workload: Workload, micro: Micro) -> int:
        t = Tiling.of(workload, micro, 1)
        return t.tiles * POINTS * t.g.cin * t.g.cout

    def estimate(self, workload: Workload, fmt: Format, micro: Micro) -> float:
        t = Tiling.of(workload, micro, 1)
        return _DOUBT * _ordered(t, micro, fmt)[0][0] / workload.macs

    def body(
        self, ir: IR, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule, bufs: Buffers
    ) -> None:
        t = Tiling.of(call.workload, micro, decoder.unit)
        Emitter(ir, call, micro, decoder, schedule, bufs, t).emit()


NEST = Winograd()
