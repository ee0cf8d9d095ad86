"""Pooling windows over channels-last images: one vector of channels at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

from hwmpq.errors import InputError
from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.cuda.grid import GridIR
from hwmpq.kernels.glue.call import GlueCall
from hwmpq.kernels.glue.frame import Frame, dtype_lanes
from hwmpq.kernels.glue.walk import spans
from hwmpq.kernels.ir import IR, Expr
from hwmpq.storage import is_integer


@dataclass(frozen=True)
class Window:
    """Sizes of a pooling."""

    n: int
    h: int
    w: int
    c: int
    oh: int
    ow: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    corner: tuple[int, int]

    @staticmethod
    def of(call: GlueCall) -> Window:
        """Raises InputError for tensors that are not channels-last."""
        x, attrs = call.inputs[0], call.attributes
        layouts = {x.layout, call.out.layout}
        if layouts != {"nhwc"}:
            raise InputError(f"layout of a {call.op}", ", ".join(sorted(layouts)), "nhwc")
        n, h, w, c = x.physical
        _, oh, ow, _ = call.out.physical
        (kh, kw), (sh, sw), (top, left, _, _) = (attrs[k] for k in ("kernel", "stride", "padding"))
        return Window(n, h, w, c, oh, ow, (kh, kw), (sh, sw), (top, left))

    @contextmanager
    def pixels(self, ir: IR, parallel: bool) -> Iterator[tuple[Expr, Expr, Expr, Expr]]:
        """image, first row and column under the window (may lie outside), element of the result."""
        with self._places(ir, parallel) as (image, row, column):
            out = ((image * self.oh + row) * self.ow + column) * self.c
            (sh, sw), (top, left) = self.stride, self.corner
            yield image, row * sh - top, column * sw - left, out

    @contextmanager
    def _places(self, ir: IR, parallel: bool) -> Iterator[tuple[Expr, Expr, Expr]]:
        """Image, row and column of the result: three loops, of a grid one over all pixels."""
        if isinstance(ir, GridIR):
            with ir.loop(self.n * self.oh * self.ow, parallel=True) as pixel:
                line = pixel // self.ow
                yield line // self.oh, line % self.oh, pixel % self.ow
            return
        with (
            ir.loop(self.n) as image,
            ir.loop(self.oh, parallel) as row,
            ir.loop(self.ow) as column,
        ):
            yield image, row, column


def max_pool2d(frame: Frame) -> None:
    """A position outside is moved to the nearest pixel, which is under the window too."""
    call, ir, g = frame.call, frame.ir, Window.of(frame.call)
    on_codes = is_integer(call.out.encoding) and call.same_codes(0)
    lanes = dtype_lanes(call, memory_dtype(call.out.encoding)) if on_codes else frame.wide

    def inside(at: Expr, size: int) -> Expr:
        return ir.let(ir.maximum(ir.minimum(at, size - 1), 0))

    with g.pixels(ir, call.pays(call.out.size * prod(g.kernel))) as (image, top, left, out):
        rows = [inside(top + i, g.h) for i in range(g.kernel[0])]
        columns = [inside(left + j, g.w) for j in range(g.kernel[1])]
        pixels = [ir.let(((image * g.h + r) * g.w + c) * g.c) for r in rows for c in columns]
        for start, n, _ in spans(ir, g.c, lanes):
            best = None
            for pixel in pixels:
                x = frame.fetch(frame.inputs[0], pixel + start, n)
                x = x if on_codes else frame.decode(0, x, n)
                best = x if best is None else ir.let(ir.maximum(best, x))
            if on_codes:
                ir.store(frame.out, out + start, best, n)
            else:
                frame.put(out + start, best, n)


def avg_pool2d(frame: Frame) -> None:
    """The sum over the pixels inside, one after the other and row by row, divided by the window's
    size or by their number."""
    call, ir, g = frame.call, frame.ir, Window.of(frame.call)
    whole = call.attributes["count_include_pad"]

    def inside(at: Expr, length: int, size: int) -> tuple[Expr, Expr]:
        first = ir.let(ir.maximum(at, 0))
        return first, ir.let(ir.minimum(at + length, size) - first)

    with g.pixels(ir, call.pays(call.out.size * prod(g.kernel))) as (image, top, left, out):
        row, rows = inside(top, g.kernel[0], g.h)
        column, columns = inside(left, g.kernel[1], g.w)
        corner = ir.let(((image * g.h + row) * g.w + column) * g.c)
        count = ir.const(g.kernel[0] * g.kernel[1], "int32") if whole else rows * columns
        divisor = ir.let(ir.cast(count, "float32"))
        for start, n, _ in spans(ir, g.c, frame.wide):
            acc = ir.local(n, "float32")
            ir.store(acc, 0, ir.const(0.0, "float32", n), n)
            with ir.loop(rows) as i, ir.loop(columns) as j:
                x = frame.value(0, corner + (i * g.w + j) * g.c + start, n)
                ir.store(acc, 0, ir.load(acc, 0, n) + x, n)
            frame.put(out + start, ir.load(acc, 0, n) / ir.broadcast(divisor, n), n)


EMITTERS: dict[str, Callable[[Frame], None]] = {
    "max_pool2d": max_pool2d,
    "avg_pool2d": avg_pool2d,
}
