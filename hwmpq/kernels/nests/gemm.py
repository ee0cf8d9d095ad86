"""The implicit-GEMM core of convolutions, linear layers and batched matrix products.

Reduction order: a *segment* is a stretch of input that lies contiguously under the kernel window:
kw · cin elements of one row (no dilation, no groups), else cin / groups elements of one pixel. A
segment is read `kstep` elements at a time; weights are packed in exactly that order, `lanes`
output channels in a vector, zeros where a segment or the channels are not a multiple.

Input is read in place where possible. It is first copied to a padded scratch image when there is
padding (filled with the zero point), when the micro-kernel wants another dtype (u8 as int16, bf16
as fp32), or when the last step of a segment would read past the buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from hwmpq.kernels.codes import memory_dtype, to_f32
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.kernels.micro import Micro
from hwmpq.kernels.nests import Buffers, Call, Schedule
from hwmpq.kernels.nests.operand import Operand
from hwmpq.requantize import Z_IN
from hwmpq.types import Workload

_SLACK = 64


@dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution as the loops see it; one image when `flat` (1 × 1, stride 1)."""

    n: int
    h: int
    w: int
    cin: int
    cout: int
    kh: int
    kw: int
    sh: int
    sw: int
    pt: int
    pl: int
    pb: int
    pr: int
    dh: int
    dw: int
    groups: int

    @staticmethod
    def of(work: Workload) -> Geometry:
        if work.op == "linear":
            return Geometry(1, 1, work["m"], work["k"], work["n"], 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1)
        if work.op == "matmul":  # every image has weights of its own
            return Geometry(
                work["b"], 1, work["m"], work["k"], work["n"], 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1
            )
        g = Geometry(**dict(work.dims))
        plain = g.kh == g.kw == g.sh == g.sw == 1 and not any((g.pt, g.pl, g.pb, g.pr))
        if plain:
            return Geometry(
                1, 1, g.n * g.h * g.w, g.cin, g.cout, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, g.groups
            )
        return g

    @property
    def padded(self) -> tuple[int, int]:
        return self.h + self.pt + self.pb, self.w + self.pl + self.pr

    @property
    def out(self) -> tuple[int, int]:
        h, w = self.padded
        return (
            (h - self.dh * (self.kh - 1) - 1) // self.sh + 1,
            (w - self.dw * (self.kw - 1) - 1) // self.sw + 1,
        )

    @property
    def merged(self) -> bool:
        """A whole kernel row is contiguous."""
        return self.dw == 1 and self.groups == 1

    @property
    def taps(self) -> list[tuple[int, int]]:
        """(row, column) offset of every segment."""
        if self.merged:
            return [(i * self.dh, 0) for i in range(self.kh)]
        return [(i * self.dh, j * self.dw) for i in range(self.kh) for j in range(self.kw)]

    @property
    def segment(self) -> int:
        return self.kw * self.cin if self.merged else self.cin // self.groups

    @property
    def gout(self) -> int:
        return self.cout // self.groups


@dataclass(frozen=True)
class Packing:
    """How weights lie: [groups][vectors][steps] vectors of `width` codes, steps padded to unit."""

    vectors: int
    per_segment: int
    steps: int
    width: int

    @staticmethod
    def of(g: Geometry, micro: Micro, unit: int) -> Packing:
        per_segment = -(-g.segment // micro.kstep)
        steps = per_segment * len(g.taps)
        return Packing(
            -(-g.gout // micro.lanes),
            per_segment,
            -(-steps // unit) * unit,
            micro.lanes * micro.kstep,
        )


def blocks(total: int, size: int) -> list[tuple[int, int]]:
    """(count, size) of the full blocks and of the rest."""
    full, rest = divmod(total, size)
    return [(c, s) for c, s in ((full, size), (1, rest)) if c and s]


#: Registers left over by a block: LLVM keeps broadcasts that neighbouring pixels share alive, and
#: spills beyond this (seen: 6 × 2 blocks of 16 registers are slower than 4 × 2 on every shape).
_SPARE = 5
#: Bytes of decoded weights that may stay resident while rows are walked on the outside.
_RESIDENT = 24 * 1024


def schedules(call: Call, micro: Micro) -> list[Schedule]:
    """Register blocks that fit, by estimated cycles; small weights stay inside the row loop."""
    g = Geometry.of(call.workload)
    vectors = -(-g.gout // micro.lanes)
    width = {"float32": 4, "int16": 2, "int8": 1}[micro.w_dtype]
    weights = g.cin // g.groups * g.kh * g.kw * g.cout * width
    resident = weights <= _RESIDENT and call.workload.has_weight
    order = "rows" if resident else "vectors"
    found: list[tuple[float, Schedule]] = []
    for rows in range(1, 15):
        for nj in (1, 2, 3, 4):
            if rows * nj + nj + _SPARE > micro.registers or nj > vectors:
                continue
            cost = sum(
                count_r * count_v * micro.cycles(r, v, call.format)
                for count_r, r in blocks(g.out[1], rows)
                for count_v, v in blocks(vectors, nj)
            )
            found.append((cost, Schedule(rows, nj, order)))
    found.sort(key=lambda item: (round(item[0], 6), -item[1].rows * item[1].vectors))
    return [schedule for _, schedule in found]


def copy_padded(
    ir: IR, g: Geometry, bufs: Buffers, x: str, dtype: str, vector_bytes: int, force: bool
) -> Buffer:
    """The input with its padding, in `dtype`; the input itself where nothing has to change.

    x: its encoding. force: copy anyway, for the readable elements behind the end.
    """
    height, width = g.padded
    if memory_dtype(x) == dtype and not force and (height, width) == (g.h, g.w):
        return bufs.x
    slack = _SLACK + g.pl * g.cin
    scratch = ir.scratch(g.n * height * width * g.cin + slack, dtype)
    zero = ir.let(ir.cast(ir.load(bufs.scalars, Z_IN), dtype))
    row = width * g.cin
    with ir.loop(g.n) as image:
        at = image * height * row
        ir.fill(scratch, at, g.pt * row + g.pl * g.cin, zero, dtype)
        with ir.loop(g.h) as y:
            inside = at + (g.pt + y) * row + g.pl * g.cin
            source = (image * g.h + y) * g.w * g.cin
            _copy(ir, bufs.x, x, source, scratch, dtype, inside, g.w * g.cin, vector_bytes)
            # the right margin of this row and the left one of the next are neighbours
            ir.fill(scratch, inside + g.w * g.cin, (g.pl + g.pr) * g.cin, zero, dtype)
        below = at + (g.pt + g.h) * row + g.pl * g.cin
        ir.fill(scratch, below, max(g.pb * row - g.pl * g.cin, 0), zero, dtype)
    ir.fill(scratch, g.n * height * row, slack, zero, dtype)
    return scratch


def _copy(
    ir: IR, src: Buffer, encoding: str, start: Expr, dst: Buffer, dtype: str, to: Expr, size: int,
    vector_bytes: int,
) -> None:  # fmt: skip
    lanes = vector_bytes // {"float32": 4, "int16": 2, "uint8": 1}[dtype]
    for offset, n in ir.vectors(0, size, lanes):
        value = ir.load(src, start + offset, n)
        if dtype == "float32":
            value = to_f32(ir, value, encoding, n)
        elif memory_dtype(encoding) != dtype:
            value = ir.cast(value, dtype, n)
        ir.store(dst, to + offset, value, n)


class Emitter:
    """Emission of one convolution; the state that its loops share."""

    def __init__(
        self, ir: IR, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule, bufs: Buffers
    ):
        self.ir, self.call, self.micro, self.decoder = ir, call, micro, decoder
        self.schedule, self.bufs = schedule, bufs
        self.g = Geometry.of(call.workload)
        self.p = Packing.of(self.g, micro, decoder.unit)
        self.run = micro.run_length(call.format)
        self.parallel = call.threads > 1
        self.sums: Buffer | None = None

    def emit(self) -> None:
        self.source = self._input()
        self.height, self.width = self.g.padded
        if not self.call.workload.has_weight:
            with self.ir.loop(self.g.n, self.parallel) as image:
                # one parallel loop only: TVM's threads do not nest
                for vector, count in self._vector_blocks(parallel=self.parallel and self.g.n == 1):
                    weight = self._operand(image, vector, count)
                    self._pixels(0, image, 0, vector, count, partial(weight, 0))
            return
        by_rows = self.schedule.order == "rows"
        oh, _ = self.g.out
        with self.ir.loop(self.g.groups) as group:
            if by_rows:
                weight = self._weights(group, 0, self.p.vectors)
                with self.ir.loop(self.g.n) as image, self.ir.loop(oh, self.parallel) as row:
                    for vector, count in self._vector_blocks():
                        self._pixels(group, image, row, vector, count, partial(weight, vector))
            else:
                for vector, count in self._vector_blocks(self.parallel):
                    weight = self._weights(group, vector, count)
                    with self.ir.loop(self.g.n) as image, self.ir.loop(oh) as row:
                        self._pixels(group, image, row, vector, count, partial(weight, 0))

    def _vector_blocks(self, parallel: bool = False) -> Iterator[tuple[Expr, int]]:
        """Full blocks of whole vectors in a loop, then the rest with the partial vector."""
        whole = self.g.gout // self.micro.lanes
        size = self.schedule.vectors
        full = whole // size
        if full:
            with self.ir.loop(full, parallel) as block:
                yield block * size, size
        if self.p.vectors > full * size:
            yield full * size, self.p.vectors - full * size

    def _input(self) -> Buffer:
        """The image to read from, in the micro-kernel's dtype."""
        over = self.p.per_segment * self.micro.kstep > self.g.segment
        return copy_padded(
            self.ir, self.g, self.bufs, self.call.x, self.micro.a_dtype,
            self.micro.vector_bytes, force=over,
        )  # fmt: skip

    def _weights(self, group: Expr, vector: Expr, count: int) -> Any:
        """weight(first, j, step) -> vector of weights; decoded to a tile when they are packed."""
        ir, p = self.ir, self.p
        start = (group * p.vectors + vector) * p.steps
        if self.decoder.identity:
            source = self.bufs.weight
        else:
            source = ir.scratch(count * p.steps * p.width, self.micro.w_dtype)
            d = self.decoder
            packed = start // d.unit * d.rows * p.width
            with ir.loop(count * p.steps // d.unit) as block:
                d.expand(
                    ir, self.bufs.weight, packed + block * d.rows * p.width,
                    source, block * d.unit * p.width, p.width,
                )  # fmt: skip
            start = 0

        def weight(first: Expr, j: int, step: Expr) -> Expr:
            return ir.load(source, (start + (first + j) * p.steps + step) * p.width, p.width)

        return weight

    def _operand(self, image: Expr, vector: Expr, count: int) -> Any:
        """A block of operand b of a matmul, packed into a tile as weights are; its column sums
        times the zero point of a are what the accumulators start from."""
        ir, p, m, w = self.ir, self.p, self.micro, self.call.workload
        b = Operand(ir, self.call, m, self.bufs.weight, image * w["k"] * w["n"], p.steps)
        tile = b.tile(vector, count)
        if m.acc_dtype == "int32":
            zero = ir.let(ir.cast(ir.load(self.bufs.scalars, Z_IN), "int32"))
            self.sums = b.sums(tile, count, ir.const(0, "int32") - zero)

        def weight(first: Expr, j: int, step: Expr) -> Expr:
            return ir.load(tile, ((first + j) * p.steps + step) * p.width, p.width)

        return weight

    def _pixels(
        self, group: Expr, image: Expr, row: Expr, vector: Expr, count: int, weight: Any
    ) -> None:
        """One output row: blocks of `rows` pixels, then the rest."""
        ow = self.g.out[1]
        size = min(self.schedule.rows, ow)
        full = ow // size
        flat = self.g.out[0] == 1 and self.call.workload.has_weight
        flat_parallel = self.parallel and self.schedule.order == "rows" and flat
        with self.ir.loop(full, flat_parallel) as block:
            self._block(group, image, row, block * size, size, vector, count, weight)
        if ow % size:
            self._block(group, image, row, full * size, ow % size, vector, count, weight)

    def _block(
        self, group: Expr, image: Expr, row: Expr, column: Expr, rows: int,
        vector: Expr, count: int, weight: Any,
    ) -> None:  # fmt: skip
        ir, m, g = self.ir, self.micro, self.g
        acc = ir.local(rows * count * m.lanes, m.acc_dtype)
        for i in range(rows * count):
            if self.sums is None:
                start = ir.const(0, m.acc_dtype, m.lanes)
            else:
                start = ir.load(self.sums, i % count * m.lanes, m.lanes)
            ir.store(acc, i * m.lanes, start, m.lanes)
        narrow = ir.local(rows * count * m.partial_lanes, m.partial_dtype) if self.run else None
        for index, (dy, dx) in self._taps():
            corner = (
                ((image * self.height + row * g.sh + dy) * self.width + column * g.sw + dx) * g.cin
                + group * (g.cin // g.groups)
            )  # fmt: skip
            steps = index * self.p.per_segment
            self._reduce(acc, narrow, corner, steps, rows, count, weight)
        oh, ow = g.out
        for i in range(rows):
            pixel = (image * oh + row) * ow + column + i
            for j in range(count):
                channel = (group * self.p.vectors + vector + j) * m.lanes
                at = pixel * g.cout + group * g.gout + (vector + j) * m.lanes
                valid = m.lanes
                if g.gout % m.lanes and isinstance(vector, int):
                    valid = min(m.lanes, g.gout - (vector + j) * m.lanes)
                value = ir.load(acc, (i * count + j) * m.lanes, m.lanes)
                self.bufs.epilogue.store(ir, value, channel, at, m.lanes, valid)

    def _taps(self) -> Iterator[tuple[Expr, tuple[Expr, Expr]]]:
        """Loops over the segments: (index, (row offset, column offset))."""
        g = self.g
        with self.ir.loop(g.kh) as i:
            if g.merged:
                yield i, (i * g.dh, 0)
            else:
                with self.ir.loop(g.kw) as j:
                    yield i * g.kw + j, (i * g.dh, j * g.dw)

    def _reduce(
        self, acc: Buffer, narrow: Buffer | None, corner: Expr, steps: Expr,
        rows: int, count: int, weight: Any,
    ) -> None:  # fmt: skip
        """Accumulate one segment."""
        ir, length = self.ir, self.p.per_segment
        if narrow is None:
            with ir.loop(length) as k:
                self._step(acc, corner, steps, k, rows, count, weight)
            return
        run = min(self.run, length)
        with ir.loop(length // run) as chunk:
            self._run(acc, narrow, corner, steps, chunk * run, run, rows, count, weight)
        if length % run:
            start = length // run * run
            self._run(acc, narrow, corner, steps, start, length % run, rows, count, weight)

    def _run(
        self, acc: Buffer, narrow: Buffer, corner: Expr, steps: Expr, start: Expr, length: int,
        rows: int, count: int, weight: Any,
    ) -> None:  # fmt: skip
        """`length` dots summed narrowly, then widened into the accumulators."""
        ir, m = self.ir, self.micro
        for k in range(length):
            self._step(narrow, corner, steps, start + k, rows, count, weight, first=k == 0)
        for i in range(rows * count):
            wide = ir.load(acc, i * m.lanes, m.lanes)
            sums = ir.load(narrow, i * m.partial_lanes, m.partial_lanes)
            ir.store(acc, i * m.lanes, m.widen(ir, wide, sums), m.lanes)

    def _step(
        self, acc: Buffer, corner: Expr, steps: Expr, k: Expr, rows: int, count: int,
        weight: Any, first: bool | None = None,
    ) -> None:  # fmt: skip
        """One reduction step of the block; first is None without partial sums."""
        ir, m = self.ir, self.micro
        weights = [ir.let(weight(j, steps + k)) for j in range(count)]
        for i in range(rows):
            at = corner + i * self.g.sw * self.g.cin + k * m.kstep
            a = ir.let(m.broadcast(ir, self.source, at))
            for j in range(count):
                if first is None:
                    at, lanes = (i * count + j) * m.lanes, m.lanes
                    value = m.dot(ir, ir.load(acc, at, lanes), a, weights[j])
                else:
                    at, lanes = (i * count + j) * m.partial_lanes, m.partial_lanes
                    value = m.partial(ir, a, weights[j])
                    if not first:
                        value = ir.load(acc, at, lanes) + value
                ir.store(acc, at, value, lanes)
