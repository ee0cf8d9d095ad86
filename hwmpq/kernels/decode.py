"""Weight decoders: from packed codes in memory to the vectors a micro-kernel multiplies.

Kernels hold their weights as a sequence of vectors of `width` codes. A decoder packs `unit`
consecutive vectors into one block of memory and expands a block into a tile buffer that is reused
by all output pixels: the cost of unpacking vanishes in the reduction, and memory keeps the narrow
form. Identity decoders have no tile: the kernel reads its weights in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.kernels.codes import from_f32, memory_dtype, to_f32
from hwmpq.kernels.ir import IR, Buffer, Expr

Codes = NDArray[Any]


@dataclass(frozen=True)
class Decoder:
    """encoding of the stored codes -> dtype of the multiplied weights.

    unit: vectors in one block; rows: memory rows of `width` elements that a block takes; memory:
    dtype of the packed array.
    pack: [vectors, width] codes (vectors a multiple of unit) -> flat packed array.
    expand(ir, src, src_at, dst, dst_at, width): emit the decoding of one block.
    identity: the packed array can be multiplied as it is.
    """

    encoding: str
    dtype: str
    unit: int
    rows: int
    memory: str
    pack: Callable[[Codes], Codes]
    expand: Callable[[IR, Buffer, Expr, Buffer, Expr, int], None]
    identity: bool = False


def decoder(encoding: str, dtype: str) -> Decoder | None:
    """The decoder from a weight encoding to a multiplied dtype, or None."""
    return _DECODERS.get((encoding, dtype))


def _flat(codes: Codes) -> Codes:
    return np.ascontiguousarray(codes).reshape(-1)


def fields(bits: int) -> list[tuple[int, int]]:
    """(lowest bit, width) of the parts that a code is cut into: widths 4, 2 and 1, each of which
    fills bytes without a gap."""
    found, low = [], 0
    for width in (4, 2, 1):
        if bits - low >= width:
            found.append((low, width))
            low += width
    return found


def _unit(bits: int) -> int:
    """Vectors of a block: as many as the narrowest field has in a byte."""
    return 8 // min(width for _, width in fields(bits))


def _pack_bits(bits: int) -> Callable[[Codes], Codes]:
    """A block is one byte row per 8 bits of its vectors: field by field, the vectors of a row in
    its bit positions from the lowest on."""
    unit = _unit(bits)

    def pack(codes: Codes) -> Codes:
        blocks = codes.astype(np.uint8).reshape(-1, unit, codes.shape[1])
        rows = []
        for low, width in fields(bits):
            part = (blocks >> low) & ((1 << width) - 1)
            per_byte = 8 // width
            part = part.reshape(len(blocks), unit // per_byte, per_byte, codes.shape[1])
            shifts = (np.arange(per_byte, dtype=np.uint8) * width)[None, None, :, None]
            rows.append(np.bitwise_or.reduce(part << shifts, axis=2))
        return _flat(np.concatenate(rows, axis=1))

    return pack


def _expand_bits(bits: int, dtype: str) -> Callable[..., None]:
    sign = 1 << (bits - 1)
    unit = _unit(bits)

    def expand(ir: IR, src: Buffer, src_at: Expr, dst: Buffer, dst_at: Expr, width: int) -> None:
        def u(value: int) -> Expr:
            return ir.const(value, "uint8", width)

        count = bits * unit // 8
        rows = [ir.let(ir.load(src, src_at + r * width, width)) for r in range(count)]
        for vector in range(unit):
            code, first = None, 0
            for low, part in fields(bits):
                per_byte = 8 // part
                row, position = rows[first + vector // per_byte], vector % per_byte
                piece = row >> u(position * part) if position else row
                if position < per_byte - 1:
                    piece = piece & u((1 << part) - 1)
                piece = piece << u(low) if low else piece
                code = piece if code is None else code | piece
                first += unit // per_byte
            # Sign extension of a narrow two's complement field: (code ^ sign) - sign.
            extended = ir.reinterpret(code ^ u(sign), "int8", width) - ir.const(sign, "int8", width)
            extended = _multiplied(ir, extended, "s8", dtype, width)
            ir.store(dst, dst_at + vector * width, extended, width)

    return expand


def _expand_cast(encoding: str, dtype: str) -> Callable[..., None]:
    def expand(ir: IR, src: Buffer, src_at: Expr, dst: Buffer, dst_at: Expr, width: int) -> None:
        value = _multiplied(ir, ir.load(src, src_at, width), encoding, dtype, width)
        ir.store(dst, dst_at, value, width)

    return expand


def _multiplied(ir: IR, value: Expr, encoding: str, dtype: str, width: int) -> Expr:
    """An element in memory -> in the multiplied dtype, exactly; uint16 holds bf16."""
    if dtype == memory_dtype(encoding):
        return value
    if dtype == "float32":
        return to_f32(ir, value, encoding, width)
    if dtype == "uint16":
        return from_f32(ir, to_f32(ir, value, encoding, width), "bf16", width)
    return ir.cast(value, dtype, width)


def _decoders() -> dict[tuple[str, str], Decoder]:
    found: list[Decoder] = []
    for encoding, dtype in (("fp32", "float32"), ("s8", "int8"), ("bf16", "uint16")):
        cast = _expand_cast(encoding, dtype)
        found.append(Decoder(encoding, dtype, 1, 1, dtype, _flat, cast, identity=True))
    wide = [(encoding, "float32") for encoding in ("bf16", "fp16", "s8", "e4m3", "e5m2")]
    wide += [(encoding, "uint16") for encoding in ("s8", "e4m3", "e5m2")]
    for encoding, dtype in (*wide, ("s8", "int16")):
        cast = _expand_cast(encoding, dtype)
        found.append(Decoder(encoding, dtype, 1, 1, memory_dtype(encoding), _flat, cast))
    for bits in range(2, 8):
        unit = _unit(bits)
        for dtype in ("int8", "int16", "uint16", "float32"):
            found.append(
                Decoder(
                    f"s{bits}", dtype, unit, bits * unit // 8, "uint8", _pack_bits(bits),
                    _expand_bits(bits, dtype),
                )
            )  # fmt: skip
    return {(d.encoding, d.dtype): d for d in found}


_DECODERS = _decoders()
