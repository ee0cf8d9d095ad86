"""Instructions that this CPU lacks, spelt out in plain TIR: for conformance, never for timing.

The loops, packing, tails and epilogue of a kernel are emitted as they are; only the intrinsic is
replaced by what its manual says it does. LLVM splits wide vectors into those the CPU has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.ir import IR, Expr
from hwmpq.kernels.micro import Micro
from hwmpq.kernels.nests import Call, Nest, Schedule, arguments


class EmulatedIR(IR):
    """An IR whose dot-product intrinsics are arithmetic."""

    def intrinsic(self, name: str, dtype: str, *args: Expr) -> Expr:
        if name in _MEANING:
            return _MEANING[name](self, dtype, *args)
        return super().intrinsic(name, dtype, *args)


def emit_emulated(
    nest: Nest, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule
) -> Any:
    """As `nests.emit`, with emulated intrinsics."""
    ir = EmulatedIR()
    with ir.function():
        buffers = arguments(ir, nest, call, micro, decoder)
        nest.body(ir, call, micro, decoder, schedule, buffers)
    return ir.result()


def _vpdpbusd(ir: IR, dtype: str, acc: Expr, a: Expr, w: Expr) -> Expr:
    """acc + Σ of four u8 · s8 products per 32-bit lane, wrapping.

    Source: Intel Intrinsics Guide, _mm256_dpbusd_epi32 and _mm512_dpbusd_epi32.
    """
    lanes = int(dtype.removeprefix("int32x"))
    a32, w32 = (ir.let(ir.reinterpret(v, "int32", lanes)) for v in (a, w))

    def c(value: int) -> Expr:
        return ir.const(value, "int32", lanes)

    for byte in range(4):
        unsigned = (a32 >> c(8 * byte)) & c(255)
        signed = (w32 << c(24 - 8 * byte)) >> c(24)
        acc = acc + unsigned * signed
    return acc


_MEANING: dict[str, Callable[..., Expr]] = {
    "llvm.x86.avx512.vpdpbusd.256": _vpdpbusd,
    "llvm.x86.avx512.vpdpbusd.512": _vpdpbusd,
}
