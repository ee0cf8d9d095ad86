"""A small hand on TVM's IRBuilder: flat buffers, vectors, loops. Kernels are written with it.

Buffers are one-dimensional; an index is a Python int or a TIR expression. `lanes` = elements of a
vector value; scalars have one lane. Everything emitted is plain TIR: the same text is printed by
`PrimFunc.show()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from hwmpq.kernels.passes import MARK

Expr = Any
Buffer = Any
#: First and behind the last.
Part = tuple[Expr, Expr]


def module_of(functions: Mapping[str, Any]) -> Any:
    """A TVM module of PrimFuncs that go by these names."""
    import tvm

    return tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in functions.items()})


@dataclass(frozen=True)
class Address:
    """Where an element of a buffer lies, for an intrinsic that takes a pointer."""

    buffer: Buffer
    index: Expr


class IR:
    """Builds one PrimFunc: `with ir.function(): ...` and then `ir.result()`.

    threads: how many share the loops that are said to be parallel.
    """

    #: lanes of a vector at most, where a reduction's definition asks for many
    widest = 1 << 16

    def __init__(self, threads: int = 1) -> None:
        import tvm.tirx as tir
        from tvm.script.ir_builder import IRBuilder
        from tvm.script.ir_builder import tirx as T

        self.threads = threads
        self._t, self._tir, self._builder = T, tir, IRBuilder()

    @contextmanager
    def function(self, name: str = "main") -> Iterator[None]:
        with self._builder, self._t.prim_func(s_tir=True):
            self._t.func_attr({"global_symbol": name, "tirx.noalias": True, MARK: True})
            yield

    def running(self) -> AbstractContextManager[None]:
        """Around all that a kernel does with its arguments."""
        return nullcontext()

    @contextmanager
    def importing(self, llvm: str) -> Iterator[None]:
        """Inside, `external` reaches the functions of a module of LLVM text ('' = none)."""
        with self._t.attr(0, "pragma_import_llvm", llvm) if llvm else nullcontext():
            yield

    def result(self) -> Any:
        return self._builder.get()

    def arg(self, name: str, size: int, dtype: str) -> Buffer:
        return self._t.arg(name, self._t.buffer((size,), dtype))

    def arg_nd(self, name: str, shape: tuple[int, ...], dtype: str) -> Buffer:
        """An argument with a shape of several dimensions, given back as its flat view."""
        full = self._t.arg(name, self._t.buffer(shape, dtype))
        size = 1
        for extent in shape:
            size *= extent
        return self._t.decl_buffer((size,), dtype, data=full.data)

    def local(self, size: int, dtype: str) -> Buffer:
        """Registers or stack: constant indices let LLVM keep it in registers."""
        return self._t.alloc_buffer((size,), dtype, scope="local")

    def scratch(self, size: int, dtype: str) -> Buffer:
        """Memory of the call, from the runtime's workspace pool."""
        return self._t.alloc_buffer((size,), dtype, scope="global")

    @contextmanager
    def loop(self, extent: int, parallel: bool = False) -> Iterator[Expr]:
        with self.shared(extent, parallel) as part, self.between(*part) as index:
            yield index

    @contextmanager
    def shared(self, extent: int, parallel: bool = True) -> Iterator[Part]:
        """What a thread has of 0 .. extent: (first, behind the last), numbers where that is all.

        Memory made inside is the thread's own, once: inside a parallel loop over all of the extent,
        TVM would ask its runtime for it in every round, which took longer than small rounds.
        """
        parts = min(self.threads, extent) if parallel else 1
        if parts < 2:
            yield 0, extent
            return
        with self._t.parallel(parts) as part:
            yield self.let(part * extent // parts), self.let((part + 1) * extent // parts)

    @contextmanager
    def between(self, first: Expr, behind: Expr) -> Iterator[Expr]:
        """A loop from `first` up to before `behind`."""
        if isinstance(first, int) and isinstance(behind, int) and behind - first == 1:
            yield first
            return
        with self._t.serial(first, behind) as index:
            yield index

    @contextmanager
    def when(self, condition: Expr) -> Iterator[None]:
        """What is emitted inside runs only where the condition holds."""
        with self._t.If(condition), self._t.Then():
            yield

    def load(self, buffer: Buffer, index: Expr, lanes: int = 1, stride: int = 1) -> Expr:
        return buffer[self._at(index, lanes, stride)]

    def store(
        self, buffer: Buffer, index: Expr, value: Expr, lanes: int = 1, stride: int = 1
    ) -> None:
        self._t.buffer_store(buffer, value, [self._at(index, lanes, stride)])

    def _at(self, index: Expr, lanes: int, stride: int) -> Expr:
        return index if lanes == 1 else self._tir.Ramp(index, stride, lanes)

    def let(self, value: Expr) -> Expr:
        """Give a value a name so that it is computed once."""
        return self._t.bind(value)

    def const(self, value: float, dtype: str, lanes: int = 1) -> Expr:
        scalar = self._tir.const(value, dtype)
        return scalar if lanes == 1 else self._tir.Broadcast(scalar, lanes)

    def broadcast(self, value: Expr, lanes: int) -> Expr:
        return value if lanes == 1 else self._tir.Broadcast(value, lanes)

    def cast(self, value: Expr, dtype: str, lanes: int = 1) -> Expr:
        return self._tir.Cast(dtype if lanes == 1 else f"{dtype}x{lanes}", value)

    def reinterpret(self, value: Expr, dtype: str, lanes: int = 1) -> Expr:
        return self._tir.reinterpret(dtype if lanes == 1 else f"{dtype}x{lanes}", value)

    def intrinsic(self, name: str, dtype: str, *args: Expr) -> Expr:
        """A pure LLVM intrinsic by its full name; dtype with lanes, e.g. 'int32x8'."""
        return self._tir.call_llvm_pure_intrin(dtype, name, *args)

    def external(self, name: str, dtype: str, *args: Expr) -> Expr:
        """A function of the imported LLVM text: for what TIR has no types for; it is inlined."""
        return self._tir.call_extern(dtype, name, *args)

    def effect(self, name: str, *args: Expr | Address) -> None:
        """An LLVM intrinsic that gives nothing back and changes memory or hidden registers."""
        given = [
            self._t.address_of(a.buffer[a.index]) if isinstance(a, Address) else a for a in args
        ]
        self._t.evaluate(self._tir.call_llvm_intrin("void", name, *given))

    def call(self, name: str, dtype: str, *args: Expr) -> Expr:
        """A TIR intrinsic such as 'tirx.nearbyint'."""
        return self._tir.call_intrin(dtype, name, *args)

    def rint(self, value: Expr, lanes: int = 1) -> Expr:
        """Round half to even."""
        return self.call("tirx.nearbyint", "float32" if lanes == 1 else f"float32x{lanes}", value)

    def minimum(self, a: Expr, b: Expr) -> Expr:
        return self._tir.Min(a, b)

    def maximum(self, a: Expr, b: Expr) -> Expr:
        return self._tir.Max(a, b)

    def select(self, condition: Expr, a: Expr, b: Expr) -> Expr:
        return self._tir.Select(condition, a, b)

    def less(self, a: Expr, b: Expr) -> Expr:
        return self._tir.LT(a, b)

    def both(self, a: Expr, b: Expr) -> Expr:
        return self._tir.And(a, b)

    def shuffle(self, vector: Expr, indices: list[int]) -> Expr:
        return self._tir.Shuffle([vector], indices)

    def concatenate(self, vectors: list[Expr], lanes: int) -> Expr:
        """One vector of the elements of all, in order."""
        if len(vectors) == 1:
            return vectors[0]
        return self._tir.Shuffle(vectors, list(range(len(vectors) * lanes)))

    def interleave(self, vectors: list[Expr], lanes: int) -> Expr:
        """a0 b0 .. a1 b1 ..: one vector of all the elements."""
        order = [v * lanes + i for i in range(lanes) for v in range(len(vectors))]
        return self._tir.Shuffle(vectors, order)

    def transpose(self, rows: list[Expr]) -> list[Expr]:
        """Columns of a square of 2^k vectors: k times the perfect shuffle of both halves."""
        n = len(rows)
        low = [i // 2 + n * (i % 2) for i in range(n)]
        high = [i + n // 2 for i in low]
        for _ in range(n.bit_length() - 1):
            pairs = zip(rows[: n // 2], rows[n // 2 :], strict=True)
            rows = [
                self.let(self._tir.Shuffle([a, b], order))
                for a, b in pairs
                for order in (low, high)
            ]
        return rows

    def fence(self, value: Expr, lanes: int = 1) -> Expr:
        """An fp32 product that no sum behind it may take into a fused multiply-add, which LLVM
        otherwise makes of every product that only feeds a sum."""
        dtype = "float32" if lanes == 1 else f"float32x{lanes}"
        return self.intrinsic("llvm.arithmetic.fence", dtype, value)

    def fma(self, a: Expr, b: Expr, c: Expr, lanes: int = 1) -> Expr:
        """a · b + c in fp32, rounded once."""
        dtype = "float32" if lanes == 1 else f"float32x{lanes}"
        return self.intrinsic("llvm.fma", dtype, a, b, c)

    def wrapping(self, operation: str, a: Expr, b: Expr, lanes: int) -> Expr:
        """add, sub or mul of int32 vectors modulo 2^32: TVM tells LLVM that its own never overflow.

        Source: LLVM Language Reference, llvm.vp.* intrinsics.
        """
        mask = self.const(1, "bool", lanes)
        length = self.const(lanes, "int32")
        return self.intrinsic(f"llvm.vp.{operation}", f"int32x{lanes}", a, b, mask, length)

    def ramp(self, lanes: int) -> Expr:
        """0, 1, 2 .. as int32."""
        return self._tir.Ramp(0, 1, lanes)

    def fill(self, buffer: Buffer, start: Expr, size: int, value: Expr, dtype: str) -> None:
        """buffer[start : start+size] = value (a scalar)."""
        for at, lanes in self.vectors(start, size, 256 // _BITS[dtype]):
            self.store(buffer, at, self.broadcast(value, lanes), lanes)

    def vectors(self, start: Expr, size: int, lanes: int) -> Iterator[tuple[Expr, int]]:
        """Run the body once per emitted form: a loop of full vectors, then one of single items.

        Used as `for at, lanes in ir.vectors(...)`: the body is emitted inside each loop.
        """
        full, rest = divmod(size, lanes)
        if full:
            with self.loop(full) as i:
                yield start + i * lanes, lanes
        if rest:
            with self.loop(rest) as i:
                yield start + full * lanes + i, 1


_BITS = {
    "float32": 32, "int32": 32, "uint16": 16, "int16": 16, "uint8": 8, "int8": 8,
}  # fmt: skip
