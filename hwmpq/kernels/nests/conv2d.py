"""Convolution of any kernel, stride, dilation and groups; a linear layer is its 1 × 1 case."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.formats import Format
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.ir import IR
from hwmpq.kernels.micro import Micro
from hwmpq.kernels.nests import Buffers, Call, Nest, Schedule
from hwmpq.kernels.nests.gemm import Emitter, Packing, schedules
from hwmpq.kernels.nests.image import Geometry
from hwmpq.types import Workload


class Conv2d(Nest):
    name = "conv2d"
    ops = ("conv2d", "linear")
    grouped = True

    def why_not(self, workload: Workload, fmt: Format, micro: Micro) -> str | None:
        if workload.op not in self.ops:
            return f"the conv2d nest does not run {workload.op}"
        return None

    def channels(self, workload: Workload, micro: Micro) -> int:
        return Geometry.of(workload).channels(micro.lanes)

    def pad(self, values: NDArray[Any], workload: Workload, micro: Micro) -> NDArray[Any]:
        return Geometry.of(workload).spread(values, micro.lanes)

    def pack(
        self, codes: NDArray[Any], workload: Workload, micro: Micro, decoder: Decoder
    ) -> NDArray[Any]:
        g = Geometry.of(workload)
        p = Packing.of(g, micro, decoder.unit)
        gin, segments = g.cin // g.groups, len(g.taps)
        rows = codes.reshape(g.groups, g.gout, gin, g.kh, g.kw).transpose(0, 1, 3, 4, 2)
        rows = rows.reshape(g.groups, g.gout, segments, g.segment)
        wide = np.zeros(
            (g.groups, p.vectors * micro.lanes, segments, p.per_segment * micro.kstep), codes.dtype
        )
        wide[:, : g.gout, :, : g.segment] = rows
        steps = wide.reshape(
            g.groups, p.vectors, micro.lanes, segments * p.per_segment, micro.kstep
        ).transpose(0, 1, 3, 2, 4)
        vectors = np.zeros((g.groups * p.vectors, p.steps, p.width), codes.dtype)
        vectors[:, : segments * p.per_segment] = steps.reshape(g.groups * p.vectors, -1, p.width)
        return decoder.pack(vectors.reshape(-1, p.width))

    def schedules(self, call: Call, micro: Micro) -> list[Schedule]:
        return schedules(call, micro)

    def body(
        self, ir: IR, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule, bufs: Buffers
    ) -> None:
        Emitter(ir, call, micro, decoder, schedule, bufs).emit()


NEST = Conv2d()
