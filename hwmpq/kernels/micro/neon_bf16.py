"""bf16 pairs into fp32 on ARM: BFDOT.

It takes denormal numbers as zero and rounds its sums to odd. TVM widens every bf16 value to fp32
before code is generated, so the instruction is reached through LLVM text, as on x86. FMLA on fp16
has no kernel: it sums in fp16, and formats want fp32 sums.
Source: Arm Architecture Reference Manual for A-profile, BFDOT (vector).
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmpq.kernels.ir import IR, Expr
from hwmpq.kernels.micro.avx512_bf16 import DotBf16

_DOT = "hwmpq_bfdot_128"
_LLVM = f"""
declare <4 x float> @llvm.aarch64.neon.bfdot.v4f32.v8bf16(<4 x float>, <8 x bfloat>, <8 x bfloat>)

define <4 x float> @{_DOT}(<4 x float> %acc, <8 x i16> %a, <8 x i16> %w) {{
  %x = bitcast <8 x i16> %a to <8 x bfloat>
  %y = bitcast <8 x i16> %w to <8 x bfloat>
  %sum = call <4 x float> @llvm.aarch64.neon.bfdot.v4f32.v8bf16(
      <4 x float> %acc, <8 x bfloat> %x, <8 x bfloat> %y)
  ret <4 x float> %sum
}}
"""


@dataclass(frozen=True)
class NeonBf16(DotBf16):
    """acc += Σ of two bf16 · bf16 products."""

    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        return ir.external(_DOT, f"float32x{self.lanes}", acc, a, w)

    def cycles(self, rows: int, vectors: int, fmt: object) -> float:
        # Latency 4, two per cycle (Arm Neoverse N2 software optimization guide).
        return max(rows * vectors / 2 + (rows + vectors) / 4, 4.0) / 2


MICROS = (
    NeonBf16(
        "neon_bfdot", frozenset({"neon", "bf16"}), 4, 2, "uint16", "uint16", "float32", 32, 16,
        spare=2, ahead=4, llvm=_LLVM,
    ),
)  # fmt: skip
