"""Loop nests: one operator per file, over any micro-kernel, decoder and epilogue.

A file defines `NEST`, the folder is the registry.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from math import prod
from pkgutil import iter_modules
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.formats import Format
from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.decode import Decoder, decoder
from hwmpq.kernels.epilogue import EpilogueEmitter
from hwmpq.kernels.ir import IR, Buffer
from hwmpq.kernels.micro import Micro, TileMicro
from hwmpq.kernels.micro.cuda import ThreadMicro, WarpMicro
from hwmpq.requantize import SCALARS
from hwmpq.types import Workload


@dataclass(frozen=True)
class Call:
    """One use of a kernel: the workload in a format, and how its tensors lie in memory.

    x, out, residual: encodings ('' = no residual); b: that of a matmul's second operand.
    """

    workload: Workload
    format: Format
    x: str
    out: str
    residual: str = ""
    b: str = ""
    threads: int = 1


@dataclass(frozen=True)
class Schedule:
    """rows × vectors: the register block; order: which loop is outside, 'vectors' or 'rows'.

    On a GPU the tile of a block of threads, and how many lines of it are under way: 'stages3'.
    """

    rows: int
    vectors: int
    order: str = "vectors"

    @property
    def text(self) -> str:
        """Such as 6x2.vectors."""
        return f"{self.rows}x{self.vectors}.{self.order}"

    @staticmethod
    def parse(text: str) -> Schedule:
        """The reverse of `text`. Raises InputError."""
        match = re.fullmatch(r"(\d+)x(\d+)\.(vectors|rows|stages\d)", text)
        if match is None:
            raise InputError("schedule", repr(text), "such as 6x2.vectors or 4x3.rows")
        return Schedule(int(match[1]), int(match[2]), match[3])


class Nest(ABC):
    """Loops of one operator. All tensors are flat in memory, images channels-last."""

    name: str
    ops: tuple[str, ...]
    #: whether it multiplies tiles: it runs on a TileMicro, other nests on all other ones
    tiled: bool = False
    #: whether it applies scales of groups of weights
    grouped: bool = False
    #: whether it is for blocks of a GPU's threads
    on_gpu: bool = False

    def runs(self, micro: Micro) -> bool:
        """Whether it is made for that kind of micro-kernel."""
        on_gpu = isinstance(micro, WarpMicro | ThreadMicro)
        return not on_gpu and self.tiled == isinstance(micro, TileMicro)

    def builder(self, call: Call) -> IR:
        """What its loops are emitted with."""
        return IR(call.threads)

    def decoder(self, encoding: str, micro: Micro) -> Decoder | None:
        """From a weight encoding to what the micro-kernel multiplies, or None."""
        return decoder(encoding, self.weight_dtype(micro))

    @abstractmethod
    def why_not(self, workload: Workload, fmt: Format, micro: Micro) -> str | None:
        """None when the nest can run the workload on the micro-kernel, else the reason."""

    def weight_dtype(self, micro: Micro) -> str:
        """dtype to which the nest has its weights decoded."""
        return micro.w_dtype

    def takes_scales(self, micro: Micro) -> bool:
        """Whether scales of groups can be applied to what it multiplies: to floats of 32 bits."""
        return self.weight_dtype(micro) == "float32"

    @abstractmethod
    def channels(self, workload: Workload, micro: Micro) -> int:
        """Padded length of the multiplier and bias vectors."""

    @abstractmethod
    def pack(
        self, codes: NDArray[Any], workload: Workload, micro: Micro, decoder: Decoder
    ) -> NDArray[Any]:
        """Weight codes in torch's layout -> the flat packed array the kernel reads."""

    @abstractmethod
    def pad(self, values: NDArray[Any], workload: Workload, micro: Micro) -> NDArray[Any]:
        """Per-channel values [cout] -> [channels]."""

    @abstractmethod
    def schedules(self, call: Call, micro: Micro) -> list[Schedule]:
        """Sensible schedules, best estimate first."""

    def products(self, workload: Workload, micro: Micro) -> int:
        """Multiplications that the loops do for the workload's multiply-accumulates."""
        return workload.macs

    def estimate(self, workload: Workload, fmt: Format, micro: Micro) -> float:
        """Cycles per multiply-accumulate, to order kernels: those of a 4 × 2 block."""
        return micro.cycles(4, 2, fmt) / (8 * micro.lanes * micro.kstep) * micro.kstep

    @abstractmethod
    def body(
        self, ir: IR, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule, bufs: Buffers
    ) -> None:
        """Emit the loops."""

    def weight_elements(self, workload: Workload, micro: Micro, decoder: Decoder) -> int:
        """Length of the packed array."""
        zeros = np.zeros(workload.weight_shape, np.int8)
        return int(self.pack(zeros, workload, micro, decoder).size)


@dataclass(frozen=True)
class Buffers:
    """The flat arguments of a kernel."""

    x: Buffer
    weight: Buffer
    scalars: Buffer
    epilogue: EpilogueEmitter
    scales: Buffer | None = None


def arguments(ir: IR, nest: Nest, call: Call, micro: Micro, decoder: Decoder) -> Buffers:
    """Declare the arguments, in order: x, weight, [scales], multiplier, bias, scalars, [residual],
    out."""
    w = call.workload
    x = ir.arg("x", int(np.prod(w.in_shape)), memory_dtype(call.x))
    if w.has_weight:
        weight = ir.arg("weight", nest.weight_elements(w, micro, decoder), decoder.memory)
    else:
        weight = ir.arg("b", int(np.prod(w.weight_shape)), memory_dtype(call.b))
    channels = nest.channels(w, micro)
    scales = None
    if call.format.group is not None:
        groups = call.format.scale_shape(w.weight_shape)[1]
        scales = ir.arg("scales", groups * channels, "float32")
    multiplier = ir.arg("multiplier", channels, "float32")
    bias = ir.arg("bias", channels, micro.acc_dtype)
    scalars = ir.arg("scalars", SCALARS, "float32")
    elements = int(np.prod(w.out_shape))
    residual = None
    if call.residual:
        residual = ir.arg("residual", elements, memory_dtype(call.residual))
    out = ir.arg("out", elements, memory_dtype(call.out))
    scaled = call.format.weight.scaled or not w.has_weight
    epilogue = EpilogueEmitter(
        micro.acc_dtype == "int32", call.out, call.residual, scaled,
        multiplier, bias, scalars, out, residual, _isa(micro),
    )  # fmt: skip
    return Buffers(x, weight, scalars, epilogue, scales)


def _isa(micro: Micro) -> Literal["", "avx2", "neon", "rvv"]:
    """That of an epilogue's own instructions."""
    if "avx2" in micro.requires and micro.lanes == 8:
        return "avx2"
    if "neon" in micro.requires:
        return "neon"
    return "rvv" if "v" in micro.requires else ""


#: Weights that a core reads in a cycle where each is multiplied once, whatever their width:
#: 1280 × 1000 of six bits took it 46 µs at 3.5 GHz (AMD Zen 3).
_WEIGHTS_A_CYCLE = 8


def least_cycles(call: Call, micro: Micro) -> float:
    """Estimated cycles of one thread that does nothing but read weights and multiply; of a grouped
    convolution those of one group, each of which is a parallel loop of its own."""
    w = call.workload
    block = 4 * 2 * micro.lanes * micro.kstep
    loops = w["groups"] if w.op == "conv2d" else 1
    reading = prod(w.weight_shape) / _WEIGHTS_A_CYCLE if w.has_weight else 0.0
    return (w.macs / block * micro.cycles(4, 2, call.format) + reading) / loops


def emit(nest: Nest, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule) -> Any:
    """The PrimFunc of a kernel; `call.threads` share its parallel loops."""
    ir = nest.builder(call)
    with ir.function():
        buffers = arguments(ir, nest, call, micro, decoder)
        with ir.importing(micro.llvm):
            nest.body(ir, call, micro, decoder, schedule, buffers)
    return ir.result()


@cache
def nests() -> tuple[Nest, ...]:
    """Every loop nest of the folder, sorted by name."""
    modules = (import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__))
    return tuple(sorted((m.NEST for m in modules if hasattr(m, "NEST")), key=lambda n: n.name))
