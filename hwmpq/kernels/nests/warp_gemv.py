"""A linear layer of at most eight rows, which is bound by the bytes of its weights.

The warps of a block share the lines of eight channels among them, straight from memory into
registers, and add their sums up in shared memory at the end. Schedule: vectors = warps of a block.
"""

from __future__ import annotations

from math import gcd

from hwmpq.formats import Format
from hwmpq.kernels.cuda.decode import LINE
from hwmpq.kernels.cuda.ir import CudaIR
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.ir import IR, Address, Buffer, Expr
from hwmpq.kernels.micro import Micro
from hwmpq.kernels.micro.cuda import WarpMicro
from hwmpq.kernels.nests import Buffers, Call, Schedule
from hwmpq.kernels.nests.warp_gemm import WarpGemm
from hwmpq.types import Workload

_ROWS, _WARPS = 8, (8, 4, 16)


class WarpGemv(WarpGemm):
    name = "warp_gemv"
    ops = ("linear",)
    on_gpu = True

    def runs(self, micro: Micro) -> bool:
        return isinstance(micro, WarpMicro) and micro.tensor_cores

    def why_not(self, workload: Workload, fmt: Format, micro: Micro) -> str | None:
        if workload["m"] > _ROWS:
            return f"the {self.name} nest multiplies {_ROWS} rows at most"
        return super().why_not(workload, fmt, micro)

    def estimate(self, workload: Workload, fmt: Format, micro: Micro) -> float:
        """Before the tiles of `warp_gemm`, of which so few rows would fill a part."""
        return super().estimate(workload, fmt, micro) / 2

    def schedules(self, call: Call, micro: Micro) -> list[Schedule]:
        return [Schedule(_ROWS, warps) for warps in _WARPS]

    def body(
        self, ir: IR, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule, bufs: Buffers
    ) -> None:
        assert isinstance(ir, CudaIR) and isinstance(micro, WarpMicro)
        w, warps = call.workload, schedule.vectors
        lines, eights = -(-w["k"] // micro.kstep), -(-w["n"] // 8)
        with ir.grid((eights, 1), warps * 32) as (eight, _, thread):
            warp, lane = ir.let(thread // 32), ir.let(thread % 32)
            words = ir.view(ir.block_memory(warps * 256), warps * 256, micro.acc_dtype)
            total = _zeros(ir, micro)
            part = total if bufs.scales is None else _zeros(ir, micro)
            a, b = ir.local(4, "uint32"), ir.local(4, "uint32")
            with ir.loop(-(-lines // warps)) as turn:
                line = ir.let(turn * warps + warp)
                with ir.when(ir.less(line, lines)):
                    block = ((line * eights + eight) * 32 + lane) * decoder.rows
                    decoder.expand(ir, bufs.weight, block, b, 0, 32)
                    for half in range(2):
                        _row_words(ir, call, micro, bufs.x, a, line * 2 + half, lane)
                        b_half = Address(b, half * 2)
                        ir.device(micro.function, Address(part, 0), Address(a, 0), b_half)
                    if bufs.scales is not None:
                        _scaled(ir, call, micro, bufs.scales, total, part, line, eight * 8, lane)
            for column in range(2):
                ir.store(words, (warp * 32 + lane) * 2 + column, ir.load(total, column))
            ir.synchronize()
            row, channel = ir.let(thread // 8), ir.let(eight * 8 + thread % 8)
            with ir.when(ir.both(ir.less(row, w["m"]), ir.less(channel, w["n"]))):
                acc = ir.load(words, thread)
                for other in range(1, warps):
                    acc = acc + ir.load(words, other * 64 + thread)
                at = ir.let(row * w["n"] + channel)
                bufs.epilogue.store(ir, ir.let(acc), channel, at, 1, 1)


def _zeros(ir: CudaIR, micro: WarpMicro) -> Buffer:
    sums = ir.local(4, micro.acc_dtype)
    for i in range(4):
        ir.store(sums, i, ir.const(0, micro.acc_dtype))
    return sums


def _row_words(
    ir: CudaIR, call: Call, micro: WarpMicro, x: Buffer, a: Buffer, half: Expr, lane: Expr
) -> None:
    """A thread's words of half a line of its row of activations; rows 8 to 15 are zero."""
    w, size = call.workload, LINE // micro.kstep
    nbytes = gcd(w["k"] * size, 4)
    for i in range(4):
        ir.store(a, i, ir.const(0, "uint32"))
    row = ir.let(lane // 4)
    for i, first in ((0, 0), (2, LINE // 4)):
        for piece in range(0, 4, nbytes):
            element = ir.let((half * (LINE // 2) + first + lane % 4 * 4 + piece) // size)
            with ir.when(ir.both(ir.less(row, w["m"]), ir.less(element, w["k"]))):
                place = Address(x, row * w["k"] + element)
                bits = ir.value(f"load_bytes<{nbytes}>", "uint32", place)
                shift = ir.const(8 * piece, "uint32")
                ir.store(a, i, ir.load(a, i) | (bits << shift))


def _scaled(
    ir: CudaIR, call: Call, micro: WarpMicro, scales: Buffer, total: Buffer, part: Buffer,
    line: Expr, channel: Expr, lane: Expr,
) -> None:  # fmt: skip
    """total += the sums of one line · the scales of its group; the sums begin anew."""
    group = call.format.group
    assert group is not None
    row = line // (group // micro.kstep) * (-(-call.workload["n"] // 8) * 8)
    for column in range(2):
        scale = ir.load(scales, row + channel + lane % 4 * 2 + column)
        value = ir.fma(ir.load(part, column), scale, ir.load(total, column))
        ir.store(total, column, value)
        ir.store(part, column, ir.const(0, "float32"))


NEST = WarpGemv()
