"""u8 × s8 quadruples into int32: VPDPBUSD in its AVX-512 and its 256-bit VEX form.

Source: Intel Intrinsics Guide, _mm512_dpbusd_epi32 (no saturation, exact). LLVM 22 declares the
operands of the intrinsic as bytes; TVM's own VNNI intrinsic still passes int32 and fails.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmpq.formats import Format
from hwmpq.kernels.ir import IR, Expr
from hwmpq.kernels.micro import IntegerMicro


@dataclass(frozen=True)
class Vnni(IntegerMicro):
    """acc += Σ of four u8 · s8 products."""

    intrinsic: str = ""

    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        return ir.intrinsic(self.intrinsic, f"int32x{self.lanes}", acc, a, w)

    def cycles(self, rows: int, vectors: int, fmt: Format) -> float:
        # Latency 5 (Ice Lake and later), two per cycle on 256 bit, one or two on 512 bit.
        return max(rows * vectors * self.vector_bytes / 64 + (rows + vectors) / 4, 5.0) / 4


AVX512_VNNI = Vnni(
    "avx512_vnni", frozenset({"avx512f", "avx512vnni"}), 16, 4, "uint8", "int8", "int32",
    32, 64, intrinsic="llvm.x86.avx512.vpdpbusd.512",
)  # fmt: skip
MICROS = (
    AVX512_VNNI,
    Vnni(
        "avxvnni", frozenset({"avx2", "avxvnni"}), 8, 4, "uint8", "int8", "int32",
        16, 32, intrinsic="llvm.x86.avx512.vpdpbusd.256",
    ),
)  # fmt: skip
