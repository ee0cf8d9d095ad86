"""The one epilogue emitter: from an accumulator vector to the stored elements.

Emits exactly `hwmpq.requantize.apply`; a test compares them bit by bit for every combination.
A product that a sum follows is fenced: two roundings, as there.

Where AVX2 or NEON makes unsigned codes of int32 sums, packing clamps (`codes.packed`,
`neon.packed`): q = max(u8(s16(rint(min(y, hi − z))) + z), lo), or
min(max(u8(s16(rint(y)) + z), lo), hi).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from hwmpq.kernels import neon, rvv
from hwmpq.kernels.codes import from_f32, memory_dtype, packed, to_f32
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.requantize import HI, INV_OUT, LO, M_RES, Z_OUT, Z_RES
from hwmpq.storage import is_integer


@dataclass(frozen=True)
class Run:
    """Vectors of sums of neighbouring channels from `channel` on; they go to out[at]."""

    sums: list[Expr]
    channel: Expr
    at: Expr


@dataclass(frozen=True)
class EpilogueEmitter:
    """multiplier, bias: [padded channels]; scalars: fp32; residual and out are flat tensors.

    integer: the accumulators are int32. scaled: a float accumulator is multiplied as well
    (attention's 1/√d). residual: encoding, '' = none. isa: that of the micro-kernel, where there
    is more here than plain vectors. begun: int32 sums were begun with `first`, so they hold their
    bias.
    """

    integer: bool
    out: str
    residual: str
    scaled: bool
    multiplier: Buffer
    bias: Buffer
    scalars: Buffer
    out_buffer: Buffer
    residual_buffer: Buffer | None
    isa: Literal["", "avx2", "neon", "rvv"]
    begun: bool = False

    def first(self, ir: IR, channel: Expr, lanes: int) -> Expr:
        """What the sums of a nest that is `begun` start from."""
        if not self.integer:
            return ir.const(0, "float32", lanes)
        return ir.let(ir.load(self.bias, channel, lanes))

    def store_runs(self, ir: IR, runs: list[Run], lanes: int) -> None:
        """Finish and store runs of whole vectors: bytes are packed to a register by AVX2 and NEON,
        else two vectors of a run are done at once."""
        unsigned = is_integer(self.out) and memory_dtype(self.out) == "uint8"
        if not (self.isa in ("avx2", "neon") and self.integer and unsigned):
            for run in runs:
                for j in range(0, len(run.sums), 2):
                    pair, skip = run.sums[j : j + 2], j * lanes
                    acc, wide = ir.concatenate(pair, lanes), len(pair) * lanes
                    self.store(ir, acc, run.channel + skip, run.at + skip, wide, wide)
            return
        vectors = [
            Run([acc], run.channel + j * lanes, run.at + j * lanes)
            for run in runs
            for j, acc in enumerate(run.sums)
        ]
        starts = set(accumulate((len(run.sums) for run in runs), initial=0))
        many = (32 if self.isa == "avx2" else 16) // lanes
        for first in range(0, len(vectors), many):
            last = min(first + many, len(vectors))
            codes = ir.let(self._packed(ir, vectors[first:last], lanes))
            ends = [i for i in range(first + 1, last + 1) if i == last or i in starts]
            for begin, end in pairwise([first, *ends]):
                part = list(range((begin - first) * lanes, (end - first) * lanes))
                ir.store(self.out_buffer, vectors[begin].at, ir.shuffle(codes, part), len(part))

    def _packed(self, ir: IR, vectors: list[Run], lanes: int) -> Expr:
        """The codes of some vectors of sums, a register at most, in order."""
        steps = []
        for vector in vectors:
            residual = None
            if self.residual:
                residual = self._residual(ir, vector.at, lanes, lanes)
            steps.append(self._steps(ir, vector.sums[0], vector.channel, residual, lanes))
        zero = ir.cast(ir.load(self.scalars, Z_OUT), "int16")
        low = ir.cast(ir.load(self.scalars, LO), "uint8")
        if self.isa == "neon":
            high = ir.cast(ir.load(self.scalars, HI), "uint8")
            return neon.packed(ir, steps, lanes, zero, low, high)
        top = ir.broadcast(ir.load(self.scalars, HI) - ir.load(self.scalars, Z_OUT), lanes)
        return packed(ir, [ir.minimum(y, top) for y in steps], zero, low, "uint8")

    def store(self, ir: IR, acc: Expr, channel: Expr, at: Expr, lanes: int, valid: int) -> None:
        """Finish `lanes` channels from `channel` on and store the first `valid` at out[at]."""
        residual = None
        if self.residual:
            residual = self._residual(ir, at, lanes, valid)
        value = self._value(ir, acc, channel, residual, lanes)
        if self.isa == "rvv" and is_integer(self.out):
            y = ir.cast(rvv.rounded(ir, value, lanes), memory_dtype(self.out), lanes)
        else:
            y = from_f32(ir, value, self.out, lanes)
        if valid == lanes:
            ir.store(self.out_buffer, at, y, lanes)
            return
        part = ir.local(lanes, memory_dtype(self.out))
        ir.store(part, 0, y, lanes)
        for lane in range(valid):
            ir.store(self.out_buffer, at + lane, ir.load(part, lane))

    def _residual(self, ir: IR, at: Expr, lanes: int, valid: int) -> Expr:
        buffer = self.residual_buffer
        if valid == lanes:
            raw = ir.load(buffer, at, lanes)
        else:
            part = ir.local(lanes, memory_dtype(self.residual))
            ir.store(part, 0, ir.const(0, memory_dtype(self.residual), lanes), lanes)
            for lane in range(valid):
                ir.store(part, lane, ir.load(buffer, at + lane))
            raw = ir.load(part, 0, lanes)
        return to_f32(ir, raw, self.residual, lanes)

    def _value(self, ir: IR, acc: Expr, channel: Expr, residual: Expr, lanes: int) -> Expr:
        def s(index: int) -> Expr:
            return ir.broadcast(ir.load(self.scalars, index), lanes)

        to_code = is_integer(self.out)
        if self.integer and to_code:
            q = ir.rint(self._steps(ir, acc, channel, residual, lanes), lanes)
            return self._clamp(ir, q + s(Z_OUT), s, lanes)
        bias = ir.load(self.bias, channel, lanes)
        if self.integer:
            y = ir.fence(self._product(ir, acc, channel, lanes), lanes)
        elif self.scaled:
            y = ir.fence(acc * ir.load(self.multiplier, channel, lanes), lanes) + bias
        else:
            y = acc + bias
        if residual is not None:
            if is_integer(self.residual):
                residual = ir.fence((residual - s(Z_RES)) * s(M_RES), lanes)
            y = y + residual
        if to_code:
            return self._clamp(ir, ir.rint(y * s(INV_OUT), lanes) + s(Z_OUT), s, lanes)
        return self._clamp(ir, y, s, lanes)

    def _product(self, ir: IR, acc: Expr, channel: Expr, lanes: int) -> Expr:
        """f32(acc + bias) · m, of an int32 sum."""
        if not self.begun:
            acc = acc + ir.load(self.bias, channel, lanes)
        return ir.cast(acc, "float32", lanes) * ir.load(self.multiplier, channel, lanes)

    def _steps(self, ir: IR, acc: Expr, channel: Expr, residual: Expr, lanes: int) -> Expr:
        """An int32 sum, and the residual, in steps of the result. Not yet rounded without one."""
        y = self._product(ir, acc, channel, lanes)
        if residual is None:
            return y

        def s(index: int) -> Expr:
            return ir.broadcast(ir.load(self.scalars, index), lanes)

        if is_integer(self.residual):
            r = (residual - s(Z_RES)) * s(M_RES)
        else:
            r = residual * s(INV_OUT)
        return ir.rint(y, lanes) + ir.rint(r, lanes)

    def _clamp(self, ir: IR, value: Expr, s: object, lanes: int) -> Expr:
        assert callable(s)
        if self.isa == "neon":
            return neon.clamped(ir, value, s(LO), s(HI), lanes)
        return ir.maximum(ir.minimum(value, s(HI)), s(LO))
