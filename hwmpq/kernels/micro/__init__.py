"""Micro-kernels: what one instruction set does with a vector of weights. One file per set.

A file defines `MICROS`; the folder is the registry, and other packages add to it by the entry-point
group `hwmpq.micro_kernels`. A micro-kernel knows nothing of convolutions, packing or epilogues: it
broadcasts activations and accumulates `lanes` output channels at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from hwmpq.formats import Format
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.types import Execution

#: Bytes of a multiplied element.
BYTES = {"float32": 4, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1}


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

    def offset(self, fmt: Format) -> int:
        """What is taken off the codes of activations before they are multiplied: unsigned ones of
        eight bits do not fit signed bytes. The kernel adds as many sums of the weights."""
        return 128 if self.a_dtype == "int8" and fmt.activation.qmax > 127 else 0

    @property
    def word(self) -> str:
        """dtype of as many bits as kstep weights."""
        bits = self.kstep * BYTES[self.w_dtype] * 8
        return "float32" if self.w_dtype == "float32" else f"int{bits}"

    def broadcast(self, ir: IR, buffer: Buffer, index: Expr) -> Expr:
        """kstep activations from buffer[index], repeated over the vector."""
        if self.kstep == 1:
            return ir.broadcast(ir.load(buffer, index), self.lanes)
        word = ir.reinterpret(ir.load(buffer, index, self.kstep), self.word)
        return ir.reinterpret(ir.broadcast(word, self.lanes), self.a_dtype, self.lanes * self.kstep)

    def operands(self, ir: IR, buffer: Buffer, places: list[Expr], steps: int) -> list[Expr]:
        """The activations of some steps, 1 or `ahead`, of `height` rows whose next elements lie at
        the places."""
        (at,) = places
        if steps == 1:
            return [self.broadcast(ir, buffer, at)]
        words = ir.load(buffer, at, steps * self.kstep)
        if self.kstep > 1:
            words = ir.reinterpret(words, self.word, steps)
        words = ir.let(words)
        found = [ir.shuffle(words, [step] * self.lanes) for step in range(steps)]
        if self.kstep > 1:
            found = [ir.reinterpret(vector, self.a_dtype, self.a_lanes) for vector in found]
        return found

    @property
    def a_lanes(self) -> int:
        """Activations that one dot takes."""
        return self.lanes * self.kstep

    def begin(self, ir: IR, sums: Expr) -> Expr:
        """What a dot adds to, where every row begins with the same sums, one per lane."""
        return sums

    def rows(self, ir: IR, acc: Expr) -> list[Expr]:
        """The sums of every row, one per lane."""
        return [acc]

    def block_registers(self, rows: int, vectors: int) -> int:
        """Vector registers that a block of sums takes, with what it multiplies."""
        waiting = rows if self.ahead > 1 else 0
        return rows * vectors + vectors + waiting + self.spare

    @abstractmethod
    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        """acc + Σ over kstep of a · w, per lane."""

    def partial(self, ir: IR, a: Expr, w: Expr) -> Expr:
        """The narrow product of one dot (only where run_length > 0)."""
        raise ValueError(f"{self.name} keeps no partial sums")

    def widen(self, ir: IR, acc: Expr, partial: Expr) -> Expr:
        """acc + the widened partial sums."""
        raise ValueError(f"{self.name} keeps no partial sums")

    def depth(self, steps: int) -> int:
        """Reduction steps of a segment as packed; those added hold zero weights."""
        return steps

    #: LLVM text that its `dot` calls into (`IR.external`)
    llvm: str = ""
    #: registers that a block needs beside its sums and weights
    spare: int = 5
    #: steps whose activations are loaded as one vector, where an instruction takes one lane of it
    ahead: int = 1
    #: rows of activations that one dot multiplies
    height: int = 1
    #: dtype and lanes of a partial sum
    partial_dtype: str = ""
    partial_lanes: int = 0

    @abstractmethod
    def cycles(self, rows: int, vectors: int, fmt: Format) -> float:
        """Estimated cycles of one reduction step on a rows × vectors register block."""


@dataclass(frozen=True)
class IntegerMicro(Micro):
    """One that sums products of integers exactly: activations of 8 bits, weights as multiplied."""

    def why_not(self, fmt: Format) -> str | None:
        if not fmt.is_integer:
            return f"{self.name} multiplies integers, not {fmt.name}"
        if fmt.activation.bits > 8 or fmt.weight.bits > 8 * BYTES[self.w_dtype]:
            return f"{self.name} takes activations of at most 8 bits, and {self.w_dtype} weights"
        return None

    def execution(self, fmt: Format) -> Execution:
        return "native" if self.w_dtype == "int8" and fmt.weight.bits == 8 else "storage-only"


@dataclass(frozen=True)
class TileMicro(Micro):
    """One that also multiplies tiles: rows of activations by `lanes` channels, many steps at once.

    A tile of weights is a run of the vectors that `dot` takes, so both are packed alike.
    tile_rows: activation rows of a tile at most; tile_steps: reduction steps of a tile at most.
    A block is 1 or 2 tiles of activations by 1 or 2 of weights.
    """

    tile_rows: int = 16
    tile_steps: int = 16

    def tile_depth(self, steps: int) -> int:
        """Steps of the tiles that a segment is cut into: equal ones, as few as possible."""
        return -(-steps // -(-steps // self.tile_steps))

    def depth(self, steps: int) -> int:
        return -(-steps // self.tile_depth(steps)) * self.tile_depth(steps)

    @abstractmethod
    def configure(self, ir: IR, rows: int, steps: int) -> None:
        """Shape the tiles of this thread; what they held is lost."""

    @abstractmethod
    def release(self, ir: IR) -> None:
        """Hand the tiles of this thread back."""

    @abstractmethod
    def zero(self, ir: IR, i: int, j: int) -> None:
        """Sums of tiles i (activations) × j (weights) = 0."""

    @abstractmethod
    def load_activations(self, ir: IR, i: int, buffer: Buffer, at: Expr, pitch: int) -> None:
        """Tile i from buffer[at], its rows `pitch` elements apart."""

    @abstractmethod
    def load_weights(self, ir: IR, j: int, buffer: Buffer, at: Expr) -> None:
        """Tile j from the vectors that begin at buffer[at]."""

    @abstractmethod
    def product(self, ir: IR, i: int, j: int) -> None:
        """Sums of i × j += their product."""

    @abstractmethod
    def store(self, ir: IR, i: int, j: int, buffer: Buffer, at: Expr, pitch: int) -> None:
        """Sums of i × j to buffer[at], rows `pitch` elements apart."""


@cache
def micros() -> tuple[Micro, ...]:
    """Every micro-kernel of the folder, and of modules with MICROS that the entry-point group
    `hwmpq.micro_kernels` names, sorted by name; a duplicate name is refused."""
    modules = [import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__)]
    modules += [point.load() for point in entry_points(group="hwmpq.micro_kernels")]
    found: dict[str, Micro] = {}
    for module in modules:
        for micro in module.MICROS:
            if micro.name in found:
                raise ValueError(f"micro-kernel {micro.name!r} is defined twice")
            found[micro.name] = micro
    return tuple(found[name] for name in sorted(found))
