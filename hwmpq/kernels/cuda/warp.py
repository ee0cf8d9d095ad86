"""Emission of the implicit GEMM of `nests.warp_gemm`: copies, products, epilogue.

Lines of activations lie in shared memory as rows of 64 bytes; their four chunks of 16 are swapped
by the row's number, so that eight rows of one chunk lie in different banks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

import numpy as np

from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.cuda.decode import LINE
from hwmpq.kernels.cuda.ir import CudaIR
from hwmpq.kernels.cuda.tile import Tile
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.ir import Address, Buffer, Expr
from hwmpq.kernels.micro.cuda import WarpMicro
from hwmpq.kernels.nests import Buffers, Call
from hwmpq.kernels.nests.image import Geometry
from hwmpq.requantize import Z_IN

CHUNK = 16


@dataclass(frozen=True)
class Rows:
    """Rows of 64 bytes to be copied from a tensor: place(row of the tile, element of the
    reduction) -> (index in the tensor, conditions under which there is such an element)."""

    source: Buffer
    count: int
    step: int  # elements that lie one behind the other in the tensor, and alike aligned
    place: Callable[[Expr, Expr], tuple[Expr, list[Expr]]]


class WarpEmitter:
    """Emission of one kernel; the state that its parts share."""

    def __init__(
        self, ir: CudaIR, call: Call, micro: WarpMicro, decoder: Decoder, tile: Tile, bufs: Buffers
    ):
        self.ir, self.call, self.micro, self.decoder = ir, call, micro, decoder
        self.tile, self.bufs = tile, bufs
        self.g = Geometry.of(call.workload)
        self.gin = self.g.cin // self.g.groups
        self.depth = self.gin * self.g.kh * self.g.kw
        self.lines = -(-self.depth // micro.kstep)
        self.size = np.dtype(memory_dtype(call.x)).itemsize
        images = 1 if call.workload.has_weight else self.g.n
        self.pixels = self.g.out[0] * self.g.out[1] * self.g.n // images
        #: blocks of 16 pixels and of 8 channels of one warp
        self.high, self.wide = tile.warp_rows // 16, 4
        self.parts = self.g.groups if images == 1 else images

    def emit(self) -> None:
        ir, tile = self.ir, self.tile
        across = -(-self.g.gout // tile.channels)
        blocks = across * -(-self.pixels // tile.rows)
        with ir.grid((blocks, self.parts), tile.threads) as (block, self.part, self.thread):
            self.first_pixel = ir.let(block // across * tile.rows)
            self.first_channel = ir.let(block % across * tile.channels)
            self.warp, self.lane = ir.let(self.thread // 32), ir.let(self.thread % 32)
            self.warp_pixel = ir.let(self.warp // tile.warps[1] * tile.warp_rows)
            self.warp_eight = ir.let(self.warp % tile.warps[1] * self.wide)
            nbytes = max(tile.stage_bytes * tile.stages, self._staged_bytes())
            self.memory = ir.block_memory(nbytes)
            self.words = ir.view(self.memory, nbytes, self.micro.acc_dtype)
            zero = ir.load(self.bufs.scalars, Z_IN)
            self.zero = ir.let(ir.cast(zero, "int32"))
            self.fill = ir.let(ir.cast(self.zero, "uint32") * ir.const(0x01010101, "uint32"))
            self._multiply()
            self._finish()

    # -- copies ----------------------------------------------------------------------------

    def _multiply(self) -> None:
        """The sums of the tile: lines are copied `stages` - 1 ahead of the one multiplied."""
        ir, stages = self.ir, self.tile.stages
        self._begin()
        rows = [(self._activations(), 0)]
        if not self.call.workload.has_weight:
            rows.append((self._operand(), self.tile.rows * LINE))
        copies = [self._row_copies(r, at) for r, at in rows]
        for line in range(stages - 1):
            if line < self.lines:
                self._copy(copies, line, line)
            ir.device("copy_commit")
        with ir.loop(self.lines) as line:
            ir.device(f"copy_wait<{stages - 2}>")
            ir.synchronize()
            ahead = ir.let(line + (stages - 1))
            with ir.when(ir.less(ahead, self.lines)):
                self._copy(copies, ahead, ahead % stages)
            ir.device("copy_commit")
            self._products(ir.let(line % stages * self.tile.stage_bytes))
            if self.bufs.scales is not None:
                self._scale_group(line)
        ir.device("copy_wait<0>")
        ir.synchronize()

    def _copy(self, copies: list[Callable[[Expr, Expr], None]], line: Expr, stage: Expr) -> None:
        at = stage * self.tile.stage_bytes
        for copy in copies:
            copy(line, at)
        if self.call.workload.has_weight:
            self._copy_weights(line, at + self.tile.rows * LINE)

    def _row_copies(self, rows: Rows, offset: int) -> Callable[[Expr, Expr], None]:
        """Each thread has one chunk of every so many rows."""
        ir, tile = self.ir, self.tile
        chunk = ir.let(self.thread % 4)
        first = ir.let(self.thread // 4)
        step = tile.threads // 4
        numbers = [ir.let(first + i * step) for i in range(-(-rows.count // step))]
        nbytes = gcd(rows.step * self.size, CHUNK)
        name = f"copy_async<{nbytes}>" if nbytes >= 4 else f"copy_elements<{nbytes}>"

        def copy(line: Expr, stage: Expr) -> None:
            for i, row in enumerate(numbers):
                at = stage + offset + row * LINE + (chunk ^ (row // 2 % 4)) * CHUNK
                spare = [] if (i + 1) * step <= rows.count else [ir.less(row, rows.count)]
                with ir.maybe(ir.all_of(spare)):
                    for piece in range(0, CHUNK, nbytes):
                        element = line * self.micro.kstep + (chunk * CHUNK + piece) // self.size
                        index, inside = rows.place(row, ir.let(element))
                        to = Address(self.memory, at + piece)
                        with ir.otherwise(ir.all_of(inside), f"fill<{nbytes}>", to, self.fill):
                            ir.device(name, to, Address(rows.source, index))

        return copy

    def _activations(self) -> Rows:
        """The pixels under the windows of the tile's pixels."""
        ir, g, gin = self.ir, self.g, self.gin
        taps = g.kh * g.kw

        def inside(pixel: Expr, element: Expr) -> list[Expr]:
            found = []
            if self.pixels % self.tile.rows:
                found.append(ir.less(pixel, self.pixels))
            if self.depth % self.micro.kstep:
                found.append(ir.less(element, self.depth))
            return found

        def plain(row: Expr, element: Expr) -> tuple[Expr, list[Expr]]:
            pixel = self.first_pixel + row
            if self.call.workload.has_weight:
                start = pixel * g.cin + self.part * gin
            else:
                start = (self.part * self.pixels + pixel) * g.cin
            return start + element, inside(pixel, element)

        def under_window(row: Expr, element: Expr) -> tuple[Expr, list[Expr]]:
            pixel = ir.let(self.first_pixel + row)
            column, line = pixel % g.out[1], pixel // g.out[1]
            tap, channel = element // gin, element % gin
            y = ir.let(line % g.out[0] * g.sh - g.pt + tap // g.kw * g.dh)
            x = ir.let(column * g.sw - g.pl + tap % g.kw * g.dw)
            index = ((line // g.out[0] * g.h + y) * g.w + x) * g.cin + self.part * gin + channel
            within = [ir.between_bounds(y, g.h), ir.between_bounds(x, g.w)]
            return index, inside(pixel, element) + within

        image = taps > 1 or g.sh > 1 or g.sw > 1 or any((g.pt, g.pl, g.pb, g.pr))
        place = under_window if image else plain
        return Rows(self.bufs.x, self.tile.rows, gcd(g.cin, gin), place)

    def _operand(self) -> Rows:
        """The channels of operand b of a matmul as rows; gathered where they lie in columns."""
        ir, w = self.ir, self.call.workload
        k, n = w["k"], w["n"]

        def place(row: Expr, element: Expr) -> tuple[Expr, list[Expr]]:
            channel = self.first_channel + row
            along = channel * k + element if w["trans_b"] else element * n + channel
            inside = [ir.less(channel, n)] if n % self.tile.channels else []
            if k % self.micro.kstep:
                inside.append(ir.less(element, k))
            return self.part * (k * n) + along, inside

        return Rows(self.bufs.weight, self.tile.channels, k if w["trans_b"] else 1, place)

    def _copy_weights(self, line: Expr, at: Expr) -> None:
        """The blocks of a line lie one behind the other; behind the last channel, the last one is
        copied again."""
        ir, tile = self.ir, self.tile
        block = self.decoder.rows * 32
        all_chunks = self.padded // 8 * block // CHUNK
        count = tile.eights * block // CHUNK
        first = self.first_channel // 8 * (block // CHUNK)
        start = (self.part * self.lines + line) * all_chunks
        for i in range(0, count, tile.threads):
            mine = ir.let(self.thread + i)
            source = ir.minimum(first + mine, all_chunks - 1)
            with ir.maybe(ir.less(mine, count) if i + tile.threads > count else None):
                to = Address(self.memory, at + mine * CHUNK)
                ir.device("copy_async<16>", to, Address(self.bufs.weight, (start + source) * CHUNK))

    # -- products --------------------------------------------------------------------------

    def _begin(self) -> None:
        """Sums of zero, and the registers of one line's operands."""
        ir, m = self.ir, self.micro
        count = self.high * self.wide * 4
        kind = "uint32" if m.tensor_cores else "float32"
        deep = 1 if m.tensor_cores else 2
        self.sums = [self._zeros(count)]
        if self.bufs.scales is not None:
            self.sums.append(self._zeros(count))
        self.columns = None
        if m.acc_dtype == "int32" and not self.call.workload.has_weight:
            self.columns = self._zeros(self.wide * 4)
        self.a = ir.local(self.high * 4 * deep, kind)
        self.b = ir.local(self.wide * 4 * deep, kind)
        if self.columns is not None:
            self.ones = ir.local(4, "uint32")
            for i in range(4):
                ir.store(self.ones, i, ir.const(0x01010101, "uint32"))

    def _zeros(self, count: int) -> Buffer:
        zeros = self.ir.local(count, self.micro.acc_dtype)
        for i in range(count):
            self.ir.store(zeros, i, self.ir.const(0, self.micro.acc_dtype))
        return zeros

    def _products(self, stage: Expr) -> None:
        if self.micro.tensor_cores:
            self._matrix_products(stage)
        else:
            self._scalar_products(stage)

    def _chunk_at(self, row: Expr, chunk: Expr) -> Expr:
        return row * LINE + (chunk ^ (row // 2 % 4)) * CHUNK

    def _matrix_products(self, stage: Expr) -> None:
        ir, m, lane = self.ir, self.micro, self.lane
        second = stage + self.tile.rows * LINE
        for j in range(self.wide):
            if self.call.workload.has_weight:
                block = (self.warp_eight + j) * 32 + lane
                source = second + block * self.decoder.rows
                self.decoder.expand(ir, self.memory, source, self.b, j * 4, 32)
            else:
                row = ir.let((self.warp_eight + j) * 8 + lane % 8)
                at = second + self._chunk_at(row, lane // 8)
                ir.device("load_matrices", Address(self.b, j * 4), Address(self.memory, at))
        for half in range(2):
            for i in range(self.high):
                row = ir.let(self.warp_pixel + i * 16 + lane % 16)
                at = stage + self._chunk_at(row, half * 2 + lane // 16)
                ir.device("load_matrices", Address(self.a, i * 4), Address(self.memory, at))
            for j in range(self.wide):
                b = Address(self.b, j * 4 + half * 2)
                for i in range(self.high):
                    sums = Address(self.sums[-1], (i * self.wide + j) * 4)
                    ir.device(m.function, sums, Address(self.a, i * 4), b)
                if self.columns is not None:
                    ir.device(m.function, Address(self.columns, j * 4), Address(self.ones, 0), b)

    def _scalar_products(self, stage: Expr) -> None:
        """Every thread has the sums that it would have of `mma.sync`."""
        ir, g, t = self.ir, self.lane // 4, self.lane % 4
        second = stage + self.tile.rows * LINE

        def load(to: Buffer, index: int, row: Expr, base: Expr, chunk: int) -> None:
            at = (base + self._chunk_at(row, chunk)) // 4
            ir.store(to, index * 4, ir.load(self.words, at, 4), 4)

        for chunk in range(4):
            for i in range(self.high * 2):
                load(self.a, i, ir.let(self.warp_pixel + i * 8 + g), stage, chunk)
            for j in range(self.wide * 2):
                row = (self.warp_eight + j // 2) * 8 + t * 2 + j % 2
                load(self.b, j, ir.let(row), second, chunk)
            for i in range(self.high):
                for j in range(self.wide):
                    sums = Address(self.sums[-1], (i * self.wide + j) * 4)
                    ir.device(
                        self.micro.function, sums, Address(self.a, i * 8), Address(self.b, j * 8)
                    )

    def _scale_group(self, line: Expr) -> None:
        """Behind the last line of a group: its sums times its scales are added to the whole."""
        ir, group = self.ir, self.call.format.group
        assert group is not None and self.bufs.scales is not None
        lines = group // self.micro.kstep
        total, part = self.sums
        channels = self.g.groups * self.padded
        last = ir.less(lines - 2, line % lines) if lines > 1 else None
        if last is not None and self.lines % lines:
            last = ir.either(last, ir.less(self.lines - 2, line))
        with ir.maybe(last):
            for j in range(self.wide):
                for column in range(2):
                    channel = (self.warp_eight + j) * 8 + self.lane % 4 * 2 + column
                    place = self._padded(self.first_channel + channel)
                    scale = ir.let(ir.load(self.bufs.scales, line // lines * channels + place))
                    for i in range(self.high):
                        for row in range(2):
                            at = (i * self.wide + j) * 4 + row * 2 + column
                            value = ir.fma(ir.load(part, at), scale, ir.load(total, at))
                            ir.store(total, at, value)
                            ir.store(part, at, ir.const(0, "float32"))

    def _padded(self, channel: Expr) -> Expr:
        """Of a channel of the group: where its constants lie; behind the last, the last one's."""
        return self.part_of_constants * self.padded + self.ir.minimum(channel, self.padded - 1)

    @property
    def padded(self) -> int:
        """Channels of a group with those that fill the last eight."""
        return -(-self.g.gout // 8) * 8

    @property
    def part_of_constants(self) -> Expr:
        """The group of channels; the images of a matmul share their constants."""
        return self.part if self.call.workload.has_weight else 0

    # -- epilogue --------------------------------------------------------------------------

    #: words between two rows of a warp's staged sums
    _PITCH = 36

    def _staged_bytes(self) -> int:
        return self.tile.threads // 32 * 16 * self._PITCH * 4

    def _finish(self) -> None:
        """16 rows at a time go through shared memory, so that a thread has neighbouring channels of
        one pixel, and neighbours write neighbouring bytes."""
        ir, g = self.ir, self.g
        lanes = 4 if g.gout % 4 == 0 else 1
        mine = ir.let(self.warp * (16 * self._PITCH))
        across = 32 // lanes
        for i in range(self.high):
            ir.device("warp_synchronize")
            for j in range(self.wide):
                for part in range(4):
                    row, column = self.lane // 4 + part // 2 * 8, j * 8 + self.lane % 4 * 2
                    at = mine + row * self._PITCH + column + part % 2
                    ir.store(self.words, at, self._sum(i, j, part))
            ir.device("warp_synchronize")
            with ir.loop(16 * across // 32) as turn:
                item = ir.let(turn * 32 + self.lane)
                row, column = ir.let(item // across), ir.let(item % across * lanes)
                pixel = ir.let(self.first_pixel + self.warp_pixel + i * 16 + row)
                channel = ir.let(self.first_channel + self.warp_eight * 8 + column)
                inside = ir.both(ir.less(pixel, self.pixels), ir.less(channel, g.gout))
                with ir.when(inside):
                    acc = ir.let(ir.load(self.words, mine + row * self._PITCH + column, lanes))
                    self._store(acc, pixel, channel, lanes)

    def _sum(self, i: int, j: int, part: int) -> Expr:
        ir = self.ir
        acc = ir.load(self.sums[0], (i * self.wide + j) * 4 + part)
        if self.columns is None:
            return acc
        return acc - self.zero * ir.load(self.columns, j * 4 + part)

    def _store(self, acc: Expr, pixel: Expr, channel: Expr, lanes: int) -> None:
        g = self.g
        if self.call.workload.has_weight:
            at = pixel * g.cout + self.part * g.gout + channel
        else:
            at = (self.part * self.pixels + pixel) * g.cout + channel
        place = self.part_of_constants * self.padded + channel
        self.bufs.epilogue.store(self.ir, acc, place, self.ir.let(at), lanes, lanes)
