"""Operators over rows that lie contiguously: softmax and layer_norm.

The order of a sum of n terms is fixed, whatever the target's registers (`added`):

  p = min(16, largest power of two <= n) partial sums; sum j takes the terms j, j + p, j + 2p, ...
  of the first n // p · p; the last r = n % p terms go to the last r partial sums, in order; then
  halves are added, sum j + sum j + p/2, until one is left.

`quantize/exact_math.py` (`summed`) does the same.
"""

from __future__ import annotations

from collections.abc import Callable

from hwmpq.errors import InputError
from hwmpq.kernels.glue import vmath
from hwmpq.kernels.glue.frame import Frame
from hwmpq.kernels.glue.walk import pays, spans
from hwmpq.kernels.ir import IR, Expr

#: (start, lanes) -> fp32 values of a row.
Read = Callable[[Expr, int], Expr]
_LOWEST = -3.0e38
#: Partial sums of a sum: a part of its definition.
PARTIAL = 16


def partial_sums(terms: int) -> int:
    """How many partial sums a sum of so many terms has."""
    return min(PARTIAL, 1 << (terms.bit_length() - 1))


def reduced(
    ir: IR, size: int, wide: int, start: float, join: Callable[[Expr, Expr], Expr], read: Read
) -> Expr:
    """All values of a row joined to one scalar, `wide` at a time. start: what changes nothing."""
    width = min(wide, 1 << (size.bit_length() - 1))
    acc = ir.local(width, "float32")
    neutral = ir.const(start, "float32", width)
    ir.store(acc, 0, neutral, width)
    for at, n, repeated in spans(ir, size, width):
        x = read(at, n)
        if repeated:
            seen = ir.less(ir.ramp(n), ir.const(repeated, "int32", n))
            x = ir.select(seen, neutral, x)
        ir.store(acc, 0, join(ir.load(acc, 0, n), x), n)
    return ir.let(vmath.total(ir, ir.load(acc, 0, width), width, join))


def added(ir: IR, size: int, read: Read) -> Expr:
    """The sum of a row, in the order of this file's head. A product that `read` gives must be
    fenced."""
    return reduced(ir, size, PARTIAL, 0.0, lambda a, b: a + b, read)


def _rows(frame: Frame, run: Callable[[Expr, int], None]) -> None:
    """run(first element, size) for every row. Raises InputError for images."""
    call = frame.call
    layouts = {call.inputs[0].layout, call.out.layout}
    if layouts != {"plain"}:
        raise InputError(f"layout of a {call.op}", ", ".join(sorted(layouts)), "plain")
    size = call.out.shape[-1]
    count = call.out.size // size
    with frame.ir.loop(count, pays(call.threads, call.out.size)) as row:
        run(row * size, size)


def softmax(frame: Frame) -> None:
    """Largest value; exp of the distance to it, and their sum; the share of each."""
    ir, wide = frame.ir, frame.wide

    def run(first: Expr, size: int) -> None:
        top = reduced(
            ir, size, wide, _LOWEST, ir.maximum, lambda at, n: frame.value(0, first + at, n)
        )
        shares = ir.scratch(size, "float32")

        def share(at: Expr, n: int) -> Expr:
            distance = frame.value(0, first + at, n) - ir.broadcast(top, n)  # never above 0
            distance = ir.maximum(distance, ir.const(vmath.EXP_RANGE[0], "float32", n))
            value = ir.let(vmath.exp_within(ir, distance, n))
            ir.store(shares, at, value, n)
            return value

        whole = added(ir, size, share)
        factor = ir.let(ir.const(1.0, "float32") / whole)
        for at, n, _ in spans(ir, size, wide):
            frame.put(first + at, ir.load(shares, at, n) * ir.broadcast(factor, n), n)

    _rows(frame, run)


def layer_norm(frame: Frame) -> None:
    """(x − mean) · (1 / sqrt(variance + eps)) · weight + bias; the variance in its own pass."""
    ir, wide, eps = frame.ir, frame.wide, frame.call.attributes["eps"]

    def run(first: Expr, size: int) -> None:
        count = ir.const(float(size), "float32")
        mean = ir.let(added(ir, size, lambda at, n: frame.value(0, first + at, n)) / count)

        def distance(at: Expr, n: int) -> Expr:
            return frame.value(0, first + at, n) - ir.broadcast(mean, n)

        def squared(at: Expr, n: int) -> Expr:
            d = ir.let(distance(at, n))
            return ir.fence(d * d, n)

        variance = added(ir, size, squared) / count
        root = ir.call("tirx.sqrt", "float32", variance + ir.const(eps, "float32"))
        factor = ir.let(ir.const(1.0, "float32") / root)
        for at, n, _ in spans(ir, size, wide):
            weight, bias = (ir.load(frame.params[role], at, n) for role in ("weight", "bias"))
            normal = distance(at, n) * ir.broadcast(factor, n)
            frame.put(first + at, ir.fence(normal * weight, n) + bias, n)

    _rows(frame, run)


EMITTERS: dict[str, Callable[[Frame], None]] = {"softmax": softmax, "layer_norm": layer_norm}
