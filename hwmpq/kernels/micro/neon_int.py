"""Exact integer products on ARM: byte products summed in int16, SDOT and USDOT.

SMULL multiplies signed bytes into int16, SMLAL adds a second product: two fit as long as no weight
is -128, which the formats guarantee, and narrower weights leave room for more. SADALP adds pairs of
them to int32 sums. Three instructions make sixteen products of bytes, with 4-bit weights two do.
Unsigned activations are brought to signed bytes (`Micro.offset`), but for USDOT.
Sources: Arm Architecture Reference Manual for A-profile, SMULL, SMLAL, SADALP, SDOT (vector),
USDOT (vector).
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmpq.formats import Format
from hwmpq.kernels.ir import IR, Expr
from hwmpq.kernels.micro import IntegerMicro


@dataclass(frozen=True)
class BytePairs(IntegerMicro):
    """s8 × s8 into int16 partial sums, whose pairs are added to int32 before they can overflow.

    A vector of eight channels is two registers of sums, and two of partial sums.
    """

    def block_registers(self, rows: int, vectors: int) -> int:
        return 2 * rows * vectors + vectors + self.spare

    def run_length(self, fmt: Format) -> int:
        # Beyond 16 the widening is already below 4 % of the work; longer runs only grow the code.
        activation = self.offset(fmt) or fmt.activation.qmax
        return min(32767 // int(activation * fmt.weight.qmax), 16)

    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        return self.widen(ir, acc, self.partial(ir, a, w))

    def partial(self, ir: IR, a: Expr, w: Expr) -> Expr:
        name = "llvm.aarch64.neon.smull.v8i16"
        products = [
            ir.intrinsic(name, "int16x8", ir.shuffle(a, half), ir.shuffle(w, half))
            for half in _HALVES
        ]
        return ir.concatenate(products, 8)

    def widen(self, ir: IR, acc: Expr, partial: Expr) -> Expr:
        name = "llvm.aarch64.neon.saddlp.v4i32.v8i16"
        sums = [ir.intrinsic(name, "int32x4", ir.shuffle(partial, half)) for half in _HALVES]
        return acc + ir.concatenate(sums, 4)

    def cycles(self, rows: int, vectors: int, fmt: Format) -> float:
        # One of these per cycle (Arm Cortex-A72 software optimization guide: F0, F1 for SADALP).
        dots = rows * vectors * 2 * (1.0 + 1.0 / self.run_length(fmt))
        return max(dots + (rows + vectors) / 2, 4.0) / 2


@dataclass(frozen=True)
class DotBytes(IntegerMicro):
    """acc += Σ of four products of bytes."""

    intrinsic: str = ""

    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        return ir.intrinsic(self.intrinsic, "int32x4", acc, a, w)

    def cycles(self, rows: int, vectors: int, fmt: Format) -> float:
        # Latency 4 with forwarding of 1, two per cycle (Arm Cortex-A76 optimization guide); signed
        # activations cost a copy of the input.
        copied = 0.01 if self.offset(fmt) else 0.0
        return max(rows * vectors / 2 + (rows + vectors) / 4, 2.0) / 4 + copied


_HALVES = (list(range(8)), list(range(8, 16)))
MICROS = (
    BytePairs(
        "neon_smull", frozenset({"neon"}), 8, 2, "int8", "int8", "int32", 16, 16,
        spare=2, partial_dtype="int16", partial_lanes=16,
    ),
    DotBytes(
        "neon_sdot", frozenset({"neon", "dotprod"}), 4, 4, "int8", "int8", "int32", 32, 16,
        spare=2, ahead=4, intrinsic="llvm.aarch64.neon.sdot.v4i32.v16i8",
    ),
    DotBytes(
        "neon_usdot", frozenset({"neon", "i8mm"}), 4, 4, "uint8", "int8", "int32", 32, 16,
        spare=2, ahead=4, intrinsic="llvm.aarch64.neon.usdot.v4i32.v16i8",
    ),
)  # fmt: skip
