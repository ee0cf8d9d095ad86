"""Convolution, linear layer and batched product by the warps of a block, as an implicit GEMM.

A block of threads computes a tile of pixels × channels. The reduction (kernel row, kernel column,
channel) goes by in lines of 64 bytes: while one is multiplied, copies of the next ones into shared
memory are under way. What lies beside the image is filled with the zero point, what lies behind
the end of the reduction is multiplied by zero weights. Weights lie as `cuda.decode` says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.formats import Format
from hwmpq.kernels.cuda.decode import WORDS, decoder
from hwmpq.kernels.cuda.ir import CudaIR
from hwmpq.kernels.cuda.tile import Tile, tiles
from hwmpq.kernels.cuda.warp import WarpEmitter
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.ir import IR
from hwmpq.kernels.micro import Micro
from hwmpq.kernels.micro.cuda import WarpMicro
from hwmpq.kernels.nests import Buffers, Call, Nest, Schedule
from hwmpq.kernels.nests.image import Geometry
from hwmpq.types import Workload


class WarpGemm(Nest):
    name = "warp_gemm"
    ops: tuple[str, ...] = ("conv2d", "linear", "matmul")
    grouped = True
    on_gpu = True

    def runs(self, micro: Micro) -> bool:
        return isinstance(micro, WarpMicro)

    def builder(self, call: Call) -> IR:
        return CudaIR()

    def decoder(self, encoding: str, micro: Micro) -> Decoder | None:
        return decoder(encoding, micro.w_dtype)

    def takes_scales(self, micro: Micro) -> bool:
        """They are applied to sums."""
        return micro.acc_dtype == "float32"

    def why_not(self, workload: Workload, fmt: Format, micro: Micro) -> str | None:
        if workload.op == "matmul" and fmt.weight.name != micro.w_dtype:
            return f"both operands of a matmul are activations: {fmt.name} narrows only weights"
        if fmt.group is not None:
            g = Geometry.of(workload)
            if g.kh * g.kw > 1 or fmt.group % micro.kstep:
                return (
                    f"group scales are applied to whole lines of {micro.kstep} input channels: not "
                    f"{fmt.group} weights of a {g.kh} x {g.kw} kernel"
                )
        return None

    def channels(self, workload: Workload, micro: Micro) -> int:
        return Geometry.of(workload).channels(micro.lanes)

    def pad(self, values: NDArray[Any], workload: Workload, micro: Micro) -> NDArray[Any]:
        return Geometry.of(workload).spread(values, micro.lanes)

    def pack(
        self, codes: NDArray[Any], workload: Workload, micro: Micro, decoder: Decoder
    ) -> NDArray[Any]:
        """[groups][lines][eights of channels][threads of a warp][words]."""
        g = Geometry.of(workload)
        gin = g.cin // g.groups
        rows = codes.reshape(g.groups, g.gout, gin, g.kh, g.kw).transpose(0, 1, 3, 4, 2)
        depth = gin * g.kh * g.kw
        lines, eights = -(-depth // micro.kstep), -(-g.gout // 8)
        wide = np.zeros((g.groups, eights * 8, lines * micro.kstep), codes.dtype)
        wide[:, : g.gout, :depth] = rows.reshape(g.groups, g.gout, depth)
        size = WORDS * micro.kstep // 64  # elements of a thread
        if micro.w_dtype == "fp32":  # rows of 64 bytes, swizzled as those of activations
            chunks = wide.reshape(g.groups, eights, 8, lines, 4, 4).transpose(0, 3, 1, 2, 4, 5)
            order = np.arange(4)[None, :] ^ (np.arange(8)[:, None] >> 1 & 3)
            swizzled = np.take_along_axis(chunks, order[None, None, None, :, :, None], axis=4)
            return decoder.pack(swizzled.reshape(-1, 32, size))
        parts = wide.reshape(g.groups, eights, 8, lines, 4, 4, size // 4)
        return decoder.pack(parts.transpose(0, 3, 1, 2, 5, 4, 6).reshape(-1, 32, size))

    def weight_elements(self, workload: Workload, micro: Micro, decoder: Decoder) -> int:
        """Bytes, which depend on the width of the codes: zeros of another type tell nothing."""
        g = Geometry.of(workload)
        lines = -(-(g.cin // g.groups * g.kh * g.kw) // micro.kstep)
        return g.groups * lines * -(-g.gout // 8) * 32 * decoder.rows

    def schedules(self, call: Call, micro: Micro) -> list[Schedule]:
        assert isinstance(micro, WarpMicro)
        return [tile.schedule for tile in tiles(call, micro)]

    def body(
        self, ir: IR, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule, bufs: Buffers
    ) -> None:
        assert isinstance(ir, CudaIR) and isinstance(micro, WarpMicro)
        WarpEmitter(ir, call, micro, decoder, Tile.of(schedule), bufs).emit()


NEST = WarpGemm()
