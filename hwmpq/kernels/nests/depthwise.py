"""Depthwise convolution: vectors run over channels, every distinct input vector is loaded once.

Integers are widened to 32 bit first, so that any integer micro-kernel multiplies lane by lane: the
other factors of its dot are then the zero bytes of the widened activation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.formats import Format
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.kernels.micro import Micro
from hwmpq.kernels.nests import Buffers, Call, Nest, Schedule
from hwmpq.kernels.nests.gemm import Geometry, copy_padded
from hwmpq.types import Workload


class Depthwise(Nest):
    name = "depthwise"
    ops = ("depthwise",)

    def why_not(self, workload: Workload, fmt: Format, micro: Micro) -> str | None:
        if micro.partial_dtype:
            return f"{micro.name} sums neighbouring channels, which a depthwise kernel must not"
        return None

    def weight_dtype(self, micro: Micro) -> str:
        return "float32" if micro.acc_dtype == "float32" else "int8"

    def channels(self, workload: Workload, micro: Micro) -> int:
        return -(-workload["cout"] // micro.lanes) * micro.lanes

    def pad(self, values: NDArray[Any], workload: Workload, micro: Micro) -> NDArray[Any]:
        return np.pad(values, (0, self.channels(workload, micro) - values.size))

    def _steps(self, workload: Workload, decoder: Decoder) -> int:
        """Taps, padded to whole blocks of the decoder."""
        return -(-workload["kh"] * workload["kw"] // decoder.unit) * decoder.unit

    def pack(
        self, codes: NDArray[Any], workload: Workload, micro: Micro, decoder: Decoder
    ) -> NDArray[Any]:
        taps = workload["kh"] * workload["kw"]
        wide = np.zeros(
            (self.channels(workload, micro), self._steps(workload, decoder)), codes.dtype
        )
        wide[: workload["cout"], :taps] = codes.reshape(workload["cout"], taps)
        vectors = wide.reshape(-1, micro.lanes, wide.shape[1]).transpose(0, 2, 1)
        return decoder.pack(vectors.reshape(-1, micro.lanes))

    def schedules(self, call: Call, micro: Micro) -> list[Schedule]:
        width = call.workload.out_hw[1]
        sizes = [4, 3, 2, 6, 1]
        sizes.sort(key=lambda rows: width % rows > 0)
        return [Schedule(min(rows, width), 1, "rows") for rows in sizes]

    def body(
        self, ir: IR, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule, bufs: Buffers
    ) -> None:
        g = Geometry.of(call.workload)
        dtype = "float32" if micro.acc_dtype == "float32" else "uint8"
        ragged = g.cin % micro.lanes != 0
        source = copy_padded(ir, g, bufs, call.x, dtype, 32, force=ragged)
        weights, steps = self._weights(ir, call, micro, decoder, bufs)
        oh, ow = g.out
        vectors = g.cin // micro.lanes
        rows = schedule.rows

        def column(image: Expr, row: Expr, start: Expr, count: int) -> None:
            with ir.loop(vectors) as vector:
                block(image, row, start, count, vector, micro.lanes)
            if ragged:
                block(image, row, start, count, vectors, g.cin % micro.lanes)

        def block(
            image: Expr, row: Expr, start: Expr, count: int, vector: Expr, valid: int
        ) -> None:
            acc = _accumulate(
                ir, g, micro, source, weights, steps, image, row, start, count, vector
            )
            for i, value in enumerate(acc):
                at = ((image * oh + row) * ow + start + i) * g.cout + vector * micro.lanes
                bufs.epilogue.store(ir, value, vector * micro.lanes, at, micro.lanes, valid)

        with ir.loop(g.n) as image, ir.loop(oh, call.threads > 1) as row:
            with ir.loop(ow // rows) as group:
                column(image, row, group * rows, rows)
            if ow % rows:
                column(image, row, ow // rows * rows, ow % rows)

    def _weights(
        self, ir: IR, call: Call, micro: Micro, decoder: Decoder, bufs: Buffers
    ) -> tuple[Buffer, int]:
        """The weights as float32 or int8, and the steps between vectors."""
        steps = self._steps(call.workload, decoder)
        if decoder.identity:
            return bufs.weight, steps
        vectors = self.channels(call.workload, micro) // micro.lanes
        dtype = self.weight_dtype(micro)
        tile = ir.scratch(vectors * steps * micro.lanes, dtype)
        with ir.loop(vectors * steps // decoder.unit) as block:
            decoder.expand(
                ir, bufs.weight, block * decoder.rows * micro.lanes, tile,
                block * decoder.unit * micro.lanes,
                micro.lanes,
            )  # fmt: skip
        return tile, steps


def _accumulate(
    ir: IR, g: Geometry, micro: Micro, source: Buffer, weights: Buffer, steps: int,
    image: Expr, row: Expr, start: Expr, count: int, vector: Expr,
) -> list[Expr]:  # fmt: skip
    """Accumulators of `count` neighbouring pixels of one channel vector."""
    height, width = g.padded
    lanes = micro.lanes
    floats = micro.acc_dtype == "float32"
    acc = ir.local(count * lanes, micro.acc_dtype)
    for i in range(count):
        ir.store(acc, i * lanes, ir.const(0, micro.acc_dtype, lanes), lanes)

    def widened(value: Expr, dtype: str) -> Expr:
        if floats:
            return ir.let(value)
        wide = ir.cast(value, "int32", lanes)
        return ir.let(ir.reinterpret(wide, dtype, lanes * micro.kstep))

    with ir.loop(g.kh) as i:
        at = ((image * height + row * g.sh + i * g.dh) * width + start * g.sw) * g.cin
        loaded: dict[int, Expr] = {}
        for j in range(g.kw):
            tap = ((vector * steps) + i * g.kw + j) * lanes
            w = widened(ir.load(weights, tap, lanes), micro.w_dtype)
            for pixel in range(count):
                column = pixel * g.sw + j * g.dw
                if column not in loaded:
                    raw = ir.load(source, at + column * g.cin + vector * lanes, lanes)
                    loaded[column] = widened(raw, micro.a_dtype)
                value = micro.dot(ir, ir.load(acc, pixel * lanes, lanes), loaded[column], w)
                ir.store(acc, pixel * lanes, value, lanes)
    return [ir.load(acc, i * lanes, lanes) for i in range(count)]


NEST = Depthwise()
