"""Operand b of a matmul, packed when it runs: into a tile that lies as packed weights do.

A vector of the tile is `lanes` words of `kstep` neighbours in depth. Columns behind the last one
hold anything: what comes of them is not stored. Depths behind the last one hold zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hwmpq.kernels.codes import memory_dtype, to_f32
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.kernels.micro import Micro
from hwmpq.kernels.nests import Call


@dataclass(frozen=True)
class Operand:
    """source: b, flat; vector by vector of columns from element `start` on goes to a tile."""

    ir: IR
    call: Call
    micro: Micro
    source: Buffer
    start: Expr
    steps: int

    def tile(self, vector: Expr, count: int) -> Buffer:
        """`count` vectors of columns from `vector` on, packed: [count][steps][lanes · kstep]."""
        m, n = self.micro, self.call.workload["n"]
        tile = self.ir.scratch(count * self.steps * m.lanes * m.kstep, m.w_dtype)
        for j in range(count):
            first = (vector + j) * m.lanes
            valid = min(m.lanes, n - first) if isinstance(first, int) else m.lanes
            at = j * self.steps * m.lanes * m.kstep
            if self.call.workload["trans_b"]:
                self._turned(tile, at, first, valid)
            elif n >= m.lanes:
                self._rows(tile, at, first, valid)
            else:
                self._single(tile, at, first, valid, 0)
        return tile

    def sums(self, tile: Buffer, count: int, factor: Expr) -> Buffer:
        """factor · Σ of every column of the tile, int32 [count][lanes]."""
        ir, m = self.ir, self.micro
        width, wide = m.lanes * m.kstep, m.height * m.lanes
        sums, acc = ir.local(count * m.lanes, m.acc_dtype), ir.local(wide, m.acc_dtype)
        ones = ir.const(1, m.a_dtype, m.a_lanes)
        for j in range(count):
            ir.store(acc, 0, ir.const(0, m.acc_dtype, wide), wide)
            with ir.loop(self.steps) as step:
                w = ir.let(ir.load(tile, (j * self.steps + step) * width, width))
                ir.store(acc, 0, m.dot(ir, ir.load(acc, 0, wide), ones, w), wide)
            value = m.rows(ir, ir.load(acc, 0, wide))[0] * ir.broadcast(factor, m.lanes)
            ir.store(sums, j * m.lanes, value, m.lanes)
        return sums

    def _multiplied(self, raw: Expr, lanes: int) -> Expr:
        """Stored elements -> elements as the micro-kernel multiplies them."""
        if self.micro.w_dtype == "float32":
            return to_f32(self.ir, raw, self.call.b, lanes)
        if self.micro.w_dtype != memory_dtype(self.call.b):
            return self.ir.cast(raw, self.micro.w_dtype, lanes)
        return raw

    def _rows(self, tile: Buffer, at: Expr, first: Expr, valid: int) -> None:
        """b [k, n]: vectors along the columns; kstep rows are interleaved."""
        ir, m, k, n = self.ir, self.micro, self.call.workload["k"], self.call.workload["n"]

        def row(depth: Expr) -> Expr:
            begin = first if valid == m.lanes else n - m.lanes  # not behind the last column
            raw = ir.load(self.source, self.start + depth * n + begin, m.lanes)
            if valid < m.lanes:
                shifted = [min(i + m.lanes - valid, m.lanes - 1) for i in range(m.lanes)]
                raw = ir.shuffle(ir.let(raw), shifted)
            return ir.let(self._multiplied(raw, m.lanes))

        for step, depths in self._depths(k):
            rows = [row(depth) for depth in depths]
            rows += [ir.const(0, m.w_dtype, m.lanes)] * (m.kstep - len(rows))
            value = rows[0] if m.kstep == 1 else ir.interleave(rows, m.lanes)
            ir.store(tile, at + step * m.lanes * m.kstep, value, m.lanes * m.kstep)

    def _depths(self, k: int) -> Iterator[tuple[Expr, list[Expr]]]:
        """(step, its depths): a loop of the full steps, the rest, then steps of zeros."""
        size = self.micro.kstep
        with self.ir.loop(k // size) as step:
            yield step, [step * size + i for i in range(size)]
        if k % size:
            yield k // size, list(range(k // size * size, k))
        for step in range(-(-k // size), self.steps):
            yield step, []

    def _turned(self, tile: Buffer, at: Expr, first: Expr, valid: int) -> None:
        """b [n, k]: squares of lanes × lanes words are transposed in registers."""
        ir, m, k = self.ir, self.micro, self.call.workload["k"]
        width = m.lanes * m.kstep

        def column(lane: int, depth: Expr) -> Expr:
            begin = self.start + (first + min(lane, valid - 1)) * k + depth
            values = self._multiplied(ir.load(self.source, begin, width), width)
            return ir.let(values if m.kstep == 1 else ir.reinterpret(values, m.word, m.lanes))

        if k >= width:
            with ir.loop(k // width) as square:
                columns = [column(lane, square * width) for lane in range(m.lanes)]
                for i, value in enumerate(ir.transpose(columns)):
                    if m.kstep > 1:
                        value = ir.reinterpret(value, m.w_dtype, width)
                    ir.store(tile, at + (square * m.lanes + i) * width, value, width)
        self._single(tile, at, first, valid, k // width * width)

    def _single(self, tile: Buffer, at: Expr, first: Expr, valid: int, begin: int) -> None:
        """Element by element from a depth (a whole step) on."""
        ir, m, w = self.ir, self.micro, self.call.workload
        k, n = w["k"], w["n"]
        if self.steps * m.kstep == begin:
            return
        with ir.loop(m.lanes) as lane, ir.loop(self.steps * m.kstep - begin) as offset:
            column, depth = first + ir.minimum(lane, valid - 1), begin + offset
            deep = ir.minimum(depth, k - 1)
            index = column * k + deep if w["trans_b"] else deep * n + column
            raw = self._multiplied(ir.load(self.source, self.start + index), 1)
            value = ir.select(ir.less(depth, k), raw, ir.const(0, m.w_dtype))
            to = depth // m.kstep * m.lanes * m.kstep + lane * m.kstep + depth % m.kstep
            ir.store(tile, at + to, value)
