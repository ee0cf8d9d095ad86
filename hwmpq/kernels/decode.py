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

from hwmpq.kernels.codes import memory_dtype, to_f32
from hwmpq.kernels.ir import IR, Buffer, Expr

Codes = NDArray[Any]


@dataclass(frozen=True)
class Decoder:
    """encoding of the stored codes -> dtype of the multiplied weights.

    unit: vectors in one block; memory: dtype of the packed array.
    pack: [vectors, width] codes (vectors a multiple of unit) -> flat packed array.
    expand(ir, src, src_at, dst, dst_at, width): emit the decoding of one block.
    identity: the packed array can be multiplied as it is.
    """

    encoding: str
    dtype: str
    unit: int
    memory: str
    pack: Callable[[Codes], Codes]
    expand: Callable[[IR, Buffer, Expr, Buffer, Expr, int], None]
    identity: bool = False


def decoder(encoding: str, dtype: str) -> Decoder | None:
    """The decoder from a weight encoding to a multiplied dtype, or None."""
    return _DECODERS.get((encoding, dtype))


def _flat(codes: Codes) -> Codes:
    return np.ascontiguousarray(codes).reshape(-1)


def _pack_bits(bits: int) -> Callable[[Codes], Codes]:
    """Vector j of a block goes into bit field j of every byte."""
    per_byte = 8 // bits

    def pack(codes: Codes) -> Codes:
        fields = codes.astype(np.uint8).reshape(-1, per_byte, codes.shape[1]) & ((1 << bits) - 1)
        shifts = (np.arange(per_byte, dtype=np.uint8) * bits)[None, :, None]
        return _flat(np.bitwise_or.reduce(fields << shifts, axis=1))

    return pack


def _expand_bits(bits: int, dtype: str) -> Callable[..., None]:
    sign = 1 << (bits - 1)

    def expand(ir: IR, src: Buffer, src_at: Expr, dst: Buffer, dst_at: Expr, width: int) -> None:
        def u(value: int) -> Expr:
            return ir.const(value, "uint8", width)

        packed = ir.let(ir.load(src, src_at, width))
        for field in range(8 // bits):
            code = packed >> u(field * bits) if field else packed
            if field < 8 // bits - 1:
                code = code & u((1 << bits) - 1)
            # Sign extension of a narrow two's complement field: (code ^ sign) - sign.
            extended = ir.reinterpret(code ^ u(sign), "int8", width) - ir.const(sign, "int8", width)
            if dtype != "int8":
                extended = ir.cast(extended, dtype, width)
            ir.store(dst, dst_at + field * width, extended, width)

    return expand


def _expand_cast(encoding: str, dtype: str) -> Callable[..., None]:
    def expand(ir: IR, src: Buffer, src_at: Expr, dst: Buffer, dst_at: Expr, width: int) -> None:
        value = ir.load(src, src_at, width)
        if dtype == "float32":
            value = to_f32(ir, value, encoding, width)
        elif memory_dtype(encoding) != dtype:
            value = ir.cast(value, dtype, width)
        ir.store(dst, dst_at, value, width)

    return expand


def _decoders() -> dict[tuple[str, str], Decoder]:
    found: list[Decoder] = []
    for encoding, dtype in (("fp32", "float32"), ("s8", "int8")):
        cast = _expand_cast(encoding, dtype)
        found.append(Decoder(encoding, dtype, 1, dtype, _flat, cast, identity=True))
    for encoding in ("bf16", "fp16", "s8"):
        found.append(
            Decoder(
                encoding, "float32", 1, memory_dtype(encoding), _flat,
                _expand_cast(encoding, "float32"),
            )
        )  # fmt: skip
    found.append(Decoder("s8", "int16", 1, "int8", _flat, _expand_cast("s8", "int16")))
    for bits in (2, 4):
        for dtype in ("int8", "int16", "float32"):
            found.append(
                Decoder(
                    f"s{bits}", dtype, 8 // bits, "uint8", _pack_bits(bits),
                    _expand_bits(bits, dtype),
                )
            )  # fmt: skip
    return {(d.encoding, d.dtype): d for d in found}


_DECODERS = _decoders()
