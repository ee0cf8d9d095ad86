"""One multiply instruction: eight 16-bit products, added to 32-bit sums.

All loop nests, weight decoders and epilogues of hwmpq work over it. A real chip calls its own
instruction by `ir.intrinsic`, or code of its own by `ir.external`.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmpq.formats import Format
from hwmpq.kernels.ir import IR, Expr
from hwmpq.kernels.micro import IntegerMicro


@dataclass(frozen=True)
class Products(IntegerMicro):
    """int16 × int16 into int32."""

    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        wide = [ir.cast(operand, "int32", self.lanes) for operand in (a, w)]
        return acc + wide[0] * wide[1]

    def cycles(self, rows: int, vectors: int, fmt: Format) -> float:
        return rows * vectors / 4  # four products at once, says its maker


MICROS = (
    Products(
        "example_mul16", frozenset({"example-mul16"}), 8, 1, "int16", "int16", "int32", 16, 32
    ),
)
