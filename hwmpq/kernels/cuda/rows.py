"""Rows of elements on a GPU, each by sixteen neighbouring threads: half a warp."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hwmpq.kernels.cuda.grid import BLOCKS, THREADS
from hwmpq.kernels.cuda.ir import CudaIR
from hwmpq.kernels.ir import Expr

#: Threads of a row: one for each of the partial sums that `glue.rows` defines. Rows of a block.
_ROW = 16
_ROWS = THREADS // _ROW


class RowIR(CudaIR):
    """Work for so many rows."""

    widest = 1

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self._count = min(-(-rows // _ROWS), BLOCKS)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self.grid((self._count, 1), THREADS) as (block, _, thread):
            self._first = self.let(block * _ROWS + thread // _ROW)
            self._lane = self.let(thread % _ROW)
            yield

    @contextmanager
    def each_row(self) -> Iterator[Expr]:
        """The last row is done more than once, so that all threads of a warp stay together."""
        step = self._count * _ROWS
        with self.between(0, -(-self._rows // step)) as turn:
            yield self.let(self.minimum(turn * step + self._first, self._rows - 1))

    def own(self, size: int, parts: int) -> Iterator[Expr]:
        """The elements of a row that are this thread's: of the first `parts` threads, number j has
        j, j + parts, ...; those of the rest go to the last threads, in order."""
        full, rest = divmod(size, parts)
        first = [self.less(self._lane, parts)] if parts < _ROW else []
        with self.loop(full) as turn, self.maybe(self.all_of(first)):
            yield turn * parts + self._lane
        if rest:
            taken = self.less(parts - rest - 1, self._lane)
            with self.maybe(self.all_of([taken, *first])):
                yield full * parts + self._lane - (parts - rest)

    def joined(self, value: Expr, distance: int) -> Expr:
        """The value of the thread whose number differs in that bit; all of a warp must ask."""
        return self.value("across", "float32", value, distance)
