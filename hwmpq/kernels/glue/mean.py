"""The mean over any axes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from math import prod

from hwmpq.kernels.glue.call import GlueCall
from hwmpq.kernels.glue.frame import Frame
from hwmpq.kernels.glue.rows import added
from hwmpq.kernels.glue.walk import Space, walk
from hwmpq.kernels.ir import Expr

#: Values that are added before they go into the total: keeps the error of long sums small.
_BLOCK = 16


def _split(call: GlueCall) -> tuple[Space, list[tuple[int, int]]]:
    """Space of the kept elements (input, out), and (extent, stride) of the summed axes, both
    outermost first in the input's memory."""
    x, axes = call.inputs[0], [a % len(call.inputs[0].shape) for a in call.attributes["axes"]]
    summed = [(x.shape[a], x.strides[a]) for a in x.order if a in axes and x.shape[a] > 1]
    steps = iter(call.out.strides)
    if len(call.out.shape) == len(x.shape):
        into = dict(enumerate(steps))
    else:
        into = {axis: next(steps) for axis in range(len(x.shape)) if axis not in axes}
    kept = [a for a in x.order if a not in axes]
    space = Space.of(
        [x.shape[a] for a in kept], [[x.strides[a] for a in kept], [into[a] for a in kept]]
    )
    return space, summed


def mean(frame: Frame) -> None:
    """Along vectors of kept elements when these are innermost in memory, else along rows."""
    call, ir = frame.call, frame.ir
    space, summed = _split(call)
    number = float(prod(extent for extent, _ in summed))
    rows = bool(summed) and summed[-1][1] == 1
    *outer, (length, step) = summed or [(1, 0)]

    def accumulate(at: Expr, lanes: int, stride: int) -> Expr:
        """The sum under one vector of kept elements."""
        acc = ir.local(2 * lanes, "float32")
        zero = ir.const(0.0, "float32", lanes)
        ir.store(acc, 0, zero, lanes)
        with ExitStack() as stack:
            for extent, stride_out in outer:
                at = at + stack.enter_context(ir.loop(extent)) * stride_out
            if rows:
                total = added(ir, length, frame.wide, lambda i, n: frame.value(0, at + i, n))
                ir.store(acc, 0, ir.load(acc, 0) + total)
            else:
                for start, count, size in _blocks(length):
                    with ir.loop(count) as block:
                        first = at + (start + block * size) * step
                        ir.store(acc, lanes, zero, lanes)
                        with ir.loop(size) as i:
                            x = frame.value(0, first + i * step, lanes, stride)
                            ir.store(acc, lanes, ir.load(acc, lanes, lanes) + x, lanes)
                        part = ir.load(acc, 0, lanes) + ir.load(acc, lanes, lanes)
                        ir.store(acc, 0, part, lanes)
        return ir.load(acc, 0, lanes)

    def body(at: list[Expr], steps: tuple[int, ...], lanes: int) -> None:
        whole = accumulate(at[0], lanes, steps[0])
        frame.put(at[1], whole / ir.const(number, "float32", lanes), lanes, steps[1])

    walk(ir, space, 1 if rows else frame.wide, call.threads, body)


def _blocks(length: int) -> list[tuple[int, int, int]]:
    """(first, how many, size of each): full blocks and the rest."""
    full, rest = divmod(length, _BLOCK)
    found = [(0, full, _BLOCK), (full * _BLOCK, 1, rest)]
    return [(first, count, size) for first, count, size in found if count and size]


EMITTERS: dict[str, Callable[[Frame], None]] = {"mean": mean}
