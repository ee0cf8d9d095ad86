"""NVIDIA tensor cores, `mma.sync`: a warp multiplies 16 rows by 8 channels, 32 bytes deep.

Codes of activations are unsigned bytes, of weights signed ones, as these instructions take them:
nothing is subtracted. Narrower weights are decoded in registers. Single precision runs on the
ordinary units (tensor cores would round its operands to TF32), tile by tile alike. 4-bit products
are not used: activations lie in memory a byte each, and from compute capability 9.0 on there are no
units for them. Source: PTX ISA 8.5, section 9.7.14.5 (warp-level matrix multiply-accumulate).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.formats import Format
from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.kernels.micro import Micro
from hwmpq.types import Execution


@dataclass(frozen=True)
class WarpMicro(Micro):
    """d (16 × 8 sums of a warp) += a · b, tiles of 64 bytes of the reduction.

    w_dtype: the encoding that weights are decoded to; kstep: elements of such 64 bytes.
    function: the device function. activations: the encodings that are multiplied as they lie.
    speed: multiply-accumulates of a multiprocessor's cycle. widened: the chip converts the operands
    before it multiplies.
    """

    function: str = ""
    activations: tuple[str, ...] = ()
    speed: float = 0.0
    widened: bool = False

    @property
    def tensor_cores(self) -> bool:
        return self.function.startswith("mma_")

    def why_not(self, fmt: Format) -> str | None:
        if fmt.activation.name not in self.activations:
            taken = ", ".join(self.activations)
            return f"{self.name} multiplies activations in {taken}, not {fmt.activation.name}"
        if fmt.is_integer and self.acc_dtype != "int32":
            return f"{self.name} multiplies floats"
        return None

    def execution(self, fmt: Format) -> Execution:
        whole = fmt.weight.name == self.w_dtype and not self.widened
        return "native" if whole else "storage-only"

    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        raise ValueError(f"{self.name} multiplies tiles of a warp, not vectors")

    def cycles(self, rows: int, vectors: int, fmt: Format) -> float:
        return rows * vectors * self.lanes * self.kstep / self.speed


def _micro(
    function: str, feature: str, weight: str, activations: tuple[str, ...], acc: str, speed: float,
    widened: bool = False,
) -> WarpMicro:  # fmt: skip
    dtype = memory_dtype(activations[0])
    return WarpMicro(
        function + "_widened" * widened, frozenset({feature}), 8, 64 // np.dtype(dtype).itemsize,
        dtype, weight, acc, 255, 16,
        function=function, activations=activations, speed=speed, widened=widened,
    )  # fmt: skip


@dataclass(frozen=True)
class ThreadMicro(Micro):
    """One thread's multiply-add of numbers that are converted when they are loaded.

    activations: the encodings that it takes, with weights of any.
    """

    activations: tuple[str, ...] = ()

    def why_not(self, fmt: Format) -> str | None:
        if fmt.is_integer != (self.acc_dtype == "int32") or (
            fmt.activation.name not in self.activations
        ):
            return f"{self.name} multiplies {', '.join(self.activations)}, not {fmt.name}"
        return None

    def execution(self, fmt: Format) -> Execution:
        return "native" if fmt.name == "fp32" else "storage-only"

    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        return acc + a * w if self.acc_dtype == "int32" else ir.fma(a, w, acc)

    def cycles(self, rows: int, vectors: int, fmt: Format) -> float:
        return rows * vectors / 64


@cache
def stored_as_is(encoding: str) -> Decoder:
    """For a ThreadMicro: its conversion of weights is part of the loop."""
    dtype = memory_dtype(encoding)

    def pack(codes: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(codes).reshape(-1).astype(dtype)

    return Decoder(encoding, dtype, 1, 1, dtype, pack, _never, identity=True)


def _never(ir: IR, src: Buffer, src_at: Expr, dst: Buffer, dst_at: Expr, width: int) -> None:
    raise ValueError("weights of a thread are converted, not decoded")


def _thread(name: str, acc: str, activations: tuple[str, ...]) -> ThreadMicro:
    dtype = {"float32": "float32", "int32": "uint8"}[acc]
    return ThreadMicro(
        name, frozenset({"sm80"}), 1, 1, dtype, dtype, acc, 255, 4, activations=activations
    )


_CODES = tuple(f"u{bits}" for bits in range(8, 1, -1))
#: Speeds: dense products of compute capability 8.0 (NVIDIA A100 Tensor Core GPU Architecture,
#: table 1, per multiprocessor), to order kernels: later ones keep the ratios. 8.9 multiplies 8-bit
#: floats as they are; of 9.0 only `wgmma` does: the assembler makes conversions and HMMA of `mma`.
MICROS = (
    _micro("fma_fp32", "sm80", "fp32", ("fp32",), "float32", 64),
    _micro("mma_fp16", "sm80", "fp16", ("fp16",), "float32", 1024),
    _micro("mma_bf16", "sm80", "bf16", ("bf16",), "float32", 1024),
    _micro("mma_int8", "sm80", "s8", _CODES, "int32", 2048),
    _micro("mma_e4m3", "sm89", "e4m3", ("e4m3",), "float32", 2048),
    _micro("mma_e5m2", "sm89", "e5m2", ("e5m2",), "float32", 2048),
    _micro("mma_e4m3", "sm90", "e4m3", ("e4m3",), "float32", 1024, widened=True),
    _micro("mma_e5m2", "sm90", "e5m2", ("e5m2",), "float32", 1024, widened=True),
    _thread("thread_float", "float32", ("fp32", "fp16", "bf16", "e4m3", "e5m2")),
    _thread("thread_int", "int32", _CODES),
)
