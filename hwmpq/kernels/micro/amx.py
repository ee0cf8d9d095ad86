"""Tiles of 16 rows × 64 bytes: TDPBUSD (u8 × s8 into int32) and TDPBF16PS (bf16 pairs into fp32).

A row of a weight tile is a vector of VPDPBUSD or VDPBF16PS, so these dots serve where a tile is too
much (column sums of a matmul), and the packing is theirs. Of the eight tiles 0-3 hold sums, 4-5
activations, 6-7 weights. Linux lets a process use them only after it has asked
(`hwmpq.tile_permission`).
Sources: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG and
TILELOADD; Optimization Reference Manual, chapter on AMX: one tile product per 16 cycles, one tile
load per 8.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmpq.formats import Format
from hwmpq.kernels.ir import IR, Address, Buffer, Expr
from hwmpq.kernels.micro import Micro, TileMicro
from hwmpq.kernels.micro.avx512_bf16 import AVX512_BF16 as BF16
from hwmpq.kernels.micro.vnni import AVX512_VNNI as VNNI
from hwmpq.types import Execution

_SUMS, _ACTIVATIONS, _WEIGHTS = 0, 4, 6
#: Bytes of a tile row; of a sum, and of the activations of one dot.
_ROW, _WORD = 64, 4
#: Offsets in the 64 bytes of LDTILECFG: palette, bytes of a row (16 bit each), rows.
_PALETTE, _BYTES, _ROWS = 0, 16, 48
_PRODUCT_CYCLES, _LOAD_CYCLES = 16, 8


@dataclass(frozen=True, kw_only=True)
class Amx(TileMicro):
    """vector: the micro-kernel of one row; instruction: the product of tiles."""

    vector: Micro
    instruction: str

    def why_not(self, fmt: Format) -> str | None:
        return self.vector.why_not(fmt)

    def execution(self, fmt: Format) -> Execution:
        return self.vector.execution(fmt)

    def dot(self, ir: IR, acc: Expr, a: Expr, w: Expr) -> Expr:
        return self.vector.dot(ir, acc, a, w)

    def configure(self, ir: IR, rows: int, steps: int) -> None:
        config = ir.local(64, "uint8")
        ir.store(config, 0, ir.const(0, "uint8", 64), 64)
        ir.store(config, _PALETTE, ir.const(1, "uint8"))
        for tile in range(8):
            height, width = rows, _ROW
            if tile >= _WEIGHTS:
                height = steps
            elif tile >= _ACTIVATIONS:
                width = steps * _WORD
            ir.store(config, _BYTES + 2 * tile, ir.const(width, "uint8"))
            ir.store(config, _ROWS + tile, ir.const(height, "uint8"))
        ir.effect("llvm.x86.ldtilecfg", Address(config, 0))

    def release(self, ir: IR) -> None:
        ir.effect("llvm.x86.tilerelease")

    def zero(self, ir: IR, i: int, j: int) -> None:
        ir.effect("llvm.x86.tilezero", _number(ir, _SUMS + 2 * i + j))

    def load_activations(self, ir: IR, i: int, buffer: Buffer, at: Expr, pitch: int) -> None:
        stride = ir.const(pitch * _WORD // self.kstep, "int64")
        _load(ir, _ACTIVATIONS + i, Address(buffer, at), stride)

    def load_weights(self, ir: IR, j: int, buffer: Buffer, at: Expr) -> None:
        _load(ir, _WEIGHTS + j, Address(buffer, at), ir.const(_ROW, "int64"))

    def product(self, ir: IR, i: int, j: int) -> None:
        tiles = (_SUMS + 2 * i + j, _ACTIVATIONS + i, _WEIGHTS + j)
        ir.effect(self.instruction, *(_number(ir, t) for t in tiles))

    def store(self, ir: IR, i: int, j: int, buffer: Buffer, at: Expr, pitch: int) -> None:
        stride = ir.const(pitch * _WORD, "int64")
        ir.effect(
            "llvm.x86.tilestored64", _number(ir, _SUMS + 2 * i + j), Address(buffer, at), stride
        )

    def cycles(self, rows: int, vectors: int, fmt: Format) -> float:
        tiles = -(-rows // self.tile_rows)
        work = max(_PRODUCT_CYCLES * tiles * vectors, _LOAD_CYCLES * (tiles + vectors))
        return work / (self.tile_steps * self.kstep)


MICROS = (
    Amx(
        "amx_int8", frozenset({"amx-tile", "amx-int8"}) | VNNI.requires, 16, 4, "uint8", "int8",
        "int32", 32, 64, vector=VNNI, instruction="llvm.x86.tdpbusd",
    ),
    Amx(
        "amx_bf16", frozenset({"amx-tile", "amx-bf16"}) | BF16.requires, 16, 2, "uint16",
        "uint16", "float32", 32, 64, vector=BF16, instruction="llvm.x86.tdpbf16ps", llvm=BF16.llvm,
    ),
)  # fmt: skip


def _load(ir: IR, tile: int, source: Address, stride: Expr) -> None:
    ir.effect("llvm.x86.tileloadd64", _number(ir, tile), source, stride)


def _number(ir: IR, tile: int) -> Expr:
    return ir.const(tile, "uint8")
