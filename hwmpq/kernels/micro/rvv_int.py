"""Exact integer products on RISC-V vectors: int16 × int16 added to int32 (VWMACC).

Written as plain arithmetic, which LLVM makes the instruction of.
Source: RISC-V Vector Extension 1.0, section 11.14.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmpq.formats import Format
from hwmpq.kernels.ir import IR, Expr
from hwmpq.kernels.micro import IntegerMicro


@dataclass(frozen=True)
class WideningWords(IntegerMicro):
    """acc += a · w, both widened. A vector of eight channels is two registers of sums."""

    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        return acc + ir.cast(a, "int32", self.lanes) * ir.cast(w, "int32", self.lanes)

    def cycles(self, rows: int, vectors: int, fmt: Format) -> float:
        return max(rows * vectors * 2 + (rows + vectors) / 2, 4.0)


MICROS = (
    WideningWords(
        "rvv_wmacc", frozenset({"v"}), 8, 1, "int16", "int16", "int32", 16, 16, spare=2
    ),
)  # fmt: skip
