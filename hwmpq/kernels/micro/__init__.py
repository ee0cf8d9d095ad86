"""Micro-kernels: what one instruction set does with a vector of weights. One file per set.

A file defines `MICROS`; the folder is the registry. A micro-kernel knows nothing of convolutions,
packing or epilogues: it broadcasts activations and accumulates `lanes` output channels at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from hwmpq.formats import Format
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.types import Execution


@dataclass(frozen=True)
class Micro(ABC):
    """Multiply-accumulate of one instruction set.

    lanes: output channels of one accumulator vector; kstep: reduction steps of one dot;
    a_dtype: activations as read; w_dtype: weights as multiplied, vectors of lanes · kstep;
    acc_dtype: float32 or int32; registers: vector registers of the architecture;
    vector_bytes: width of one of them.
    """

    name: str
    requires: frozenset[str]
    lanes: int
    kstep: int
    a_dtype: str
    w_dtype: str
    acc_dtype: str
    registers: int
    vector_bytes: int

    @abstractmethod
    def why_not(self, fmt: Format) -> str | None:
        """None when operands of this format can be multiplied exactly, else the reason."""

    @abstractmethod
    def execution(self, fmt: Format) -> Execution:
        """native: the multiply takes both encodings as stored (design, section 4)."""

    def run_length(self, fmt: Format) -> int:
        """Dots that may be summed in a narrow partial sum before it is widened; 0 = none kept."""
        return 0

    def broadcast(self, ir: IR, buffer: Buffer, index: Expr) -> Expr:
        """kstep activations from buffer[index], repeated over the vector."""
        if self.kstep == 1:
            return ir.broadcast(ir.load(buffer, index), self.lanes)
        word = ir.reinterpret(ir.load(buffer, index, self.kstep), "int32")
        return ir.reinterpret(ir.broadcast(word, self.lanes), self.a_dtype, self.lanes * self.kstep)

    @abstractmethod
    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        """acc + Σ over kstep of a · w, per lane."""

    def partial(self, ir: IR, a: Expr, w: Expr) -> Expr:
        """The narrow product of one dot (only where run_length > 0)."""
        raise ValueError(f"{self.name} keeps no partial sums")

    def widen(self, ir: IR, acc: Expr, partial: Expr) -> Expr:
        """acc + the widened partial sums."""
        raise ValueError(f"{self.name} keeps no partial sums")

    #: dtype and lanes of a partial sum
    partial_dtype: str = ""
    partial_lanes: int = 0

    @abstractmethod
    def cycles(self, rows: int, vectors: int, fmt: Format) -> float:
        """Estimated cycles of one reduction step on a rows × vectors register block."""


@cache
def micros() -> tuple[Micro, ...]:
    """Every micro-kernel of the folder, sorted by name; a duplicate name is refused."""
    found: dict[str, Micro] = {}
    for info in iter_modules(__path__):
        for micro in import_module(f"{__name__}.{info.name}").MICROS:
            if micro.name in found:
                raise ValueError(f"micro-kernel {micro.name!r} is defined twice")
            found[micro.name] = micro
    return tuple(found[name] for name in sorted(found))
