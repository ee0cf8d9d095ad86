"""bf16 pairs into fp32: VDPBF16PS.

Source: Intel Intrinsics Guide, _mm512_dpbf16_ps; it takes denormal numbers as zero. TVM widens
every bf16 value to fp32 before code is generated, so the instruction is reached through a function
of LLVM text on 16-bit words.

AVX512-FP16 has no counterpart: VFMADDPH sums in fp16, and formats want fp32 sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmpq.formats import Format
from hwmpq.kernels.ir import IR, Expr
from hwmpq.kernels.micro import Micro
from hwmpq.types import Execution

DOT = "hwmpq_dpbf16ps_512"
LLVM = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)

define <16 x float> @{DOT}(<16 x float> %acc, <32 x i16> %a, <32 x i16> %w) {{
  %x = bitcast <32 x i16> %a to <32 x bfloat>
  %y = bitcast <32 x i16> %w to <32 x bfloat>
  %sum = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
      <16 x float> %acc, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %sum
}}
"""


@dataclass(frozen=True)
class DotBf16(Micro):
    """acc += Σ of two bf16 · bf16 products."""

    def why_not(self, fmt: Format) -> str | None:
        if fmt.activation.name != "bf16":
            return f"{self.name} multiplies bf16, {fmt.name} reads {fmt.activation.name}"
        return None

    def execution(self, fmt: Format) -> Execution:
        return "native" if fmt.weight.name == "bf16" else "storage-only"

    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        return ir.external(DOT, f"float32x{self.lanes}", acc, a, w)

    def cycles(self, rows: int, vectors: int, fmt: Format) -> float:
        # One per cycle, latency 6 (uops.info: VDPBF16PS ZMM on Sapphire Rapids).
        return max(rows * vectors + (rows + vectors) / 4, 6.0) / 2


AVX512_BF16 = DotBf16(
    "avx512_bf16", frozenset({"avx512f", "avx512bf16"}), 16, 2, "uint16", "uint16", "float32",
    32, 64, llvm=LLVM,
)  # fmt: skip
MICROS = (AVX512_BF16,)
