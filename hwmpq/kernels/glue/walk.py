"""Loops over elements that lie with strides in several buffers, vectors innermost.

A vector body may be run twice on some elements: a rest that is no full vector is covered by one
more vector that ends with the last element. So a body must not read what it has written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod

from hwmpq.kernels.glue.call import GlueCall
from hwmpq.kernels.ir import IR, Expr

#: body(at, strides, lanes): the index of the first element in each buffer, the step to the next
#: lane in each, and how many lanes.
Body = Callable[[list[Expr], tuple[int, ...], int], None]


@dataclass(frozen=True)
class Space:
    """Elements to walk: extents, outermost first; strides[buffer][axis]; offsets[buffer]."""

    extents: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]

    @staticmethod
    def of(
        extents: Sequence[int],
        strides: Sequence[Sequence[int]],
        offsets: Sequence[int] | None = None,
    ) -> Space:
        """With neighbouring axes joined where every buffer allows it."""
        found: list[tuple[int, tuple[int, ...]]] = []
        for extent, *steps in zip(extents, *strides, strict=True):
            if extent == 1:
                continue
            joined = tuple(extent * step for step in steps)
            if found and found[-1][1] == joined:
                found[-1] = (found[-1][0] * extent, tuple(steps))
            else:
                found.append((extent, tuple(steps)))
        found = found or [(1, (1,) * len(strides))]
        by_buffer = zip(*(steps for _, steps in found), strict=True)
        return Space(
            tuple(extent for extent, _ in found),
            tuple(by_buffer),
            tuple(offsets or (0,) * len(strides)),
        )

    def taken(self, order: Sequence[int]) -> Space:
        """Only these axes, in this order."""
        return Space(
            tuple(self.extents[i] for i in order),
            tuple(tuple(steps[i] for i in order) for steps in self.strides),
            self.offsets,
        )


def spans(ir: IR, size: int, lanes: int, parallel: bool = False) -> Iterator[tuple[Expr, int, int]]:
    """Cover 0 .. size with vectors: (start, lanes, how many of the first lanes are repeated).

    The body is emitted for the loop of full vectors and once more for the rest.
    """
    lanes = min(lanes, 1 << (size.bit_length() - 1))
    with ir.loop(size // lanes, parallel) as i:
        yield i * lanes, lanes, 0
    if size % lanes:
        yield size - lanes, lanes, lanes - size % lanes


def _places(space: Space, index: Expr) -> list[Expr]:
    """Where an element lies in each buffer, by its number among all."""
    at: list[Expr] = list(space.offsets)
    for axis in reversed(range(len(space.extents))):
        extent = space.extents[axis]
        along = index % extent if axis else index
        index = index // extent
        at = [a + along * s[axis] for a, s in zip(at, space.strides, strict=True)]
    return at


def walk(ir: IR, space: Space, lanes: int, call: GlueCall, body: Body, terms: int = 1) -> None:
    """Run the body over all elements; the outermost loop is parallel when that pays.

    terms: input elements that each of them stands for.
    """
    *outer, inner = space.extents
    steps = tuple(s[-1] for s in space.strides)
    if call.grid:
        with ir.loop(prod(space.extents), parallel=True) as index:
            body(_places(space, index), steps, 1)
        return
    parallel = call.pays(prod(space.extents) * terms)
    with ExitStack() as stack:
        at = list(space.offsets)
        for axis, extent in enumerate(outer):
            index = stack.enter_context(ir.loop(extent, parallel and axis == 0))
            at = [a + index * s[axis] for a, s in zip(at, space.strides, strict=True)]
        for start, n, _ in spans(ir, inner, lanes, parallel and not outer):
            body([a + start * s for a, s in zip(at, steps, strict=True)], steps, n)
