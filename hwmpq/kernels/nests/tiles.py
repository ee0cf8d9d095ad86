"""The implicit GEMM of convolutions, linear layers and matrix products on tile registers.

The rows of a tile are pixels a fixed distance apart. With stride 1 these are neighbours of the
whole padded image, which is one long *line*: what falls on its margin is computed and thrown away.
Otherwise each output row is a line of its own. The last block of a line, and the second tile of a
block, end where the line ends and overlap what came before: nothing is read behind it.

Reduction order, packing of the weights and the padded input are those of `gemm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from hwmpq.formats import Format
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.kernels.micro import Micro, TileMicro
from hwmpq.kernels.nests import Buffers, Call, Nest, Schedule, conv2d, matmul
from hwmpq.kernels.nests.gemm import Packing, blocks
from hwmpq.kernels.nests.image import Geometry, copy_padded
from hwmpq.kernels.nests.operand import Operand
from hwmpq.kernels.nests.panel import panel
from hwmpq.requantize import Z_IN
from hwmpq.types import Workload


class Tiles(Nest):
    name = "tiles"
    ops = (*conv2d.NEST.ops, *matmul.NEST.ops)
    tiled = True

    def why_not(self, workload: Workload, fmt: Format, micro: Micro) -> str | None:
        return _like(workload).why_not(workload, fmt, micro)

    def channels(self, workload: Workload, micro: Micro) -> int:
        return _like(workload).channels(workload, micro)

    def pack(
        self, codes: NDArray[Any], workload: Workload, micro: Micro, decoder: Decoder
    ) -> NDArray[Any]:
        return _like(workload).pack(codes, workload, micro, decoder)

    def pad(self, values: NDArray[Any], workload: Workload, micro: Micro) -> NDArray[Any]:
        return _like(workload).pad(values, workload, micro)

    def schedules(self, call: Call, micro: Micro) -> list[Schedule]:
        """Blocks of one and of two tiles, filled alike."""
        assert isinstance(micro, TileMicro)
        g = Geometry.of(call.workload)
        line, vectors = _Lines(g).length, -(-g.gout // micro.lanes)
        found: dict[tuple[int, int], float] = {}
        for tiles in (2, 1):
            rows = -(-line // -(-line // (tiles * micro.tile_rows)))
            for nj in (2, 1):
                if nj <= vectors:
                    found[rows, nj] = sum(
                        -(-line // rows) * count * micro.cycles(rows, v, call.format)
                        for count, v in blocks(vectors, nj)
                    )
        best = sorted(found, key=lambda block: (found[block], -block[0] * block[1]))
        return [Schedule(rows, nj) for rows, nj in best]

    def body(
        self, ir: IR, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule, bufs: Buffers
    ) -> None:
        assert isinstance(micro, TileMicro)
        _Emitter(ir, call, micro, decoder, schedule, bufs).emit()


def _like(workload: Workload) -> Nest:
    """The nest whose packing serves."""
    return conv2d.NEST if workload.has_weight else matmul.NEST


class _Lines:
    """How pixels follow each other. count: lines of an image; length: pixels of one; wide: output
    pixels between the beginnings of two rows in a line, 0 = a line is one row."""

    def __init__(self, g: Geometry):
        oh, ow = g.out
        width = g.padded[1]
        self.count, self.length, self.wide = oh, ow, 0
        if g.sh == g.sw == 1 and oh > 1:
            self.count, self.length, self.wide = 1, (oh - 1) * width + ow, width


class _Emitter:
    """Emission of one call; the state that its loops share."""

    def __init__(
        self, ir: IR, call: Call, micro: TileMicro, decoder: Decoder, schedule: Schedule,
        bufs: Buffers,
    ):  # fmt: skip
        self.ir, self.call, self.micro, self.decoder = ir, call, micro, decoder
        self.schedule, self.bufs = schedule, bufs
        self.g = Geometry.of(call.workload)
        self.p = Packing.of(self.g, micro, decoder.unit)
        self.lines = _Lines(self.g)
        self.depth = micro.tile_depth(-(-self.g.segment // micro.kstep))
        rows = schedule.rows
        self.height = -(-rows // -(-rows // micro.tile_rows))
        #: first row in the block of each tile of activations
        self.tiles = [0] if rows == self.height else [0, rows - self.height]
        self.sums: Buffer | None = None

    def emit(self) -> None:
        ir, g, p = self.ir, self.g, self.p
        over = p.per_segment * self.micro.kstep > g.segment
        self.source = copy_padded(
            ir, g, self.bufs, self.call.x, self.micro.a_dtype, self.micro.vector_bytes, force=over
        )
        if not self.call.workload.has_weight:
            with ir.loop(g.n, parallel=True) as image, self._tile_registers():
                for vector, count in self._vector_blocks():
                    tile = self._operand(image, vector, count)
                    self._image(0, image, vector, count, tile, 0)
        elif self.schedule.order == "vectors":
            with ir.loop(g.groups) as group:
                for vector, count in self._vector_blocks(parallel=True):
                    with self._tile_registers():
                        weight, at = self._weights(group, vector, count)
                        with ir.loop(g.n) as image:
                            self._image(group, image, vector, count, weight, at)
        else:
            with ir.loop(g.groups) as group:
                weight, at = self._weights(group, 0, p.vectors)
                with ir.loop(g.n * self.lines.count, parallel=True) as line, self._tile_registers():
                    for vector, count in self._vector_blocks():
                        first = at + vector * p.steps
                        self._line(group, line, vector, count, weight, first)

    @contextmanager
    def _tile_registers(self) -> Iterator[None]:
        """Tile registers belong to a thread: they are shaped inside the parallel loop."""
        self.micro.configure(self.ir, self.height, self.depth)
        size = self.schedule.rows * self.schedule.vectors * self.micro.lanes
        self.results = self.ir.scratch(size, self.micro.acc_dtype)
        yield
        self.micro.release(self.ir)

    def _vector_blocks(self, parallel: bool = False) -> Iterator[tuple[Expr, int]]:
        """(first vector, how many): full blocks of whole vectors in a loop, then the rest."""
        size = self.schedule.vectors
        full = self.g.gout // self.micro.lanes // size
        if full:
            with self.ir.loop(full, parallel) as block:
                yield block * size, size
        for first in range(full * size, self.p.vectors, size):
            yield first, min(size, self.p.vectors - first)

    def _weights(self, group: Expr, vector: Expr, count: int) -> tuple[Buffer, Expr]:
        weights, first, _ = panel(
            self.ir, self.call, self.g, self.p, self.micro, self.decoder, self.bufs,
            group, vector, count, 0, self.p.steps,
        )  # fmt: skip
        return weights, first

    def _operand(self, image: Expr, vector: Expr, count: int) -> Buffer:
        """Operand b of a matmul, packed; a's zero point goes into the sums."""
        ir, w = self.ir, self.call.workload
        start = image * w["k"] * w["n"]
        b = Operand(ir, self.call, self.micro, self.bufs.weight, start, self.p.steps)
        tile = b.tile(vector, count)
        if self.micro.acc_dtype == "int32":
            zero = ir.let(ir.cast(ir.load(self.bufs.scalars, Z_IN), "int32"))
            self.sums = b.sums(tile, count, ir.const(0, "int32") - zero)
        return tile

    def _image(
        self, group: Expr, image: Expr, vector: Expr, count: int, weight: Buffer, first: Expr
    ) -> None:
        with self.ir.loop(self.lines.count) as line:
            self._line(group, image * self.lines.count + line, vector, count, weight, first)

    def _line(
        self, group: Expr, line: Expr, vector: Expr, count: int, weight: Buffer, first: Expr
    ) -> None:
        """All pixels of a line (counted over all images) for `count` vectors of channels, whose
        weights begin at step `first`."""
        ir, m, rows, length = self.ir, self.micro, self.schedule.rows, self.lines.length
        with ir.loop(-(-length // rows)) as block:
            start = ir.let(ir.minimum(block * rows, length - rows))
            for i in range(len(self.tiles)):
                for j in range(count):
                    m.zero(ir, i, j)
            for index, dy, dx in self._taps():
                self._segment(group, line, start, dy, dx, index, count, weight, first)
            pitch = count * m.lanes
            for i, row in enumerate(self.tiles):
                for j in range(count):
                    m.store(ir, i, j, self.results, row * pitch + j * m.lanes, pitch)
            with ir.loop(rows) as row:
                self._finish(group, line, start + row, row, vector, count)

    def _taps(self) -> Iterator[tuple[Expr, Expr, Expr]]:
        """Loops over the segments: (index, row offset, column offset)."""
        g = self.g
        with self.ir.loop(g.kh) as i, self.ir.loop(1 if g.merged else g.kw) as j:
            yield (i if g.merged else i * g.kw + j), i * g.dh, j * g.dw

    def _segment(
        self, group: Expr, line: Expr, start: Expr, dy: Expr, dx: Expr, index: Expr, count: int,
        weight: Buffer, first: Expr,
    ) -> None:  # fmt: skip
        """Add the products of one segment to the sums of a block."""
        ir, m, g, p = self.ir, self.micro, self.g, self.p
        height, width = g.padded
        image, row = line // self.lines.count, line % self.lines.count
        pixel = (image * height + row * g.sh + dy) * width + start * g.sw + dx
        corner = pixel * g.cin + group * (g.cin // g.groups)
        with ir.loop(p.per_segment // self.depth) as chunk:
            for i, tile_row in enumerate(self.tiles):
                at = corner + tile_row * g.sw * g.cin + chunk * self.depth * m.kstep
                m.load_activations(ir, i, self.source, at, g.sw * g.cin)
            for j in range(count):
                step = first + j * p.steps + index * p.per_segment + chunk * self.depth
                m.load_weights(ir, j, weight, step * p.width)
                for i in range(len(self.tiles)):
                    m.product(ir, i, j)

    def _finish(
        self, group: Expr, line: Expr, at: Expr, row: Expr, vector: Expr, count: int
    ) -> None:
        """Epilogue of pixel `at` of a line, whose sums are the block's `row`."""
        ow = self.g.out[1]
        if not self.lines.wide:
            self._store(group, line * ow + at, row, vector, count)
            return
        y, x = at // self.lines.wide, at % self.lines.wide
        pixel = (line * self.g.out[0] + y) * ow + x
        if self.lines.wide == ow:
            self._store(group, pixel, row, vector, count)
            return
        with self.ir.when(self.ir.less(x, ow)):
            self._store(group, pixel, row, vector, count)

    def _store(self, group: Expr, pixel: Expr, row: Expr, vector: Expr, count: int) -> None:
        ir, m, g = self.ir, self.micro, self.g
        for j in range(count):
            value = ir.load(self.results, (row * count + j) * m.lanes, m.lanes)
            if self.sums is not None:
                value = value + ir.load(self.sums, j * m.lanes, m.lanes)
            channel = (group * self.p.vectors + vector + j) * m.lanes
            valid = m.lanes
            if isinstance(vector, int):
                valid = min(m.lanes, g.gout - (vector + j) * m.lanes)
            at = pixel * g.cout + group * g.gout + (vector + j) * m.lanes
            self.bufs.epilogue.store(ir, value, channel, at, m.lanes, valid)


NEST = Tiles()
