"""Loops over elements on a GPU: each thread takes every so many of a parallel one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hwmpq.kernels.cuda.ir import CudaIR
from hwmpq.kernels.ir import Expr

#: Threads of a block, and blocks at most: about what the largest chip holds at once.
THREADS, BLOCKS = 256, 1024


class GridIR(CudaIR):
    """elements: about how many threads there is work for."""

    widest = 1

    def __init__(self, elements: int) -> None:
        super().__init__()
        self._count = min(-(-elements // THREADS), BLOCKS)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self.grid((self._count, 1), THREADS) as (block, _, thread):
            self._first = self.let(block * THREADS + thread)
            yield

    @contextmanager
    def loop(self, extent: int, parallel: bool = False) -> Iterator[Expr]:
        if not parallel:
            with super().loop(extent) as index:
                yield index
            return
        step = self._count * THREADS
        with self.between(0, -(-extent // step)) as turn:
            index = self.let(turn * step + self._first)
            with self.when(self.less(index, extent)):
                yield index
