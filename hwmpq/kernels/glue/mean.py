"""The mean over any axes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from hwmpq.kernels.glue.call import GlueCall
from hwmpq.kernels.glue.frame import Frame
from hwmpq.kernels.glue.rows import added, partial_sums
from hwmpq.kernels.glue.walk import Space, walk
from hwmpq.kernels.ir import Expr


def _split(call: GlueCall) -> tuple[Space, Space]:
    """The kept elements (input, out), outermost first in the input's memory; and the summed ones
    (input) in the order of their terms, which is that of the logical axes."""
    x = call.inputs[0]
    axes = sorted(a % len(x.shape) for a in call.attributes["axes"])
    steps = iter(call.out.strides)
    if len(call.out.shape) == len(x.shape):
        into = dict(enumerate(steps))
    else:
        into = {axis: next(steps) for axis in range(len(x.shape)) if axis not in axes}
    kept = [a for a in x.order if a not in axes]
    return (
        Space.of(
            [x.shape[a] for a in kept], [[x.strides[a] for a in kept], [into[a] for a in kept]]
        ),
        Space.of([x.shape[a] for a in axes], [[x.strides[a] for a in axes]]),
    )


def mean(frame: Frame) -> None:
    """The sum as `rows` defines it, divided by the number of terms: of rows where the terms lie
    one behind the other, else of vectors of kept elements."""
    call, ir = frame.call, frame.ir
    space, terms = _split(call)
    number = prod(terms.extents)
    rows = number > 1 and terms.extents == (number,) and terms.strides[0] == (1,)

    def body(at: list[Expr], steps: tuple[int, ...], lanes: int) -> None:
        if rows:
            whole = added(ir, number, lambda i, n: frame.value(0, at[0] + i, n))
        else:
            whole = _added(frame, terms, at[0], lanes, steps[0])
        frame.put(at[1], whole / ir.const(float(number), "float32", lanes), lanes, steps[1])

    walk(ir, space, 1 if rows else frame.wide, call, body, number)


def _added(frame: Frame, terms: Space, at: Expr, lanes: int, stride: int) -> Expr:
    """The sums under one vector of kept elements."""
    ir, number = frame.ir, prod(terms.extents)
    count = partial_sums(number)
    full, rest = divmod(number, count)
    partial, acc = (ir.local(n, "float32") for n in (count * lanes, lanes))

    def value(index: Expr) -> Expr:
        """The term of this index."""
        position, inner = at, number
        for axis, (extent, step) in enumerate(zip(terms.extents, terms.strides[0], strict=True)):
            inner //= extent
            along = index if inner == 1 else index // inner
            position = position + (along if axis == 0 else along % extent) * step
        return frame.value(0, position, lanes, stride)

    def add(term: Expr) -> None:
        ir.store(acc, 0, ir.load(acc, 0, lanes) + term, lanes)

    for first, many in ((0, count - rest), (count - rest, rest)):
        if not many:
            continue
        with ir.loop(many) as i:
            which = first + i
            ir.store(acc, 0, ir.const(0.0, "float32", lanes), lanes)
            with ir.loop(full) as block:
                add(value(block * count + which))
            if first:
                add(value(number - count + which))
            ir.store(partial, which * lanes, ir.load(acc, 0, lanes), lanes)
    sums = [ir.load(partial, i * lanes, lanes) for i in range(count)]
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [ir.let(a + b) for a, b in zip(sums[:half], sums[half:], strict=True)]
    return sums[0]


EMITTERS: dict[str, Callable[[Frame], None]] = {"mean": mean}
