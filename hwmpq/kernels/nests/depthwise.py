"""Depthwise convolution: vectors run over channels, every distinct input vector is loaded once.

A dot's kstep factors are the pixels of kstep rows of the window under one channel: their vectors
are interleaved, a missing row is zeros. The image is read in place: windows that reach over its
edge are emitted one by one, where what lies outside is known. It is copied between margins first
when there are many such rows, when it must be widened, or when the last channels fill no vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add, or_
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.formats import Format
from hwmpq.kernels.codes import activation, memory_dtype
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.epilogue import Run
from hwmpq.kernels.ir import IR, Buffer, Expr, Part
from hwmpq.kernels.micro import Micro
from hwmpq.kernels.nests import Buffers, Call, Nest, Schedule
from hwmpq.kernels.nests.gemm import blocks
from hwmpq.kernels.nests.image import Geometry, copy_padded
from hwmpq.requantize import Z_IN
from hwmpq.types import Workload

#: Vectors of channels taken at a time at most, and bytes that shall stay in the first-level cache.
_CHUNK, _RESIDENT = 8, 24 * 1024
#: Rows of the result over an edge of the image that are emitted one by one, at most.
EDGE = 4
#: Rows for each thread from which rows are shared out.
_ROWS = 10


class Depthwise(Nest):
    name = "depthwise"
    ops = ("depthwise",)

    def why_not(self, workload: Workload, fmt: Format, micro: Micro) -> str | None:
        if micro.acc_dtype == "float32" and micro.kstep > 1:
            return f"{micro.name} multiplies pairs of floats, a depthwise kernel single ones"
        if micro.height > 1:
            return f"{micro.name} multiplies {micro.height} pixels by the same weights"
        return None

    def channels(self, workload: Workload, micro: Micro) -> int:
        return -(-workload["cout"] // micro.lanes) * micro.lanes

    def pad(self, values: NDArray[Any], workload: Workload, micro: Micro) -> NDArray[Any]:
        return np.pad(values, (0, self.channels(workload, micro) - values.size))

    def pack(
        self, codes: NDArray[Any], workload: Workload, micro: Micro, decoder: Decoder
    ) -> NDArray[Any]:
        """[vectors][steps] vectors of [lanes][kstep]; a step is a column of kstep rows."""
        kh, kw, lanes, kstep = workload["kh"], workload["kw"], micro.lanes, micro.kstep
        groups = -(-kh // kstep)
        vectors = self.channels(workload, micro) // lanes
        wide = np.zeros((vectors * lanes, groups * kstep, kw), codes.dtype)
        wide[: workload["cout"], :kh] = codes.reshape(workload["cout"], kh, kw)
        split = wide.reshape(vectors, lanes, groups, kstep, kw).transpose(0, 2, 4, 1, 3)
        packed = np.zeros((vectors, _steps(workload, micro, decoder), lanes * kstep), codes.dtype)
        packed[:, : groups * kw] = split.reshape(vectors, groups * kw, lanes * kstep)
        return decoder.pack(packed.reshape(-1, lanes * kstep))

    def schedules(self, call: Call, micro: Micro) -> list[Schedule]:
        """Fewest vector loads first. A few channels at a time where that keeps the rows under a
        window in the first-level cache, else all: memory likes to be read in one stretch."""
        g = Geometry.of(call.workload)
        item = 4 if micro.acc_dtype == "float32" else 1
        window = g.kh * g.padded[1] * micro.lanes * item
        vectors = -(-g.cin // micro.lanes)
        order = "vectors" if _CHUNK * window <= _RESIDENT < vectors * window else "rows"
        # equal parts where they are not too small: the code of a last, smaller one is as long
        equal = max(n for n in range(1, _CHUNK + 1) if vectors % n == 0)
        part = equal if equal * 2 >= _CHUNK and g.cin % micro.lanes == 0 else _CHUNK
        sizes = range(1, min(micro.registers // 2, g.out[1] + 1))
        return [
            Schedule(rows, part if order == "vectors" else vectors, order)
            for rows in sorted(sizes, key=lambda rows: (_loads(g, rows), -rows))
        ]

    def body(
        self, ir: IR, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule, bufs: Buffers
    ) -> None:
        _Emitter(ir, call, micro, decoder, schedule, bufs).emit()


def _loads(g: Geometry, size: int) -> int:
    """Vectors of weights and of input under one row of windows, taken `size` pixels at a time."""
    return sum(count * (g.kw + len(columns(g, pixels))) for count, pixels in blocks(g.out[1], size))


def columns(g: Geometry, count: int) -> set[int]:
    """Input columns under `count` neighbouring pixels, from the first window's first on."""
    return {pixel * g.sw + j * g.dw for pixel in range(count) for j in range(g.kw)}


def _steps(workload: Workload, micro: Micro, decoder: Decoder) -> int:
    """Weight vectors under one vector of channels, padded to whole blocks of the decoder."""
    steps = -(-workload["kh"] // micro.kstep) * workload["kw"]
    return -(-steps // decoder.unit) * decoder.unit


@dataclass(frozen=True)
class _Image:
    """What is read: its size, and the rows and columns of padding that are not in memory."""

    buffer: Buffer
    dtype: str
    height: int
    width: int
    top: int
    left: int

    def inner_rows(self, g: Geometry) -> list[int]:
        """Rows of the result whose windows lie between the first and the last row of the image."""
        last = self.height + self.top - (g.kh - 1) * g.dh
        return [y for y in range(g.out[0]) if self.top <= y * g.sh < last]


class _Emitter:
    """Emission of one depthwise convolution; the state that its loops share."""

    def __init__(
        self, ir: IR, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule, bufs: Buffers
    ):
        self.ir, self.micro, self.decoder, self.schedule = ir, micro, decoder, schedule
        self.bufs, self.g = bufs, Geometry.of(call.workload)
        self.run = micro.run_length(call.format)
        self.steps = _steps(call.workload, micro, decoder)
        self.floats = micro.acc_dtype == "float32"
        self.x, self.offset = call.x, micro.offset(call.format)
        self.image = self._image(call.x)
        self.zero = ir.const(0, self.image.dtype, micro.lanes)
        if not self.floats:
            zero = ir.let(ir.cast(ir.load(bufs.scalars, Z_IN), self.image.dtype))
            self.zero = ir.broadcast(zero, micro.lanes)
        self.weights = self._weights()
        self.places = self._places()

    def _image(self, x: str) -> _Image:
        """The input itself, or a copy with its padding. Codes are widened when they are read."""
        g = self.g
        dtype = self.micro.a_dtype if self.floats else "uint8"
        ragged = g.cin % self.micro.lanes != 0
        place = _Image(self.bufs.x, dtype, g.h, g.w, g.pt, g.pl)
        edge = g.out[0] - len(place.inner_rows(g))
        if memory_dtype(x) == dtype and not ragged and edge <= EDGE:
            return place
        buffer = copy_padded(self.ir, g, self.bufs, x, dtype, self.micro.vector_bytes, force=ragged)
        return _Image(buffer, dtype, *g.padded, 0, 0)

    def _weights(self) -> Buffer:
        """The weights as they are multiplied."""
        ir, d, micro = self.ir, self.decoder, self.micro
        if d.identity:
            return self.bufs.weight
        width, count = micro.lanes * micro.kstep, -(-self.g.cin // micro.lanes) * self.steps
        tile = ir.scratch(count * width, micro.w_dtype)
        with ir.loop(count // d.unit) as block:
            packed, to = block * d.rows * width, block * d.unit * width
            d.expand(ir, self.bufs.weight, packed, tile, to, width)
        return tile

    def _places(self) -> Buffer | None:
        """For every row of a dot and byte of a register: which of the row's eight bytes goes there,
        -1 = zero. None where dots do not take rows of eight bytes by fours from AVX2's registers.

        In memory, for LLVM takes twice as long to compile shuffles whose places it can see.
        """
        ir, micro = self.ir, self.micro
        if "avx2" not in micro.requires or (micro.lanes, micro.kstep) != (8, 4):
            return None
        table = ir.scratch(4 * 32, "int8")
        for row in range(4):
            places = [channel if i == row else -1 for channel in range(8) for i in range(4)]
            vector = ir.concatenate([ir.const(place, "int8") for place in places], 1)
            ir.store(table, 32 * row, vector, 32)
        return table

    def emit(self) -> None:
        inner = self.image.inner_rows(self.g)
        first, behind = (inner[0], inner[-1] + 1) if len(inner) > 1 else (0, 0)
        above, below = range(first), range(behind, self.g.out[0])
        if not self._shares_rows(behind - first):
            self._walk(above, (first, behind) if behind else None, below, parallel=True)
            return
        with self.ir.shared(behind - first) as (begin, end):
            self._walk(range(0), (first + begin, first + end), range(0))
        self._walk(above, None, below)

    def _shares_rows(self, inner: int) -> bool:
        """Whether threads share out the rows and not the channels: so do the neighbours of a layer
        with many rows, and what one core wrote last, another one reads slowly."""
        threads = self.ir.threads
        return threads > 1 and (self.schedule.order == "rows" or inner >= _ROWS * threads)

    def _walk(self, above: range, inner: Part | None, below: range, parallel: bool = False) -> None:
        """These rows of all images. parallel: threads share the channels."""
        for first, many in self._chunks(parallel):
            with self.ir.loop(self.g.n) as image:
                for row in self._rows(above, inner, below):
                    for start, count in self._groups():
                        self._vectors(image, row, start, count, first, many)

    def _rows(self, above: range, inner: Part | None, below: range) -> Iterator[Expr]:
        """Rows over an edge of the image as plain numbers, one by one; the others in a loop."""
        yield from above
        if inner:
            with self.ir.between(*inner) as row:
                yield row
        yield from below

    def _chunks(self, parallel: bool) -> Iterator[tuple[Expr, int]]:
        """(first channel, channels) of the parts that are walked one after the other."""
        size = self.schedule.vectors * self.micro.lanes
        full, rest = divmod(self.g.cin, size)
        if full:
            with self.ir.loop(full, parallel) as chunk:
                yield chunk * size, size
        if rest:
            yield full * size, rest

    def _vectors(
        self, image: Expr, row: Expr, start: Expr, count: int, first: Expr, many: int
    ) -> None:
        """`count` neighbouring pixels of `many` channels from `first` on."""
        lanes = self.micro.lanes
        full, rest = divmod(many, lanes)
        if full:
            with self.ir.loop(full) as vector:
                self._block(image, row, start, count, first // lanes + vector, lanes)
        if rest:
            self._block(image, row, start, count, first // lanes + full, rest)

    def _groups(self) -> Iterator[tuple[Expr, int]]:
        """(first, how many) neighbouring pixels of a row: those whose windows lie inside the image
        in a loop, the others one by one with a plain number as their first."""
        ow, size, inner = self.g.out[1], self.schedule.rows, []
        for start in range(0, ow - size + 1, size):
            if not any(self._outside(start, column) for column in columns(self.g, size)):
                inner.append(start)
        first, behind = (inner[0], inner[-1] + size) if len(inner) > 1 else (0, 0)
        for start in range(0, first, size):
            yield start, size
        if behind:
            with self.ir.loop(len(inner)) as group:
                yield first + group * size, size
        for start in range(behind, ow, size):
            yield start, min(size, ow - start)

    def _outside(self, start: Expr, column: int) -> bool:
        """Whether that column lies outside the image; never for a pixel of a loop."""
        if not isinstance(start, int):
            return False
        return not 0 <= start * self.g.sw - self.image.left + column < self.image.width

    def _block(
        self, image: Expr, row: Expr, start: Expr, count: int, vector: Expr, valid: int
    ) -> None:
        """`count` neighbouring pixels of one channel vector."""
        ir, g, lanes = self.ir, self.g, self.micro.lanes
        acc = ir.local(count * lanes, self.micro.acc_dtype)
        for i in range(count):
            ir.store(acc, i * lanes, ir.const(0, self.micro.acc_dtype, lanes), lanes)
        y = image * self.image.height + row * g.sh - self.image.top
        corner = (y * self.image.width + start * g.sw - self.image.left) * g.cin + vector * lanes
        pitch = g.dh * self.image.width * g.cin
        for rows, step in self._window(row):
            at = [None if i is None else corner + i * pitch for i in rows]
            self._accumulate(acc, at, vector * self.steps + step * g.kw, start, count)
        oh, ow = g.out
        channel, epilogue = vector * lanes, self.bufs.epilogue
        first = ((image * oh + row) * ow + start) * g.cout + channel
        sums = [ir.load(acc, i * lanes, lanes) for i in range(count)]
        if valid == lanes:
            runs = [Run([value], channel, first + i * g.cout) for i, value in enumerate(sums)]
            epilogue.store_runs(ir, runs, lanes)
            return
        for i, value in enumerate(sums):
            epilogue.store(ir, value, channel, first + i * g.cout, lanes, valid)

    def _window(self, row: Expr) -> Iterator[tuple[list[Expr | None], Expr]]:
        """(rows of the window, their step) for every dot; None: a row outside the image."""
        kh, kstep = self.g.kh, self.micro.kstep
        if not isinstance(row, int):
            with self.ir.loop(kh // kstep) as step:
                yield [step * kstep + i for i in range(kstep)], step
            if kh % kstep:
                yield list(range(kh // kstep * kstep, kh)), kh // kstep
            return
        top = row * self.g.sh - self.image.top
        for step in range(-(-kh // kstep)):
            rows = range(step * kstep, min(step * kstep + kstep, kh))
            inside = [i if 0 <= top + i * self.g.dh < self.image.height else None for i in rows]
            yield inside, step

    def _accumulate(
        self, acc: Buffer, at: list[Expr | None], step: Expr, start: Expr, count: int
    ) -> None:
        """Add what lies under some rows of the window, whose corners are given. Padding of floats
        adds nothing and is left out."""
        ir, g, lanes = self.ir, self.g, self.micro.lanes
        width, run = lanes * self.micro.kstep, max(self.run, 1)
        loaded: dict[int, Expr] = {}
        for first in range(0, g.kw, run):
            taps = range(first, min(first + run, g.kw))
            weights = [ir.let(ir.load(self.weights, (step + j) * width, width)) for j in taps]
            for pixel in range(count):
                pairs = []
                for j, w in zip(taps, weights, strict=True):
                    column = pixel * g.sw + j * g.dw
                    outside = self._outside(start, column)
                    if self.floats and (outside or not any(a is not None for a in at)):
                        continue
                    if column not in loaded:
                        loaded[column] = self._pixel(
                            [None if a is None or outside else a + column * g.cin for a in at]
                        )
                    pairs.append((loaded[column], w))
                if pairs:
                    value = self._dots(ir.load(acc, pixel * lanes, lanes), pairs)
                    ir.store(acc, pixel * lanes, value, lanes)

    def _dots(self, acc: Expr, pairs: list[tuple[Expr, Expr]]) -> Expr:
        """acc + all dots, summed narrowly first where the micro-kernel does so."""
        ir, micro = self.ir, self.micro
        if not self.run:
            return reduce(lambda total, pair: micro.dot(ir, total, *pair), pairs, acc)
        return micro.widen(ir, acc, reduce(add, (micro.partial(ir, a, w) for a, w in pairs)))

    def _pixel(self, at: list[Expr | None]) -> Expr:
        """kstep pixels, one below the other, as a dot takes them."""
        ir, micro = self.ir, self.micro
        lanes = micro.lanes
        rows = [
            self.zero if a is None else ir.let(ir.load(self.image.buffer, a, lanes)) for a in at
        ]
        if micro.kstep == 1:
            return ir.let(self._multiplied(rows[0], lanes))
        if len(rows) == 1 and not self.offset:  # the others: zero bytes of a wider number
            word = ir.cast(rows[0], micro.word, lanes)
            return ir.let(ir.reinterpret(word, micro.a_dtype, lanes * micro.kstep))
        if self.places is not None:
            return self._spread(rows)
        rows += [ir.const(0, self.image.dtype, lanes)] * (micro.kstep - len(rows))
        return ir.let(self._multiplied(ir.interleave(rows, lanes), lanes * micro.kstep))

    def _spread(self, rows: list[Expr]) -> Expr:
        """Up to four rows of eight bytes, interleaved by fours. Both halves of a register are given
        all eight: AVX2 is slow where bytes cross from one to the other.

        Source: Intel Intrinsics Guide, _mm256_shuffle_epi8.
        """
        ir, placed = self.ir, []
        for i, row in enumerate(rows):
            twice = ir.reinterpret(ir.broadcast(ir.reinterpret(row, "int64"), 4), "int8", 32)
            places = ir.load(self.places, 32 * i, 32)
            placed.append(ir.intrinsic("llvm.x86.avx2.pshuf.b", "int8x32", twice, places))
        return ir.let(ir.reinterpret(reduce(or_, placed), self.micro.a_dtype, 32))

    def _multiplied(self, value: Expr, lanes: int) -> Expr:
        """What was read of the image, as it is multiplied."""
        dtype = self.image.dtype
        if self.floats or dtype == self.micro.a_dtype:
            return value
        return activation(self.ir, value, self.x, self.micro.a_dtype, self.offset, lanes)


NEST = Depthwise()
