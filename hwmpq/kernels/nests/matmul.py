"""Batched matrix product of two activations (attention): b is packed as weights are, when it runs.

Arguments of the kernel: x = a [b, m, k]; weight = b [b, n, k] or [b, k, n], as it is stored. The
zero point of a is taken off by the column sums of b.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.formats import Format
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.ir import IR
from hwmpq.kernels.micro import Micro
from hwmpq.kernels.nests import Buffers, Call, Nest, Schedule
from hwmpq.kernels.nests.gemm import Emitter, schedules
from hwmpq.types import Workload


class Matmul(Nest):
    name = "matmul"
    ops = ("matmul",)

    def why_not(self, workload: Workload, fmt: Format, micro: Micro) -> str | None:
        if fmt.is_integer and fmt.name != "w8a8":
            return "a matmul of two activations runs in floats and w8a8"
        if fmt.weight.name != fmt.activation.name and not fmt.is_integer:
            return f"both operands of a matmul are activations: {fmt.name} narrows only weights"
        return None

    def channels(self, workload: Workload, micro: Micro) -> int:
        return -(-workload["n"] // micro.lanes) * micro.lanes

    def pad(self, values: NDArray[Any], workload: Workload, micro: Micro) -> NDArray[Any]:
        return np.pad(values, (0, self.channels(workload, micro) - values.size))

    def pack(
        self, codes: NDArray[Any], workload: Workload, micro: Micro, decoder: Decoder
    ) -> NDArray[Any]:
        raise ValueError("a matmul has no weights to pack")

    def schedules(self, call: Call, micro: Micro) -> list[Schedule]:
        return schedules(call, micro)

    def body(
        self, ir: IR, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule, bufs: Buffers
    ) -> None:
        Emitter(ir, call, micro, decoder, schedule, bufs).emit()


NEST = Matmul()
