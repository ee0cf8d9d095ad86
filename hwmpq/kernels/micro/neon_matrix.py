"""Products of 2 × 2 matrices on ARM: USMMLA (u8 × s8 into int32), BFMMLA (bf16 into fp32).

One instruction multiplies two rows of activations by two channels, sixteen bytes each: a register
of sums is (row 0, channel 0), (0, 1), (1, 0), (1, 1), and four channels are two registers. A row
that is left over is multiplied beside a copy of itself.

BFMMLA takes denormal numbers as zero and rounds its sums to odd, as BFDOT does.
Source: Arm Architecture Reference Manual for A-profile, USMMLA (vector), BFMMLA.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from hwmpq.formats import Format
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.kernels.micro import IntegerMicro, Micro
from hwmpq.kernels.micro.avx512_bf16 import DotBf16

#: Lanes of sums, of both registers.
_SUMS = 8
_DOT = "hwmpq_bfmmla_128"
_LLVM = f"""
declare <4 x float> @llvm.aarch64.neon.bfmmla(<4 x float>, <8 x bfloat>, <8 x bfloat>)

define <4 x float> @{_DOT}(<4 x float> %acc, <8 x i16> %a, <8 x i16> %w) {{
  %x = bitcast <8 x i16> %a to <8 x bfloat>
  %y = bitcast <8 x i16> %w to <8 x bfloat>
  %sum = call <4 x float> @llvm.aarch64.neon.bfmmla(
      <4 x float> %acc, <8 x bfloat> %x, <8 x bfloat> %y)
  ret <4 x float> %sum
}}
"""


@dataclass(frozen=True)
class Matrix(Micro):
    """What both have in common."""

    height: int = 2

    @property
    def a_lanes(self) -> int:
        return self.height * self.kstep

    @abstractmethod
    def product(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        """acc + two rows by two channels."""

    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        half, both = _SUMS // 2, 2 * self.kstep
        parts = [
            self.product(
                ir,
                ir.shuffle(acc, list(range(i * half, (i + 1) * half))),
                a,
                ir.shuffle(w, list(range(i * both, (i + 1) * both))),
            )
            for i in range(2)
        ]
        return ir.concatenate(parts, half)

    def operands(self, ir: IR, buffer: Buffer, places: list[Expr], steps: int) -> list[Expr]:
        width = steps * self.kstep
        rows = ir.concatenate([ir.let(ir.load(buffer, at, width)) for at in places], width)
        pairs = []
        for first in range(0, width, self.kstep):
            step = list(range(first, first + self.kstep))
            pairs.append(ir.shuffle(rows, step + [width + i for i in step]))
        return pairs

    def begin(self, ir: IR, sums: Expr) -> Expr:
        return ir.shuffle(ir.concatenate([sums, sums], 4), [0, 1, 4, 5, 2, 3, 6, 7])

    def rows(self, ir: IR, acc: Expr) -> list[Expr]:
        return [ir.shuffle(acc, [0, 1, 4, 5]), ir.shuffle(acc, [2, 3, 6, 7])]

    def block_registers(self, rows: int, vectors: int) -> int:
        pairs = -(-rows // 2)
        return 2 * (pairs * vectors + vectors + pairs) + self.spare

    def cycles(self, rows: int, vectors: int, fmt: Format) -> float:
        # Latency 3 and 5 with forwarding of 1 and 3, two per cycle (Arm Neoverse N2 software
        # optimization guide); the halves of a pair of rows are put together by one more.
        pairs = -(-rows // 2)
        return max(pairs * vectors + pairs / 2 + vectors / 4, 3.0) / self.kstep


@dataclass(frozen=True)
class MatrixBytes(Matrix, IntegerMicro):
    """u8 × s8 into int32."""

    def product(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        return ir.intrinsic("llvm.aarch64.neon.usmmla.v4i32.v16i8", "int32x4", acc, a, w)


@dataclass(frozen=True)
class MatrixBf16(Matrix, DotBf16):
    """bf16 into fp32."""

    def product(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        return ir.external(_DOT, "float32x4", acc, a, w)


MICROS = (
    MatrixBytes(
        "neon_usmmla", frozenset({"neon", "i8mm"}), 4, 8, "uint8", "int8", "int32", 32, 16,
        spare=3, ahead=2,
    ),
    MatrixBf16(
        "neon_bfmmla", frozenset({"neon", "bf16"}), 4, 4, "uint16", "uint16", "float32", 32, 16,
        spare=3, ahead=2, llvm=_LLVM,
    ),
)  # fmt: skip
