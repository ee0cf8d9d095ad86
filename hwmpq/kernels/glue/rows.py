"""Operators over rows that lie contiguously: softmax and layer_norm.

The order of a sum of n terms is fixed, whatever the target's registers (`added`):

  p = min(16, largest power of two <= n) partial sums; sum j takes the terms j, j + p, j + 2p, ...
  of the first n // p · p; the last r = n % p terms go to the last r partial sums, in order; then
  halves are added, sum j + sum j + p/2, until one is left.

`quantize/exact_math.py` (`summed`) does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from hwmpq.errors import InputError
from hwmpq.kernels.cuda.rows import RowIR
from hwmpq.kernels.glue import vmath
from hwmpq.kernels.glue.frame import Frame
from hwmpq.kernels.glue.walk import spans
from hwmpq.kernels.ir import IR, Expr

#: (start, lanes) -> fp32 values of a row.
Read = Callable[[Expr, int], Expr]
_LOWEST = -3.0e38
#: Partial sums of a sum: a part of its definition.
PARTIAL = 16
#: Rows that are under way at once, and the most elements of them: half of the L1 cache.
_UNDER_WAY, _NEAR = 8, 4096


def partial_sums(terms: int) -> int:
    """How many partial sums a sum of so many terms has."""
    return min(PARTIAL, 1 << (terms.bit_length() - 1))


def reduced(
    ir: IR, size: int, wide: int, start: float, join: Callable[[Expr, Expr], Expr], read: Read
) -> Expr:
    """All values of a row joined to one scalar, `wide` at a time. start: what changes nothing."""
    if isinstance(ir, RowIR):
        return _joined(ir, size, start, join, read)
    width = min(wide, 1 << (size.bit_length() - 1))
    lanes = min(width, ir.widest)
    parts = range(0, width, lanes)
    acc = ir.local(width, "float32")
    neutral = ir.const(start, "float32", lanes)
    for part in parts:
        ir.store(acc, part, neutral, lanes)
    for at, _, repeated in spans(ir, size, width):
        for part in parts:
            if part + lanes <= repeated:
                continue
            x = read(at + part, lanes)
            if part < repeated:
                seen = ir.less(ir.ramp(lanes), ir.const(repeated - part, "int32", lanes))
                x = ir.select(seen, neutral, x)
            ir.store(acc, part, join(ir.load(acc, part, lanes), x), lanes)
    sums = [ir.load(acc, part, lanes) for part in parts]
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [ir.let(join(a, b)) for a, b in zip(sums[:half], sums[half:], strict=True)]
    return ir.let(vmath.total(ir, sums[0], lanes, join))


def _joined(
    ir: RowIR, size: int, start: float, join: Callable[[Expr, Expr], Expr], read: Read
) -> Expr:
    """As `reduced`, by the threads of a row, each of which has one of the partial results."""
    parts = partial_sums(size)
    acc = ir.local(1, "float32")
    ir.store(acc, 0, ir.const(start, "float32"))
    for at in ir.own(size, parts):
        ir.store(acc, 0, join(ir.load(acc, 0), read(at, 1)))
    whole = ir.let(ir.load(acc, 0))
    while parts > 1:
        parts //= 2
        whole = ir.let(join(whole, ir.joined(whole, parts)))
    return whole


def added(ir: IR, size: int, read: Read) -> Expr:
    """The sum of a row, in the order of this file's head. A product that `read` gives must be
    fenced."""
    return reduced(ir, size, PARTIAL, 0.0, lambda a, b: a + b, read)


@dataclass(frozen=True)
class Row:
    """One of the rows that are under way: its number among them, and its first element."""

    index: Expr
    first: Expr


Stage = Callable[[Row], None]


def elements(frame: Frame, size: int) -> Iterator[tuple[Expr, int]]:
    """All elements of a row: (first, lanes). A thread of a row has those that it sums, as only
    the threads that sum know the whole."""
    if isinstance(frame.ir, RowIR):
        for at in frame.ir.own(size, partial_sums(size)):
            yield at, 1
    else:
        for at, lanes, _ in spans(frame.ir, size, frame.wide):
            yield at, lanes


def by_rows(frame: Frame, stages: Callable[[Frame, int, int], Sequence[Stage]]) -> None:
    """Every stage over a few rows, then the next one: a row's last sums, each of which waits for
    the one before, are hidden behind the next row.

    stages: of (frame, rows under way, their length). Raises InputError for images.
    """
    call, ir = frame.call, frame.ir
    layouts = {call.inputs[0].layout, call.out.layout}
    if layouts != {"plain"}:
        raise InputError(f"layout of a {call.op}", ", ".join(sorted(layouts)), "plain")
    size = call.out.shape[-1]
    if isinstance(ir, RowIR):
        with ir.each_row() as row:
            for stage in stages(frame, 1, size):
                stage(Row(0, row * size))
        return
    count = call.out.size // size
    many = max(1, min(_UNDER_WAY, _NEAR // size, count))
    with ir.loop(-(-count // many), call.pays(call.out.size)) as block:
        start = block * many
        if count % many:  # the last block shares rows with its neighbour
            start = ir.let(ir.minimum(start, count - many))
        for stage in stages(frame, many, size):
            with ir.loop(many) as index:
                stage(Row(index, (start + index) * size))


def softmax(frame: Frame, many: int, size: int) -> Sequence[Stage]:
    """Largest value; exp of the distance to it, and their sum; the share of each.

    A CPU keeps the exps; on a GPU computing them twice is less than keeping them.
    """
    ir, wide, keeps = frame.ir, frame.wide, not frame.call.grid
    tops, factors = (ir.local(many, "float32") for _ in range(2))
    shares = ir.scratch(many * size, "float32") if keeps else None

    def largest(row: Row) -> None:
        def read(at: Expr, n: int) -> Expr:
            return frame.value(0, row.first + at, n)

        ir.store(tops, row.index, reduced(ir, size, wide, _LOWEST, ir.maximum, read))

    def exp(row: Row, top: Expr, at: Expr, n: int) -> Expr:
        distance = frame.value(0, row.first + at, n) - ir.broadcast(top, n)  # never above 0
        distance = ir.maximum(distance, ir.const(vmath.EXP_RANGE[0], "float32", n))
        return vmath.exp_within(ir, distance, n)

    def kept(row: Row) -> None:
        top = ir.let(ir.load(tops, row.index))
        for at, n in elements(frame, size):
            ir.store(shares, row.index * size + at, exp(row, top, at, n), n)

    def share(row: Row) -> Read:
        if keeps:
            return lambda at, n: ir.load(shares, row.index * size + at, n)
        top = ir.let(ir.load(tops, row.index))
        return lambda at, n: exp(row, top, at, n)

    def summed(row: Row) -> None:
        whole = added(ir, size, share(row))
        ir.store(factors, row.index, ir.const(1.0, "float32") / whole)

    def divided(row: Row) -> None:
        factor, read = ir.let(ir.load(factors, row.index)), share(row)
        for at, n in elements(frame, size):
            frame.put(row.first + at, read(at, n) * ir.broadcast(factor, n), n)

    return (largest, kept, summed, divided) if keeps else (largest, summed, divided)


def layer_norm(frame: Frame, many: int, size: int) -> Sequence[Stage]:
    """(x − mean) · (1 / sqrt(variance + eps)) · weight + bias; the variance in its own pass."""
    ir, eps = frame.ir, frame.call.attributes["eps"]
    means, factors = (ir.local(many, "float32") for _ in range(2))
    count = ir.const(float(size), "float32")

    def distance(row: Row, mean: Expr, at: Expr, n: int) -> Expr:
        return frame.value(0, row.first + at, n) - ir.broadcast(mean, n)

    def mean(row: Row) -> None:
        whole = added(ir, size, lambda at, n: frame.value(0, row.first + at, n))
        ir.store(means, row.index, whole / count)

    def spread(row: Row) -> None:
        middle = ir.let(ir.load(means, row.index))

        def squared(at: Expr, n: int) -> Expr:
            d = ir.let(distance(row, middle, at, n))
            return ir.fence(d * d, n)

        variance = added(ir, size, squared) / count
        root = ir.call("tirx.sqrt", "float32", variance + ir.const(eps, "float32"))
        ir.store(factors, row.index, ir.const(1.0, "float32") / root)

    def normal(row: Row) -> None:
        middle, factor = (ir.let(ir.load(of, row.index)) for of in (means, factors))
        for at, n in elements(frame, size):
            weight, bias = (ir.load(frame.params[role], at, n) for role in ("weight", "bias"))
            scaled = distance(row, middle, at, n) * ir.broadcast(factor, n)
            frame.put(row.first + at, ir.fence(scaled * weight, n) + bias, n)

    return mean, spread, normal


EMITTERS: dict[str, Callable[[Frame], None]] = {
    "softmax": partial(by_rows, stages=softmax),
    "layer_norm": partial(by_rows, stages=layer_norm),
}
