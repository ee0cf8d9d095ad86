"""Depthwise convolution by the threads of a GPU: each has one pixel of four neighbouring channels,
or of one where the channels are no multiple of four.

Weights lie as [kernel row][kernel column][channel], a byte or more each. Schedule: rows = threads
of a block.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from hwmpq.formats import Format
from hwmpq.kernels.codes import to_f32
from hwmpq.kernels.cuda.ir import CudaIR
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.kernels.micro import Micro
from hwmpq.kernels.micro.cuda import ThreadMicro, stored_as_is
from hwmpq.kernels.nests import Buffers, Call, Nest, Schedule
from hwmpq.requantize import Z_IN
from hwmpq.types import Workload

_THREADS = (128, 256, 64)


class ThreadDepthwise(Nest):
    name = "thread_depthwise"
    ops = ("depthwise",)
    on_gpu = True

    def runs(self, micro: Micro) -> bool:
        return isinstance(micro, ThreadMicro)

    def builder(self, call: Call) -> IR:
        return CudaIR()

    def decoder(self, encoding: str, micro: Micro) -> Decoder | None:
        return stored_as_is(encoding)

    def why_not(self, workload: Workload, fmt: Format, micro: Micro) -> str | None:
        return None

    def channels(self, workload: Workload, micro: Micro) -> int:
        return workload["cout"]

    def pad(self, values: NDArray[Any], workload: Workload, micro: Micro) -> NDArray[Any]:
        return values

    def pack(
        self, codes: NDArray[Any], workload: Workload, micro: Micro, decoder: Decoder
    ) -> NDArray[Any]:
        return decoder.pack(codes.reshape(len(codes), -1).T)

    def schedules(self, call: Call, micro: Micro) -> list[Schedule]:
        return [Schedule(threads, 1) for threads in _THREADS]

    def body(
        self, ir: IR, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule, bufs: Buffers
    ) -> None:
        assert isinstance(ir, CudaIR)
        w, (oh, ow) = call.workload, call.workload.out_hw
        channels = w["cout"]
        lanes = 4 if channels % 4 == 0 else 1
        items = w["n"] * oh * ow * (channels // lanes)
        with ir.grid((-(-items // schedule.rows), 1), schedule.rows) as (block, _, thread):
            item = ir.let(block * schedule.rows + thread)
            with ir.when(ir.less(item, items)):
                channel = ir.let(item % (channels // lanes) * lanes)
                pixel = ir.let(item // (channels // lanes))
                acc = ir.local(lanes, micro.acc_dtype)
                ir.store(acc, 0, ir.const(0, micro.acc_dtype, lanes), lanes)
                _taps(ir, call, micro, decoder, bufs, acc, pixel, channel, lanes)
                at = ir.let(pixel * channels + channel)
                bufs.epilogue.store(ir, ir.load(acc, 0, lanes), channel, at, lanes, lanes)


def _taps(
    ir: CudaIR, call: Call, micro: Micro, decoder: Decoder, bufs: Buffers, acc: Buffer, pixel: Expr,
    channel: Expr, lanes: int,
) -> None:  # fmt: skip
    """acc += every tap's activations · weights; beside the image lies the zero point."""
    w, (oh, ow) = call.workload, call.workload.out_hw
    channels, dtype = w["cout"], micro.acc_dtype
    top = ir.let(pixel // ow % oh * w["sh"] - w["pt"])
    left = ir.let(pixel % ow * w["sw"] - w["pl"])
    image = ir.let(pixel // (oh * ow) * w["h"])
    x, by = ir.local(lanes, dtype), ir.local(lanes, dtype)
    zero = ir.let(ir.cast(ir.load(bufs.scalars, Z_IN), dtype))
    for tap in range(w["kh"] * w["kw"]):
        row = ir.let(top + tap // w["kw"] * w["dh"])
        column = ir.let(left + tap % w["kw"] * w["dw"])
        inside = ir.both(ir.between_bounds(row, w["h"]), ir.between_bounds(column, w["w"]))
        ir.store(x, 0, ir.broadcast(zero, lanes), lanes)
        with ir.when(inside):
            at = ((image + row) * w["w"] + column) * channels + channel
            ir.store(x, 0, _number(ir, ir.load(bufs.x, at, lanes), call.x, dtype, lanes), lanes)
        weight = ir.load(bufs.weight, tap * channels + channel, lanes)
        ir.store(by, 0, _number(ir, weight, decoder.encoding, dtype, lanes), lanes)
        for lane in range(lanes):
            a, b, c = (ir.load(of, lane) for of in (x, by, acc))
            ir.store(acc, lane, micro.dot(ir, c, a, b))


def _number(ir: IR, value: Expr, encoding: str, dtype: str, lanes: int) -> Expr:
    """A stored element as it is multiplied."""
    return ir.cast(value, dtype, lanes) if dtype == "int32" else to_f32(ir, value, encoding, lanes)


NEST = ThreadDepthwise()
