"""The implicit-GEMM core of convolutions, linear layers and batched matrix products.

Reduction order: a *segment* is a stretch of input that lies contiguously under the kernel window:
kw · cin elements of one row (no dilation, no groups), else cin / groups elements of one pixel. A
segment is read `kstep` elements at a time; weights are packed in exactly that order, `lanes`
output channels in a vector, zeros where a segment or the channels are not a multiple.

Input is read in place where possible (nests/image.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from hwmpq.formats import Format
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.epilogue import Run
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.kernels.micro import Micro
from hwmpq.kernels.nests import Buffers, Call, Schedule
from hwmpq.kernels.nests.image import Geometry, copy_padded
from hwmpq.kernels.nests.operand import Operand
from hwmpq.kernels.nests.panel import panel
from hwmpq.requantize import Z_IN


@dataclass(frozen=True)
class Packing:
    """How weights lie: [groups][vectors][steps] vectors of `width` codes, steps padded to unit."""

    vectors: int
    per_segment: int
    steps: int
    width: int

    @staticmethod
    def of(g: Geometry, micro: Micro, unit: int) -> Packing:
        per_segment = micro.depth(-(-g.segment // micro.kstep))
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


#: Bytes of a multiplied weight.
WIDTH = {"float32": 4, "int16": 2, "uint16": 2, "int8": 1}
#: Bytes of decoded weights that may stay resident while rows are walked on the outside.
_RESIDENT = 24 * 1024
#: Estimated slowdown of the other order of loops.
_TURNED = 1.15
#: Bytes of decoded weights that a pass over all pixels multiplies: with the activations beside
#: them they stay in the L1 cache. Larger weights take several passes.
_PASS = 24 * 1024
#: Pixels from which passes pay: with fewer, weights come faster from memory in one long run.
_PASS_PIXELS = 128


def row_cycles(pixels: int, vectors: int, schedule: Schedule, micro: Micro, fmt: Format) -> float:
    """Estimated cycles of one reduction step of a row; its last block of pixels is a whole one that
    overlaps its neighbour."""
    per_block = sum(
        n * micro.cycles(schedule.rows, v, fmt) for n, v in blocks(vectors, schedule.vectors)
    )
    return -(-pixels // schedule.rows) * per_block


def schedules(call: Call, micro: Micro) -> list[Schedule]:
    """Register blocks that fit × orders of the loops, by estimated cycles: small weights stay
    inside the row loop. Weights that are an activation have the one order."""
    g = Geometry.of(call.workload)
    vectors = -(-g.gout // micro.lanes)
    weights = g.cin // g.groups * g.kh * g.kw * g.cout * WIDTH[micro.w_dtype]
    orders = {"rows": 1.0, "vectors": _TURNED}
    if not call.workload.has_weight:
        orders = {"vectors": 1.0}
    elif weights > _RESIDENT:
        orders = {"vectors": 1.0, "rows": _TURNED}
    found: list[tuple[float, Schedule]] = []
    for rows in range(1, min(14, g.out[1]) + 1):
        for nj in (1, 2, 3, 4):
            if rows * nj + nj + micro.spare > micro.registers or nj > vectors:
                continue
            cost = row_cycles(g.out[1], vectors, Schedule(rows, nj), micro, call.format)
            found += [(cost * slower, Schedule(rows, nj, o)) for o, slower in orders.items()]
    found.sort(key=lambda item: (round(item[0], 6), -item[1].rows * item[1].vectors))
    return [schedule for _, schedule in found]


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
                    self._passes(group, vector, count)

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

    def _weights(
        self, group: Expr, vector: Expr, count: int, begin: Expr = 0, steps: int = 0
    ) -> Any:
        """weight(first, j, step) -> vector of weights; decoded to a tile when they are packed.

        begin, steps: a stretch of the reduction, 0 = all of it; step is counted from `begin` on.
        """
        ir, p = self.ir, self.p
        source, start, pitch = panel(
            ir, self.call, self.g, p, self.micro, self.decoder, self.bufs,
            group, vector, count, begin, steps or p.steps,
        )  # fmt: skip

        def weight(first: Expr, j: int, step: Expr) -> Expr:
            return ir.load(source, (start + (first + j) * pitch + step) * p.width, p.width)

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

    def _passes(self, group: Expr, vector: Expr, count: int) -> None:
        """All pixels of a block of vectors. Weights that the L1 cache cannot hold are multiplied
        stretch by stretch of the reduction; the sums of all pixels wait in memory meanwhile."""
        ir, m, p, (oh, ow) = self.ir, self.micro, self.p, self.g.out
        depth = self._depth(count)
        if depth == p.steps:
            weight = partial(self._weights(group, vector, count), 0)
            with ir.loop(self.g.n) as image, ir.loop(oh) as row:
                self._pixels(group, image, row, vector, count, weight)
            return
        size = self.rows * count * m.lanes
        total = self.g.n * oh * -(-ow // self.rows) * size
        sums = ir.scratch(total, m.acc_dtype)
        ir.fill(sums, 0, total, ir.const(0, m.acc_dtype), m.acc_dtype)

        def blocks_of_image() -> Iterator[tuple[tuple[Expr, Expr, Expr], Expr]]:
            with ir.loop(self.g.n) as image, ir.loop(oh) as row:
                for block, column in self._columns():
                    index = (image * oh + row) * -(-ow // self.rows) + block
                    yield (image, row, column), index * size

        for tap, offset in self._taps():
            with ir.loop(p.per_segment // depth) as piece:
                begin = piece * depth
                step = tap * p.per_segment + begin
                weight = partial(self._weights(group, vector, count, step, depth), 0)
                for pixel, at in blocks_of_image():
                    acc = ir.local(size, m.acc_dtype)
                    for i in range(0, size, m.lanes):
                        ir.store(acc, i, ir.load(sums, at + i, m.lanes), m.lanes)
                    corner = self._corner(group, pixel, offset) + begin * m.kstep
                    self._reduce(acc, corner, 0, depth, self.rows, count, weight)
                    for i in range(0, size, m.lanes):
                        ir.store(sums, at + i, ir.load(acc, i, m.lanes), m.lanes)
        for pixel, at in blocks_of_image():
            self._finish(sums, at, group, pixel, vector, count)

    def _depth(self, count: int) -> int:
        """Reduction steps of one pass: all, or the largest equal part of a segment that fits and
        that the decoder can begin with."""
        p, (oh, ow) = self.p, self.g.out
        if self.g.n * oh * ow < _PASS_PIXELS:
            return p.steps
        step = count * p.width * WIDTH[self.micro.w_dtype]
        if p.steps * step <= _PASS or p.steps != p.per_segment * len(self.g.taps):
            return p.steps
        unit = self.decoder.unit
        fit = [
            d for d in range(unit, p.per_segment + 1, unit)
            if p.per_segment % d == 0 and d * step <= _PASS
        ]  # fmt: skip
        # shorter stretches would read and write the sums too often
        return max(fit) if fit and max(fit) * step * 4 >= _PASS else p.steps

    @property
    def rows(self) -> int:
        """Pixels of a block."""
        return min(self.schedule.rows, self.g.out[1])

    def _columns(self, parallel: bool = False) -> Iterator[tuple[Expr, Expr]]:
        """(index, first pixel) of the blocks of an output row. The last one ends with the row: what
        it shares with its neighbour is computed twice, and the block's code exists once."""
        ow, size = self.g.out[1], self.rows
        with self.ir.loop(-(-ow // size), parallel) as block:
            column = block * size
            if ow % size:
                column = self.ir.let(self.ir.minimum(column, ow - size))
            yield block, column

    def _pixels(
        self, group: Expr, image: Expr, row: Expr, vector: Expr, count: int, weight: Any
    ) -> None:
        """One output row."""
        flat = self.g.out[0] == 1 and self.call.workload.has_weight
        for _, column in self._columns(self.parallel and self.schedule.order == "rows" and flat):
            self._block(group, (image, row, column), vector, count, weight)

    def _block(
        self, group: Expr, pixel: tuple[Expr, Expr, Expr], vector: Expr, count: int, weight: Any
    ) -> None:
        ir, m = self.ir, self.micro
        acc = ir.local(self.rows * count * m.lanes, m.acc_dtype)
        for i in range(self.rows * count):
            if self.sums is None:
                start = ir.const(0, m.acc_dtype, m.lanes)
            else:
                start = ir.load(self.sums, i % count * m.lanes, m.lanes)
            ir.store(acc, i * m.lanes, start, m.lanes)
        length = self.p.per_segment
        for index, offset in self._taps():
            corner = self._corner(group, pixel, offset)
            self._reduce(acc, corner, index * length, length, self.rows, count, weight)
        self._finish(acc, 0, group, pixel, vector, count)

    def _corner(
        self, group: Expr, pixel: tuple[Expr, Expr, Expr], offset: tuple[Expr, Expr]
    ) -> Expr:
        """Where a segment of a pixel begins in the input."""
        g, (image, row, column), (dy, dx) = self.g, pixel, offset
        line = image * self.height + row * g.sh + dy
        return (line * self.width + column * g.sw + dx) * g.cin + group * (g.cin // g.groups)

    def _finish(
        self, acc: Buffer, base: Expr, group: Expr, pixel: tuple[Expr, Expr, Expr],
        vector: Expr, count: int,
    ) -> None:  # fmt: skip
        """The epilogue of a block; the last of all vectors may have fewer channels than lanes."""
        ir, g, lanes, epilogue = self.ir, self.g, self.micro.lanes, self.bufs.epilogue
        (oh, ow), (image, row, column) = g.out, pixel
        whole = min(count, g.gout // lanes - vector) if isinstance(vector, int) else count
        channel = (group * self.p.vectors + vector) * lanes
        runs = []
        for i in range(self.rows):
            sums = [ir.load(acc, base + (i * count + j) * lanes, lanes) for j in range(count)]
            at = ((image * oh + row) * ow + column + i) * g.cout + group * g.gout + vector * lanes
            runs.append(Run(sums[:whole], channel, at))
            if whole < count:
                part, skip = sums[whole], whole * lanes
                epilogue.store(ir, part, channel + skip, at + skip, lanes, g.gout % lanes)
        if whole:
            epilogue.store_runs(ir, runs, lanes)

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
        self, acc: Buffer, corner: Expr, steps: Expr, length: int,
        rows: int, count: int, weight: Any,
    ) -> None:  # fmt: skip
        """Accumulate `length` steps of a segment."""
        ir, m = self.ir, self.micro
        if not self.run:
            with ir.loop(length) as k:
                self._step(acc, corner, steps, k, rows, count, weight)
            return
        narrow = ir.local(rows * count * m.partial_lanes, m.partial_dtype)
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
