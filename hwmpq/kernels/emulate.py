"""Instructions that this CPU lacks, spelt out in plain TIR: for conformance, never for timing.

The loops, packing, tails and epilogue of a kernel are emitted as they are; only the intrinsic is
replaced by what its manual says it does. LLVM splits wide vectors into those the CPU has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.ir import IR, Address, Buffer, Expr
from hwmpq.kernels.micro import Micro
from hwmpq.kernels.micro.avx512_bf16 import DOT
from hwmpq.kernels.nests import Call, Nest, Schedule, arguments

#: int32 words of a tile row and of a tile.
_ROW, _TILE = 16, 256


class EmulatedIR(IR):
    """An IR whose dot products and tile instructions are arithmetic.

    Tile registers are memory of the thread, made where they are configured: eight tiles of 16 rows
    of int32 words, and the 64 bytes of their configuration.
    """

    tiles: Buffer
    config: Buffer

    def intrinsic(self, name: str, dtype: str, *args: Expr) -> Expr:
        if name in _MEANING:
            return _MEANING[name](self, dtype, *args)
        return super().intrinsic(name, dtype, *args)

    def external(self, name: str, dtype: str, *args: Expr) -> Expr:
        return _MEANING[name](self, dtype, *args)

    def effect(self, name: str, *args: Expr | Address) -> None:
        _EFFECT[name](self, *args)

    def tile_rows(self, tile: int) -> Iterator[Expr]:
        """A loop over the rows that a tile is configured to have."""
        with self.loop(self.cast(self.load(self.config, 48 + tile), "int32")) as row:
            yield row

    def tile_words(self, tile: int, address: Address, stride: Expr) -> Iterator[tuple[Expr, Expr]]:
        """A loop over the words of a tile: (index in `tiles`, index in the addressed buffer)."""
        item = np.dtype(str(address.buffer.dtype)).itemsize
        width = self.cast(self.load(self.config, 16 + 2 * tile), "int32")
        for row in self.tile_rows(tile):
            with self.loop(width // 4) as word:
                there = address.index + row * (int(stride) // item) + word * (4 // item)
                yield tile * _TILE + row * _ROW + word, there


def emit_emulated(
    nest: Nest, call: Call, micro: Micro, decoder: Decoder, schedule: Schedule
) -> Any:
    """As `nests.emit`, with emulated intrinsics."""
    ir = EmulatedIR()
    with ir.function():
        buffers = arguments(ir, nest, call, micro, decoder)
        nest.body(ir, call, micro, decoder, schedule, buffers)
    return ir.result()


def _vpdpbusd(ir: IR, dtype: str, acc: Expr, a: Expr, w: Expr) -> Expr:
    """acc + Σ of four u8 · s8 products per 32-bit lane, wrapping.

    Source: Intel Intrinsics Guide, _mm256_dpbusd_epi32 and _mm512_dpbusd_epi32.
    """
    lanes = int(dtype.removeprefix("int32x"))
    a32, w32 = (ir.let(ir.reinterpret(v, "int32", lanes)) for v in (a, w))

    def c(value: int) -> Expr:
        return ir.const(value, "int32", lanes)

    for byte in range(4):
        unsigned = (a32 >> c(8 * byte)) & c(255)
        signed = (w32 << c(24 - 8 * byte)) >> c(24)
        acc = acc + unsigned * signed
    return acc


def _vdpbf16ps(ir: IR, dtype: str, acc: Expr, a: Expr, w: Expr) -> Expr:
    """acc + the odd, then the even bf16 · bf16 product of every 32-bit lane; denormals are kept.

    Source: Intel Intrinsics Guide, _mm512_dpbf16_ps.
    """
    lanes = int(dtype.removeprefix("float32x"))
    a32, w32 = (ir.let(ir.reinterpret(v, "uint32", lanes)) for v in (a, w))

    def half(value: Expr, high: bool) -> Expr:
        sixteen, upper = (ir.const(c, "uint32", lanes) for c in (16, 0xFFFF0000))
        return ir.reinterpret(value & upper if high else value << sixteen, "float32", lanes)

    for high in (True, False):
        acc = ir.fma(half(a32, high), half(w32, high), acc, lanes)
    return acc


def _ldtilecfg(ir: EmulatedIR, address: Address) -> None:
    ir.tiles, ir.config = ir.scratch(8 * _TILE, "int32"), ir.scratch(64, "uint8")
    ir.store(ir.config, 0, ir.load(address.buffer, address.index, 64), 64)
    ir.fill(ir.tiles, 0, 8 * _TILE, ir.const(0, "int32"), "int32")


def _tilezero(ir: EmulatedIR, tile: Expr) -> None:
    ir.fill(ir.tiles, int(tile) * _TILE, _TILE, ir.const(0, "int32"), "int32")


def _tileloadd(ir: EmulatedIR, tile: Expr, address: Address, stride: Expr) -> None:
    lanes = 4 // np.dtype(str(address.buffer.dtype)).itemsize
    for here, there in ir.tile_words(int(tile), address, stride):
        word = ir.load(address.buffer, there, lanes)
        ir.store(ir.tiles, here, ir.reinterpret(word, "int32"))


def _tilestored(ir: EmulatedIR, tile: Expr, address: Address, stride: Expr) -> None:
    for here, there in ir.tile_words(int(tile), address, stride):
        word = ir.reinterpret(ir.load(ir.tiles, here), str(address.buffer.dtype))
        ir.store(address.buffer, there, word)


def _tile_product(name: str, dtype: str) -> Callable[..., None]:
    """Rows of sums += words of activations · rows of weights, by the dot product `name`.

    Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBUSD and
    TDPBF16PS.
    """

    def emit(ir: EmulatedIR, sums: Expr, a: Expr, w: Expr) -> None:
        for row in ir.tile_rows(int(sums)):
            at = int(sums) * _TILE + row * _ROW
            for step in ir.tile_rows(int(w)):
                acc = ir.reinterpret(ir.load(ir.tiles, at, _ROW), dtype, _ROW)
                word = ir.load(ir.tiles, int(a) * _TILE + row * _ROW + step)
                weights = ir.load(ir.tiles, int(w) * _TILE + step * _ROW, _ROW)
                total = _MEANING[name](
                    ir, f"{dtype}x{_ROW}", acc, ir.broadcast(word, _ROW), weights
                )
                ir.store(ir.tiles, at, ir.reinterpret(total, "int32", _ROW), _ROW)

    return emit


_MEANING: dict[str, Callable[..., Expr]] = {
    "llvm.x86.avx512.vpdpbusd.256": _vpdpbusd,
    "llvm.x86.avx512.vpdpbusd.512": _vpdpbusd,
    DOT: _vdpbf16ps,
}
_EFFECT: dict[str, Callable[..., None]] = {
    "llvm.x86.ldtilecfg": _ldtilecfg,
    "llvm.x86.tilezero": _tilezero,
    "llvm.x86.tileloadd64": _tileloadd,
    "llvm.x86.tilestored64": _tilestored,
    "llvm.x86.tdpbusd": _tile_product("llvm.x86.avx512.vpdpbusd.512", "int32"),
    "llvm.x86.tdpbf16ps": _tile_product(DOT, "float32"),
    "llvm.x86.tilerelease": lambda ir: None,
}
