"""Exact integer products on plain AVX2, which has no u8 × s8 dot into int32.

`vpmaddubsw` multiplies u8 by s8 and adds pairs into *saturating* int16: exact only while
2 · amax · wmax · n ≤ 32767 for n summed dots. Narrow weights leave room: with 4-bit weights nine
dots fit, with 2-bit ones 64, so narrow weights are faster here, not only smaller. Eight-bit
weights leave none, and are multiplied as int16 by `vpmaddwd`.
Sources: Intel Intrinsics Guide, _mm256_maddubs_epi16 and _mm256_madd_epi16.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmpq.formats import Format
from hwmpq.kernels.ir import IR, Expr
from hwmpq.kernels.micro import IntegerMicro


@dataclass(frozen=True)
class MaddWords(IntegerMicro):
    """int16 × int16 pairs into int32."""

    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        return acc + ir.intrinsic("llvm.x86.avx2.pmadd.wd", "int32x8", a, w)

    def cycles(self, rows: int, vectors: int, fmt: Format) -> float:
        return max(rows * vectors * 0.5 + (rows + vectors) / 4, 2.0) / 2


@dataclass(frozen=True)
class MaddBytes(IntegerMicro):
    """u8 × s8 pairs into int16 partial sums, widened to int32 before they can overflow."""

    def why_not(self, fmt: Format) -> str | None:
        reason = super().why_not(fmt)
        if reason:
            return reason
        if self.run_length(fmt) < 1:
            return f"{self.name} would overflow its int16 sums with {fmt.name}"
        return None

    def run_length(self, fmt: Format) -> int:
        # Beyond 16 the widening is already below 4 % of the work; longer runs only grow the code.
        return min(32767 // int(2 * fmt.activation.qmax * fmt.weight.qmax), 16)

    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        return self.widen(ir, acc, self.partial(ir, a, w))

    def partial(self, ir: IR, a: Expr, w: Expr) -> Expr:
        return ir.intrinsic("llvm.x86.avx2.pmadd.ub.sw", "int16x16", a, w)

    def widen(self, ir: IR, acc: Expr, partial: Expr) -> Expr:
        ones = ir.const(1, "int16", 16)
        return acc + ir.intrinsic("llvm.x86.avx2.pmadd.wd", "int32x8", partial, ones)

    def cycles(self, rows: int, vectors: int, fmt: Format) -> float:
        dots = rows * vectors * (0.5 + 1.0 / max(self.run_length(fmt), 1))
        return max(dots + (rows + vectors) / 4, 2.0) / 4


MICROS = (
    MaddWords(
        "avx2_madd16", frozenset({"avx2"}), 8, 2, "int16", "int16", "int32", 16, 32,
        spare=2,
    ),
    MaddBytes(
        "avx2_maddubs", frozenset({"avx2"}), 8, 4, "uint8", "int8", "int32", 16, 32,
        partial_dtype="int16", partial_lanes=16,
    ),
)  # fmt: skip
