"""The loops of the winograd nest: transform inputs and weights, multiply point by point, finish.

In memory: inputs [points][tiles][channels], weights [vector][points][steps] vectors of weights,
sums [points][tiles][vectors of channels]. Between two points lies an additional cache line, and
what belongs to the points of a tile falls on different sets of the L1 cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.epilogue import Run
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.kernels.micro import Micro
from hwmpq.kernels.nests import Buffers, Call, Schedule, toom
from hwmpq.kernels.nests.image import copy_padded
from hwmpq.kernels.nests.tiling import Tiling
from hwmpq.kernels.nests.toom import INVERSE, POINTS, SHIFT, SIDE, SIZE, both

_LINE = 64
#: Bytes of transformed weights of a block of channels: they stay in the L2 cache.
_PANEL = 160 * 1024


@dataclass(frozen=True)
class _Lanes:
    """A vector of int16 or int32 as the transforms calculate with it: int32 wraps around."""

    ir: IR
    value: Expr
    dtype: str
    lanes: int

    def __add__(self, other: _Lanes) -> _Lanes:
        if self.dtype == "int32":
            return self._new(self.ir.wrapping("add", self.value, other.value, self.lanes))
        return self._new(self.value + other.value)

    def __sub__(self, other: _Lanes) -> _Lanes:
        if self.dtype == "int32":
            return self._new(self.ir.wrapping("sub", self.value, other.value, self.lanes))
        return self._new(self.value - other.value)

    def __mul__(self, factor: int) -> _Lanes:
        number = self.ir.const(factor, self.dtype, self.lanes)
        if self.dtype == "int32":
            return self._new(self.ir.wrapping("mul", self.value, number, self.lanes))
        return self._new(self.value * number)

    def __lshift__(self, bits: int) -> _Lanes:
        return self._new(self.value << self.ir.const(bits, self.dtype, self.lanes))

    def __rshift__(self, bits: int) -> _Lanes:
        return self._new(self.value >> self.ir.const(bits, self.dtype, self.lanes))

    def _new(self, value: Expr) -> _Lanes:
        return replace(self, value=self.ir.let(value))


@dataclass(frozen=True)
class _Square:
    """Transformed values in memory, `pitch` elements from point to point."""

    buffer: Buffer
    pitch: int

    @staticmethod
    def of(ir: IR, size: int, dtype: str, item: int, copies: int = 1) -> _Square:
        pitch = size + _LINE // item
        return _Square(ir.scratch(copies * POINTS * pitch, dtype), pitch)

    @property
    def size(self) -> int:
        return POINTS * self.pitch

    def store(self, ir: IR, values: list[list[_Lanes]], at: Expr) -> None:
        for point, one in enumerate(v for line in values for v in line):
            ir.store(self.buffer, at + point * self.pitch, one.value, one.lanes)


class Emitter:
    """Emission of one convolution; the state that its loops share."""

    def __init__(
        self, ir: IR, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule,
        bufs: Buffers, tiling: Tiling,
    ):  # fmt: skip
        self.ir, self.call, self.micro, self.decoder = ir, call, micro, decoder
        self.schedule, self.bufs, self.t = schedule, bufs, tiling
        self.block = tiling.block(schedule)
        self.rows = min(schedule.rows, self.block)

    def emit(self) -> None:
        ir, t = self.ir, self.t
        self.source = copy_padded(
            ir, t.g, self.bufs, self.call.x, memory_dtype(self.call.x), self.micro.vector_bytes,
            force=t.g.cin % t.width != 0,
        )  # fmt: skip
        if self.schedule.order == "rows":
            self._tiles_outside()
        else:
            self._channels_outside()

    def _tiles_outside(self) -> None:
        """All weights first, then a block of tiles at a time; the last one overlaps another."""
        ir, t = self.ir, self.t
        weights = _Square.of(ir, t.steps * t.width, "int16", 2, t.vectors)
        with ir.loop(t.vectors, parallel=True) as vector:
            self._weights(weights, vector * weights.size, vector, 0, t.steps)
        with ir.loop(-(-t.tiles // self.block), parallel=True) as index:
            first = ir.let(ir.minimum(index * self.block, t.tiles - self.block))
            data = self._data(first)
            for vector, count in self._vector_blocks():
                sums = self._sums(count)
                self._products(data, weights, sums, vector * weights.size, count, 0, t.steps)
                self._results(sums, first, vector, count)

    def _channels_outside(self) -> None:
        """All tiles first, then a block of channels at a time, its weights piece by piece."""
        ir, t = self.ir, self.t
        data = self._data(0, parallel=True)
        for vector, count in self._vector_blocks(parallel=True):
            sums = self._sums(count)
            length = self._piece(count)
            weights = _Square.of(ir, length * t.width, "int16", 2, count)
            with ir.loop(t.steps // length) as piece:
                begin = piece * length
                with ir.loop(count) as j:
                    self._weights(weights, j * weights.size, vector + j, begin, length)
                self._products(data, weights, sums, 0, count, begin, length)
            self._results(sums, 0, vector, count)

    def _vector_blocks(self, parallel: bool = False) -> Iterator[tuple[Expr, int]]:
        """Full blocks of whole vectors in a loop, then the rest with the partial vector."""
        size = self.schedule.vectors
        full = self.t.g.cout // self.micro.lanes // size
        if full:
            with self.ir.loop(full, parallel) as block:
                yield block * size, size
        if self.t.vectors > full * size:
            yield full * size, self.t.vectors - full * size

    def _piece(self, count: int) -> int:
        """Reduction steps whose weights are transformed at a time: the largest equal part that
        stays in the cache and that the decoder can begin with."""
        t, unit = self.t, self.decoder.unit
        step = count * POINTS * t.width * 2
        parts = [d for d in range(unit, t.steps + 1, unit) if t.steps % d == 0]
        return max((d for d in parts if d * step <= _PANEL), default=unit)

    @property
    def _slots(self) -> int:
        """Tiles of a block in memory; what is behind the last one is multiplied and not read."""
        return -(-self.block // self.rows) * self.rows

    def _corner(self, tile: Expr) -> tuple[Expr, Expr, Expr]:
        """(image, row, column) of the first result of a tile."""
        ir, t, (oh, ow) = self.ir, self.t, self.t.out
        image, rest = tile // (t.down * t.across), tile % (t.down * t.across)
        row = ir.minimum(rest // t.across * SIDE, max(oh - SIDE, 0))
        column = ir.minimum(rest % t.across * SIDE, max(ow - SIDE, 0))
        return ir.let(image), ir.let(row), ir.let(column)

    def _data(self, first: Expr, parallel: bool = False) -> _Square:
        """The inputs of the tiles of a block. Channels behind the last hold those of the next
        pixel: their weights are zero."""
        ir, t = self.ir, self.t
        data = _Square.of(ir, self._slots * t.depth, "int16", 2)
        height, width = t.g.padded
        with ir.loop(self.block, parallel) as tile:
            image, row, column = self._corner(first + tile)
            corner = ((image * height + row) * width + column) * t.g.cin
            with ir.loop(-(-t.g.cin // t.width)) as vector:
                at = ir.let(corner + vector * t.width)

                def pixel(y: int, x: int, at: Expr = at) -> _Lanes:
                    raw = ir.load(self.source, at + (y * width + x) * t.g.cin, t.width)
                    return _Lanes(ir, ir.let(ir.cast(raw, "int16", t.width)), "int16", t.width)

                square = [[pixel(y, x) for x in range(SIZE)] for y in range(SIZE)]
                data.store(ir, both(toom.data, square), tile * t.depth + vector * t.width)
        return data

    def _weights(self, to: _Square, at: Expr, vector: Expr, begin: Expr, steps: int) -> None:
        """`steps` steps from `begin` on of the weights of a vector of channels."""
        ir, t, d = self.ir, self.t, self.decoder
        with ir.loop(steps // d.unit) as group:
            codes = ir.local(9 * d.unit * t.width, "int16")
            packed = ((vector * t.steps + begin) // d.unit + group) * 9
            for i in range(9):
                source = (packed + i) * d.rows * t.width
                d.expand(ir, self.bufs.weight, source, codes, i * d.unit * t.width, t.width)
            with ir.loop(d.unit) as k:

                def tap(y: int, x: int, k: Expr = k) -> _Lanes:
                    value = ir.load(codes, (k * 9 + 3 * y + x) * t.width, t.width)
                    return _Lanes(ir, ir.let(value), "int16", t.width)

                square = [[tap(y, x) for x in range(3)] for y in range(3)]
                to.store(ir, both(toom.weight, square), at + (group * d.unit + k) * t.width)

    def _sums(self, count: int) -> _Square:
        return _Square.of(self.ir, self._slots * count * self.micro.lanes, "int32", 4)

    def _products(
        self, data: _Square, weights: _Square, sums: _Square, first: Expr, count: int,
        begin: Expr, steps: int,
    ) -> None:  # fmt: skip
        """Sums of a block of tiles by `count` vectors of channels, whose weights begin at `first`;
        those of steps from `begin` on are added to what is there."""
        ir, m, t = self.ir, self.micro, self.t
        whole = steps == t.steps
        size = self.rows * count * m.lanes
        with ir.loop(POINTS) as point, ir.loop(self._slots // self.rows) as block:
            acc = ir.local(size, m.acc_dtype)
            there = point * sums.pitch + block * size
            zero = ir.const(0, m.acc_dtype, m.lanes)
            for i in range(0, size, m.lanes):
                value = zero
                if not whole:
                    value = ir.load(sums.buffer, there + i, m.lanes)
                    value = ir.select(ir.less(begin, 1), zero, value)
                ir.store(acc, i, value, m.lanes)
            tile = point * data.pitch + block * self.rows * t.depth + begin * m.kstep
            panel = first + point * weights.pitch
            with ir.loop(t.used if whole else steps) as k:
                at = panel + k * t.width
                vectors = [
                    ir.let(ir.load(weights.buffer, at + j * weights.size, t.width))
                    for j in range(count)
                ]
                for i in range(self.rows):
                    a = ir.let(m.broadcast(ir, data.buffer, tile + i * t.depth + k * m.kstep))
                    for j, w in enumerate(vectors):
                        to = (i * count + j) * m.lanes
                        product = m.dot(ir, zero, a, w)
                        value = ir.wrapping("add", ir.load(acc, to, m.lanes), product, m.lanes)
                        ir.store(acc, to, value, m.lanes)
            for i in range(0, size, m.lanes):
                ir.store(sums.buffer, there + i, ir.load(acc, i, m.lanes), m.lanes)

    def _results(self, sums: _Square, first: Expr, vector: Expr, count: int) -> None:
        """The epilogue of a block of tiles; the last of all vectors may have fewer channels."""
        with self.ir.loop(self.block) as tile:
            image, row, column = self._corner(first + tile)
            done = [self._tile(sums, (tile * count + j) * self.micro.lanes) for j in range(count)]
            oh, ow = self.t.out
            pixel = (image * oh + row) * ow + column
            self._finish(pixel, vector, done)

    def _tile(self, sums: _Square, at: Expr) -> list[list[Expr]]:
        """The results of a tile and a vector of channels."""
        ir, lanes = self.ir, self.micro.lanes

        def sum_of(y: int, x: int) -> _Lanes:
            value = ir.load(sums.buffer, at + (SIZE * y + x) * sums.pitch, lanes)
            return _Lanes(ir, ir.let(value), "int32", lanes)

        square = [[sum_of(y, x) for x in range(SIZE)] for y in range(SIZE)]
        return [
            [((one * INVERSE) >> SHIFT).value for one in line]
            for line in both(toom.result, square)
        ]  # fmt: skip

    def _finish(self, pixel: Expr, vector: Expr, done: list[list[list[Expr]]]) -> None:
        ir, lanes, epilogue, cout = self.ir, self.micro.lanes, self.bufs.epilogue, self.t.g.cout
        (oh, ow), count = self.t.out, len(done)
        whole = min(count, cout // lanes - vector) if isinstance(vector, int) else count
        runs = []
        for y in range(min(SIDE, oh)):
            for x in range(min(SIDE, ow)):
                values = [square[y][x] for square in done]
                at = (pixel + y * ow + x) * cout + vector * lanes
                runs.append(Run(values[:whole], vector * lanes, at))
                if whole < count:
                    skip = whole * lanes
                    channel = vector * lanes + skip
                    epilogue.store(ir, values[whole], channel, at + skip, lanes, cout % lanes)
        if whole:
            epilogue.store_runs(ir, runs, lanes)
