"""The IR of kernels for NVIDIA chips: a grid of blocks of threads, memory that a block shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from hwmpq.kernels.ir import IR, Address, Buffer, Expr

#: The attribute of a PrimFunc that holds its blocks along x and y and its bytes of shared memory.
LAUNCH = "hwmpq.launch"


class CudaIR(IR):
    """Threads run what is emitted inside `grid`. Its text is compiled without contraction, so that
    a product is rounded before it is summed."""

    blocks: tuple[int, int]
    shared_bytes = 0

    def result(self) -> Any:
        return super().result().with_attr(LAUNCH, [*self.blocks, self.shared_bytes])

    @contextmanager
    def grid(self, blocks: tuple[int, int], threads: int) -> Iterator[tuple[Expr, Expr, Expr]]:
        """blocks: along x and y. Gives the block's two numbers and the thread's."""
        self.blocks = blocks
        with (
            self._t.launch_thread("blockIdx.x", blocks[0]) as x,
            self._t.launch_thread("blockIdx.y", blocks[1]) as y,
            self._t.launch_thread("threadIdx.x", threads) as thread,
        ):
            yield x, y, thread

    def block_memory(self, nbytes: int) -> Buffer:
        """Bytes that the threads of a block share; one per kernel."""
        self.shared_bytes = nbytes
        return self._t.alloc_buffer((nbytes,), "uint8", scope="shared.dyn")

    def view(self, memory: Buffer, nbytes: int, dtype: str) -> Buffer:
        """The same shared memory as elements of four bytes."""
        shape = (nbytes // 4,)
        return self._t.decl_buffer(shape, dtype, data=memory.data, scope="shared.dyn")

    def synchronize(self) -> None:
        """No thread of the block goes on before all have come here."""
        self.device("__syncthreads")

    def device(self, name: str, *args: Expr | Address) -> None:
        """A function of `device.cuh` or `common.cuh` that gives nothing back."""
        self._t.evaluate(self._tir.call_extern("void", name, *self._given(args)))

    def value(self, name: str, dtype: str, *args: Expr | Address) -> Expr:
        """A function of them that gives a value back."""
        return self._tir.call_extern(dtype, name, *self._given(args))

    def _given(self, args: tuple[Expr | Address, ...]) -> list[Any]:
        return [
            self._t.address_of(a.buffer[a.index]) if isinstance(a, Address) else a for a in args
        ]

    @contextmanager
    def otherwise(self, condition: Expr | None, name: str, *args: Expr | Address) -> Iterator[None]:
        """What is emitted inside runs where the condition holds, else the device function does."""
        if condition is None:
            yield
            return
        with self._t.If(condition):
            with self._t.Then():
                yield
            with self._t.Else():
                self.device(name, *args)

    @contextmanager
    def maybe(self, condition: Expr | None) -> Iterator[None]:
        """As `when`; always where there is no condition."""
        with self.when(condition) if condition is not None else nullcontext():
            yield

    def either(self, a: Expr, b: Expr) -> Expr:
        return self._tir.Or(a, b)

    def all_of(self, conditions: list[Expr]) -> Expr | None:
        """Do all hold? None where there is no condition."""
        joined = None
        for condition in conditions:
            joined = condition if joined is None else self.both(joined, condition)
        return joined

    def between_bounds(self, value: Expr, extent: int) -> Expr:
        """0 <= value < extent."""
        return self.both(self.less(-1, value), self.less(value, extent))

    def fence(self, value: Expr, lanes: int = 1) -> Expr:
        return value

    def fma(self, a: Expr, b: Expr, c: Expr, lanes: int = 1) -> Expr:
        if lanes > 1:
            raise ValueError("a thread multiplies and adds one number at a time")
        return self.value("fmaf", "float32", a, b, c)
