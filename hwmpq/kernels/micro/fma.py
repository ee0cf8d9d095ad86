"""fp32 multiply-add of all vector sets; narrower floats and weight-only integers are decoded."""

from __future__ import annotations

from dataclasses import dataclass

from hwmpq.formats import Format
from hwmpq.kernels.ir import IR, Expr
from hwmpq.kernels.micro import Micro
from hwmpq.types import Execution


@dataclass(frozen=True)
class Fma(Micro):
    """acc += a · w in fp32. Latency 4 cycles, two per cycle (AMD family 19h optimisation guide,
    table of instruction latencies; Intel optimisation manual, Skylake: the same; Arm Cortex-A76
    software optimization guide: the same)."""

    def why_not(self, fmt: Format) -> str | None:
        if fmt.is_integer:
            return f"{self.name} accumulates floats, {fmt.name} wants exact integer sums"
        if fmt.activation.name not in ("fp32", "bf16", "fp16"):
            return f"{self.name} does not decode {fmt.activation.name} activations"
        return None

    def execution(self, fmt: Format) -> Execution:
        return "native" if fmt.name == "fp32" else "storage-only"

    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        return acc + a * w

    def cycles(self, rows: int, vectors: int, fmt: Format) -> float:
        return max(rows * vectors / 2, 4.0) + (rows + vectors) / 4


MICROS = (
    Fma(
        "avx2_fma", frozenset({"avx2", "fma"}), 8, 1, "float32", "float32", "float32", 16, 32,
        spare=2,
    ),
    Fma("avx512_fma", frozenset({"avx512f"}), 16, 1, "float32", "float32", "float32", 32, 64),
    Fma(
        "neon_fma", frozenset({"neon"}), 4, 1, "float32", "float32", "float32", 32, 16,
        spare=2, ahead=4,
    ),
    Fma("rvv_fma", frozenset({"v"}), 4, 1, "float32", "float32", "float32", 32, 16, spare=2),
)  # fmt: skip
