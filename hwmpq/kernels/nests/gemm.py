"""The implicit-GEMM core of convolutions, linear layers and batched matrix products.

Reduction order: a *segment* is a stretch of input that lies contiguously under the kernel window:
kw · cin elements of one row (no dilation, no groups), else cin / groups elements of one pixel. A
segment is read `kstep` elements at a time; weights are packed in exactly that order, `lanes`
output channels in a vector, zeros where a segment or the channels are not a multiple.

Input is read in place where possible (nests/image.py). A block of pixels is a run of all output
pixels, over the ends of rows and images: each of its pixels has a corner of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

from hwmpq.formats import Format
from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.epilogue import Run
from hwmpq.kernels.ir import IR, Buffer, Expr, Part
from hwmpq.kernels.micro import BYTES, Micro
from hwmpq.kernels.nests import Buffers, Call, Schedule
from hwmpq.kernels.nests.image import Geometry, copy_padded
from hwmpq.kernels.nests.operand import Operand
from hwmpq.kernels.nests.panel import panel
from hwmpq.requantize import Z_IN
from hwmpq.types import Workload


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


#: Bytes of decoded weights that may stay resident while rows are walked on the outside.
_RESIDENT = 24 * 1024
#: Estimated slowdown of the other order of loops.
_TURNED = 1.15
#: Bytes of decoded weights that a pass over all pixels multiplies: with the activations beside
#: them they stay in the L1 cache. Larger weights take several passes.
_PASS = 24 * 1024
#: Pixels from which passes pay: with fewer, weights come faster from memory in one long run.
_PASS_PIXELS = 128


def pixels_of(workload: Workload) -> int:
    """Pixels that share their weights: all, in a matmul those of one image."""
    g = Geometry.of(workload)
    return g.out[0] * g.out[1] * (g.n if workload.has_weight else 1)


def row_cycles(pixels: int, vectors: int, schedule: Schedule, micro: Micro, fmt: Format) -> float:
    """Estimated cycles of one reduction step of a run of pixels; its last block is a whole one that
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
    weights = g.cin // g.groups * g.kh * g.kw * g.cout * BYTES[micro.w_dtype]
    orders = {"rows": 1.0, "vectors": _TURNED}
    if not call.workload.has_weight:
        orders = {"vectors": 1.0}
    elif weights > _RESIDENT:
        orders = {"vectors": 1.0, "rows": _TURNED}
    found: list[tuple[float, Schedule]] = []
    pixels = pixels_of(call.workload)
    for rows in range(1, min(14, pixels) + 1):
        for nj in (1, 2, 3, 4):
            if micro.block_registers(rows, nj) > micro.registers or nj > vectors:
                continue
            cost = row_cycles(pixels, vectors, Schedule(rows, nj), micro, call.format)
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
        self.epilogue = replace(bufs.epilogue, begun=True)
        self.run = micro.run_length(call.format)
        self.pixels = pixels_of(call.workload)
        #: pixels of a block
        self.rows = min(schedule.rows, self.pixels)
        self.blocks = -(-self.pixels // self.rows)
        #: dots that multiply them by one vector of weights, and the sums of one
        self.strips, self.wide = -(-self.rows // micro.height), micro.height * micro.lanes
        self.sums: Buffer | None = None

    def emit(self) -> None:
        self.source = self._input()
        if not self.call.workload.has_weight:
            self._images()
            return
        with self.ir.loop(self.g.groups) as group:
            by_pixels = self.schedule.order == "rows" or self._shares_pixels()
            with self.ir.shared(self.blocks, by_pixels) as part:
                if self.schedule.order == "rows":
                    weight = self._weights(group, 0, self.p.vectors)
                    for _, pixel in self._pixel_blocks(part):
                        for vector, count in self._vector_blocks():
                            self._block(group, pixel, vector, count, partial(weight, vector))
                else:
                    for vector, count in self._vector_blocks(parallel=not by_pixels):
                        self._passes(group, vector, count, part)

    def _images(self) -> None:
        """A batched product. The blocks of all images are shared out as one row of them, so that
        three images keep two threads busy: the one in the middle is packed by both."""
        ir, blocks = self.ir, self.blocks
        with ir.shared(self.g.n * blocks) as (first, behind):
            with ir.between(first // blocks, (behind - 1) // blocks + 1) as image:
                begin, end = 0, blocks
                if ir.threads > 1:
                    begin = ir.let(ir.maximum(first - image * blocks, 0))
                    end = ir.let(ir.minimum(behind - image * blocks, blocks))
                for vector, count in self._vector_blocks():
                    weight = self._operand(image, vector, count)
                    for _, pixel in self._pixel_blocks((begin, end)):
                        at = image * self.pixels + pixel
                        self._block(0, at, vector, count, partial(weight, 0))

    def _shares_pixels(self) -> bool:
        """Whether threads share out the pixels and not the weights, whichever are more bytes: what
        one core wrote last, another one reads slowly."""
        w, call = self.call.workload, self.call
        moved = prod(w.in_shape) * BYTES[memory_dtype(call.x)]
        moved += prod(w.out_shape) * BYTES[memory_dtype(call.out)]
        return moved > prod(w.weight_shape) * call.format.weight.bits / 8

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
        m, over = self.micro, self.p.per_segment * self.micro.kstep > self.g.segment
        return copy_padded(
            self.ir, self.g, self.bufs, self.call.x, m.a_dtype, m.vector_bytes, force=over,
            offset=m.offset(self.call.format),
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
            self.sums = b.sums(tile, count, ir.const(m.offset(self.call.format), "int32") - zero)

        def weight(first: Expr, j: int, step: Expr) -> Expr:
            return ir.load(tile, ((first + j) * p.steps + step) * p.width, p.width)

        return weight

    def _passes(self, group: Expr, vector: Expr, count: int, part: Part) -> None:
        """The pixels of a block of vectors. Weights that the L1 cache cannot hold are multiplied
        stretch by stretch of the reduction; the sums of all pixels wait in memory meanwhile."""
        ir, m, p = self.ir, self.micro, self.p
        depth = self._depth(count)
        if depth == p.steps:
            weight = partial(self._weights(group, vector, count), 0)
            for _, pixel in self._pixel_blocks(part):
                self._block(group, pixel, vector, count, weight)
            return
        size = self.strips * count * self.wide
        sums = ir.scratch(self.blocks * size, m.acc_dtype)
        with ir.between(*part) as block:
            self._begin(sums, block * size, group, vector, count)
        for tap, offset in self._taps():
            with ir.loop(p.per_segment // depth) as piece:
                begin = piece * depth
                step = tap * p.per_segment + begin
                weight = partial(self._weights(group, vector, count, step, depth), 0)
                for block, pixel in self._pixel_blocks(part):
                    acc, at = ir.local(size, m.acc_dtype), block * size
                    for i in range(0, size, m.lanes):
                        ir.store(acc, i, ir.load(sums, at + i, m.lanes), m.lanes)
                    corners = self._corners(group, pixel)
                    self._reduce(acc, corners, offset + begin * m.kstep, 0, depth, count, weight)
                    for i in range(0, size, m.lanes):
                        ir.store(sums, at + i, ir.load(acc, i, m.lanes), m.lanes)
        for block, pixel in self._pixel_blocks(part):
            self._finish(sums, block * size, group, pixel, vector, count)

    def _depth(self, count: int) -> int:
        """Reduction steps of one pass: all, or the largest equal part of a segment that fits and
        that the decoder can begin with."""
        p = self.p
        if self.pixels < _PASS_PIXELS:
            return p.steps
        step = count * p.width * BYTES[self.micro.w_dtype]
        if p.steps * step <= _PASS or p.steps != p.per_segment * len(self.g.taps):
            return p.steps
        unit = self.decoder.unit
        fit = [
            d for d in range(unit, p.per_segment + 1, unit)
            if p.per_segment % d == 0 and d * step <= _PASS
        ]  # fmt: skip
        # shorter stretches would read and write the sums too often
        return max(fit) if fit and max(fit) * step * 4 >= _PASS else p.steps

    def _pixel_blocks(self, part: Part) -> Iterator[tuple[Expr, Expr]]:
        """(index, first pixel) of the blocks. The last one ends with the pixels: what it shares
        with its neighbour is computed twice, and the block's code exists once."""
        size = self.rows
        with self.ir.between(*part) as block:
            pixel = block * size
            if self.pixels % size:
                pixel = self.ir.minimum(pixel, self.pixels - size)
            yield block, pixel

    def _block(self, group: Expr, pixel: Expr, vector: Expr, count: int, weight: Any) -> None:
        acc = self.ir.local(self.strips * count * self.wide, self.micro.acc_dtype)
        self._begin(acc, 0, group, vector, count)
        corners = self._corners(group, pixel)
        length = self.p.per_segment
        for index, offset in self._taps():
            self._reduce(acc, corners, offset, index * length, length, count, weight)
        self._finish(acc, 0, group, pixel, vector, count)

    def _begin(self, acc: Buffer, base: Expr, group: Expr, vector: Expr, count: int) -> None:
        """The sums of a block before anything is added."""
        ir, lanes = self.ir, self.micro.lanes
        for j in range(count):
            channel = (group * self.p.vectors + vector + j) * lanes
            start = self.epilogue.first(ir, channel, lanes)
            if self.sums is not None:
                start = ir.let(start + ir.load(self.sums, j * lanes, lanes))
            for i in range(self.strips):
                at = base + (i * count + j) * self.wide
                ir.store(acc, at, self.micro.begin(ir, start), self.wide)

    def _corners(self, group: Expr, pixel: Expr) -> list[Expr]:
        """Where the window of each pixel of a block begins in the input. The last of them stands
        again for those that a dot takes beside it."""
        g, (oh, ow), (height, width) = self.g, self.g.out, self.g.padded

        def corner(at: Expr) -> Expr:
            line, column = at // ow, at % ow
            image, row = line // oh, line % oh
            inside = ((image * height + row * g.sh) * width + column * g.sw) * g.cin
            return self.ir.let(inside + group * (g.cin // g.groups))

        if ow % self.rows and g.n * oh > 1:
            corners = [corner(pixel + i) for i in range(self.rows)]
        else:
            first = corner(pixel)
            corners = [first + i * g.sw * g.cin for i in range(self.rows)]
        return corners + corners[-1:] * (self.strips * self.micro.height - self.rows)

    def _finish(
        self, acc: Buffer, base: Expr, group: Expr, pixel: Expr, vector: Expr, count: int
    ) -> None:
        """The epilogue of a block; the last of all vectors may have fewer channels than lanes."""
        ir, g, lanes = self.ir, self.g, self.micro.lanes
        whole = min(count, g.gout // lanes - vector) if isinstance(vector, int) else count
        channel = (group * self.p.vectors + vector) * lanes
        runs = []
        for i in range(self.rows):
            strip, row = divmod(i, self.micro.height)
            places = [base + (strip * count + j) * self.wide for j in range(count)]
            sums = [self.micro.rows(ir, ir.load(acc, at, self.wide))[row] for at in places]
            at = (pixel + i) * g.cout + group * g.gout + vector * lanes
            runs.append(Run(sums[:whole], channel, at))
            if whole < count:
                part, skip = sums[whole], whole * lanes
                self.epilogue.store(ir, part, channel + skip, at + skip, lanes, g.gout % lanes)
        if whole:
            self.epilogue.store_runs(ir, runs, lanes)

    def _taps(self) -> Iterator[tuple[Expr, Expr]]:
        """Loops over the segments: (index, where it begins behind the corner of the window)."""
        g, line = self.g, self.g.padded[1] * self.g.cin
        with self.ir.loop(g.kh) as i:
            if g.merged:
                yield i, i * g.dh * line
            else:
                with self.ir.loop(g.kw) as j:
                    yield i * g.kw + j, i * g.dh * line + j * g.dw * g.cin

    def _reduce(
        self, acc: Buffer, corners: list[Expr], offset: Expr, steps: Expr, length: int, count: int,
        weight: Any,
    ) -> None:  # fmt: skip
        """Accumulate `length` steps of a segment, which begins `offset` behind the corners."""
        ir, m = self.ir, self.micro
        places = [ir.let(corner + offset) for corner in corners]
        if not self.run:
            whole = length // m.ahead * m.ahead
            if whole:
                with ir.loop(whole // m.ahead) as chunk:
                    self._steps(acc, places, steps, chunk * m.ahead, m.ahead, count, weight)
            if length > whole:
                with ir.loop(length - whole) as k:
                    self._steps(acc, places, steps, whole + k, 1, count, weight)
            return
        narrow = ir.local(self.rows * count * m.partial_lanes, m.partial_dtype)
        run = min(self.run, length)
        with ir.loop(length // run) as chunk:
            self._run(acc, narrow, places, steps, chunk * run, run, count, weight)
        if length % run:
            start = length // run * run
            self._run(acc, narrow, places, steps, start, length % run, count, weight)

    def _run(
        self, acc: Buffer, narrow: Buffer, places: list[Expr], steps: Expr, start: Expr,
        length: int, count: int, weight: Any,
    ) -> None:  # fmt: skip
        """`length` dots summed narrowly, then widened into the accumulators."""
        ir, m = self.ir, self.micro
        for k in range(length):
            self._narrow_step(narrow, places, steps, start + k, count, weight, first=k == 0)
        for i in range(self.rows * count):
            wide = ir.load(acc, i * m.lanes, m.lanes)
            sums = ir.load(narrow, i * m.partial_lanes, m.partial_lanes)
            ir.store(acc, i * m.lanes, m.widen(ir, wide, sums), m.lanes)

    def _steps(
        self, acc: Buffer, places: list[Expr], steps: Expr, k: Expr, many: int, count: int,
        weight: Any,
    ) -> None:  # fmt: skip
        """`many` reduction steps of the block, whose activations are loaded at once."""
        ir, m, wide = self.ir, self.micro, self.wide
        given = [
            m.operands(ir, self.source, [p + k * m.kstep for p in places[i : i + m.height]], many)
            for i in range(0, len(places), m.height)
        ]
        for step in range(many):
            weights = [ir.let(weight(j, steps + k + step)) for j in range(count)]
            for i, activations in enumerate(given):
                a = ir.let(activations[step])
                for j in range(count):
                    at = (i * count + j) * wide
                    ir.store(acc, at, m.dot(ir, ir.load(acc, at, wide), a, weights[j]), wide)

    def _narrow_step(
        self, narrow: Buffer, places: list[Expr], steps: Expr, k: Expr, count: int, weight: Any,
        first: bool,
    ) -> None:  # fmt: skip
        """One reduction step into the partial sums, which begin with the first one."""
        ir, m = self.ir, self.micro
        weights = [ir.let(weight(j, steps + k)) for j in range(count)]
        for i, place in enumerate(places):
            a = ir.let(m.broadcast(ir, self.source, place + k * m.kstep))
            for j in range(count):
                at, lanes = (i * count + j) * m.partial_lanes, m.partial_lanes
                value = m.partial(ir, a, weights[j])
                if not first:
                    value = ir.load(narrow, at, lanes) + value
                ir.store(narrow, at, value, lanes)
