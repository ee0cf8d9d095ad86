"""Operators that move elements: rearrange, encode, concat, pad. Re-encoding is done on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from hwmpq.errors import InputError
from hwmpq.kernels.codes import ZERO, memory_dtype
from hwmpq.kernels.glue.call import GlueCall
from hwmpq.kernels.glue.frame import Frame, dtype_lanes
from hwmpq.kernels.glue.views import View, passes
from hwmpq.kernels.glue.walk import Body, Space, spans, walk
from hwmpq.kernels.ir import Buffer, Expr
from hwmpq.storage import is_integer

#: Widest innermost axis whose vectors are interleaved in registers, and widest square of a
#: transposition.
_INTERLEAVED, _SQUARE = 4, 16


@dataclass(frozen=True)
class Copy:
    """Elements of input `index` on their way from source to target, the two buffers of `space`.

    convert: they are re-encoded. Vectors run along the target's innermost axis; where the source
    has its unit stride on another axis (`unit`), both ways are vectors and registers are shuffled.
    """

    frame: Frame
    index: int
    source: Buffer
    target: Buffer
    space: Space
    convert: bool

    @property
    def lanes(self) -> int:
        call = self.frame.call
        dtype = memory_dtype(call.inputs[self.index].encoding)
        return self.frame.wide if self.convert else dtype_lanes(call, dtype)

    def emit(self) -> None:
        read, write = self.space.strides
        unit = read.index(1) if 1 in read else None
        inner = self.space.extents[-1]
        square = min(self.frame.lanes if self.convert else self.lanes, _SQUARE)
        if read[-1] in (0, 1) or unit is None or self.frame.call.grid:
            self._walk(self.space, self.lanes, self._straight)
        elif inner <= _INTERLEAVED and write[unit] == inner:
            self._walk(self._without_inner(unit), self.lanes, self._interleaved)
        elif min(inner, self.space.extents[unit]) >= square:
            self._walk(self._without_inner(unit), square, self._transposed)
        elif inner < self.space.extents[unit]:
            others = [i for i in range(len(read)) if i != unit]
            self._walk(self.space.taken([*others, unit]), self.frame.lanes, self._straight)
        else:
            self._walk(self.space, self.frame.lanes, self._straight)

    def _walk(self, space: Space, lanes: int, body: Body) -> None:
        terms = prod(self.space.extents) // prod(space.extents)
        walk(self.frame.ir, space, lanes, self.frame.call, body, terms)

    def _without_inner(self, unit: int) -> Space:
        """`unit` innermost, and what was innermost left to the body."""
        others = [i for i in range(len(self.space.extents) - 1) if i != unit]
        return self.space.taken([*others, unit])

    def _element(self, at: Expr, lanes: int, stride: int = 1) -> Expr:
        raw = self.frame.fetch(self.source, at, lanes, stride)
        if not self.convert:
            return raw
        return self.frame.encode(self.frame.decode(self.index, raw, lanes), lanes)

    def _straight(self, at: list[Expr], steps: tuple[int, ...], lanes: int) -> None:
        value = self._element(at[0], lanes, steps[0])
        self.frame.ir.store(self.target, at[1], value, lanes, steps[1])

    def _interleaved(self, at: list[Expr], steps: tuple[int, ...], lanes: int) -> None:
        """A few vectors of the source become one of the target."""
        ir, inner = self.frame.ir, self.space.extents[-1]
        step = self.space.strides[0][-1]
        vectors = [ir.let(self._element(at[0] + i * step, lanes)) for i in range(inner)]
        ir.store(self.target, at[1], ir.interleave(vectors, lanes), inner * lanes)

    def _transposed(self, at: list[Expr], steps: tuple[int, ...], lanes: int) -> None:
        """Squares along the innermost axis."""
        ir, step = self.frame.ir, self.space.strides[0][-1]
        for start, _, _ in spans(ir, self.space.extents[-1], lanes):
            rows = [ir.let(self._element(at[0] + (start + i) * step, lanes)) for i in range(lanes)]
            for j, column in enumerate(ir.transpose(rows)):
                ir.store(self.target, at[1] + j * steps[1] + start, column, lanes)


def planned(call: GlueCall) -> tuple[View, ...]:
    """The passes of a rearrange or encode."""
    return passes(call.inputs[0], call.attributes.get("steps", []), call.out)


def rearrange(frame: Frame) -> None:
    """The last pass re-encodes; those before it move codes through scratch buffers."""
    call, ir = frame.call, frame.ir
    source = frame.inputs[0]
    *before, last = planned(call)
    if before and call.grid:
        raise InputError("a rearrangement in several passes", call.attrs, "one pass on a GPU")
    for view in before:
        space = _space(view)
        scratch = ir.scratch(prod(view.shape), memory_dtype(call.inputs[0].encoding))
        Copy(frame, 0, source, scratch, space, convert=False).emit()
        source = scratch
    Copy(frame, 0, source, frame.out, _space(last), not call.same_codes(0)).emit()


def _space(view: View) -> Space:
    """From the view's buffer to a buffer in the view's order."""
    write: list[int] = []
    step = 1
    for extent, _ in reversed(view.atoms):
        write.append(step)
        step *= extent
    return Space.of(
        [extent for extent, _ in view.atoms],
        [[stride for _, stride in view.atoms], list(reversed(write))],
        [view.offset, 0],
    )


def _placed(frame: Frame, index: int, offset: list[int], extents: list[int]) -> None:
    """Copy input `index` into the box of the result at `offset` (logical axes)."""
    call = frame.call
    out, operand = call.out, call.inputs[index]
    read, write = operand.broadcast(extents), out.strides
    space = Space.of(
        [extents[axis] for axis in out.order],
        [[s[axis] for axis in out.order] for s in (read, write)],
        [0, sum(o * s for o, s in zip(offset, write, strict=True))],
    )
    convert = not call.same_codes(index)
    Copy(frame, index, frame.inputs[index], frame.out, space, convert).emit()


def concat(frame: Frame) -> None:
    """Part by part; a part of batch 1 is repeated for every sample."""
    axis = frame.call.attributes["axis"]
    start = 0
    for index, operand in enumerate(frame.call.inputs):
        extents, offset = list(frame.call.out.shape), [0] * len(operand.shape)
        extents[axis], offset[axis] = operand.shape[axis], start
        _placed(frame, index, offset, extents)
        start += operand.shape[axis]


def pad(frame: Frame) -> None:
    """The code of 0 everywhere, then the input inside.

    Raises InputError for a GPU, whose threads do not wait for each other in between.
    """
    call, ir = frame.call, frame.ir
    if call.grid:
        raise InputError("a padding that no layer reads", call.attrs, "none on a GPU")
    dtype = memory_dtype(call.out.encoding)
    zero = ir.const(0, dtype)
    if is_integer(call.out.encoding):
        zero = ir.let(ir.cast(ir.cast(frame.scalar(ZERO), "int32"), dtype))
    ir.fill(frame.out, 0, call.out.size, zero, dtype)
    before = [pair[0] for pair in call.attributes["pads"]]
    _placed(frame, 0, before, list(call.inputs[0].shape))


EMITTERS: dict[str, Callable[[Frame], None]] = {
    "rearrange": rearrange,
    "encode": rearrange,
    "concat": concat,
    "pad": pad,
}
