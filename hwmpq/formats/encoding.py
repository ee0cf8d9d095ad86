"""Encoding: how one number is written in a few bits. Subclasses round; packing is common to all.

Arrays may be numpy or torch; both give equal bits. Nothing here carries a gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.formats.arrays import Array, cast, like, namespace


@dataclass(frozen=True)
class Encoding(ABC):
    """A set of representable numbers and their codes.

    bits: width of one packed code. qmin, qmax: smallest and largest code of an integer, smallest
    and largest finite value of a float. code_dtype: numpy dtype name of unpacked codes.
    """

    name: str
    bits: int
    qmin: float
    qmax: float
    code_dtype: str
    kind: ClassVar[Literal["int", "float"]]

    @property
    @abstractmethod
    def scaled(self) -> bool:
        """Whether values are divided by a scale before rounding."""

    @property
    @abstractmethod
    def precision(self) -> int:
        """Significant bits of the largest value."""

    @abstractmethod
    def quantize(self, x: Array, scale: Any = 1.0, zero: Any = 0) -> Array:
        """Codes of `x` (taken as float32), same shape and library, dtype `code_dtype`.

        scale, zero: numbers or arrays broadcastable against x. Out of range saturates.
        Raises InputError for a NaN that has no code, and for a scale that is not positive.
        """

    @abstractmethod
    def dequantize(self, codes: Array, scale: Any = 1.0, zero: Any = 0) -> Array:
        """The float32 values of `codes`, same shape and library."""

    def fake(self, x: Array, scale: Any = 1.0, zero: Any = 0) -> Array:
        """`x` rounded to this encoding, as float32."""
        return self.dequantize(self.quantize(x, scale, zero), scale, zero)

    def packed_nbytes(self, n: int) -> int:
        """Bytes of a packed row of `n` codes."""
        return -(-n * self.bits // 8)

    def pack(self, codes: NDArray[Any]) -> NDArray[np.uint8]:
        """Dense codes: [..., n] -> uint8 [..., packed_nbytes(n)].

        Bit i of element j is bit j·bits + i of the row, counted from the low bit of byte 0: element
        0 sits in the low bits. The last byte is filled with zeros. 16 and 32 bit: little-endian.
        """
        codes = np.ascontiguousarray(codes, np.dtype(self.code_dtype).newbyteorder("<"))
        if self.bits >= 8:
            return codes.view(np.uint8)
        bits = np.unpackbits(
            codes.view(np.uint8)[..., None], axis=-1, count=self.bits, bitorder="little"
        )
        return np.packbits(bits.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")

    def unpack(self, packed: NDArray[np.uint8], length: int) -> NDArray[Any]:
        """The inverse of `pack`: uint8 [..., packed_nbytes(length)] -> codes [..., length].

        Codes of signed integers are extended from two's complement in `bits` bits.
        Raises InputError when the last axis has not packed_nbytes(length) bytes.
        """
        if packed.shape[-1] != self.packed_nbytes(length):
            raise InputError(
                f"bytes of a packed row of {length} {self.name} codes",
                packed.shape[-1],
                self.packed_nbytes(length),
            )
        packed = np.ascontiguousarray(packed, np.uint8)
        if self.bits >= 8:
            little = packed.view(np.dtype(self.code_dtype).newbyteorder("<"))
            return little.astype(self.code_dtype)
        count = length * self.bits
        bits = np.unpackbits(packed, axis=-1, count=count, bitorder="little")
        rows = bits.reshape(*packed.shape[:-1], length, self.bits)
        codes = np.packbits(rows, axis=-1, bitorder="little")[..., 0]
        spare = 8 - self.bits  # shifting up and back copies the sign bit, for int8 only
        return np.asarray((codes << spare).view(self.code_dtype) >> spare)


def reciprocal(scale: Any) -> Array:
    """float32(1) / float32(scale), the factor that every quantizer and kernel multiplies by.

    scale: a number or array; a number gives a 0-d numpy array.
    Raises InputError unless every scale and its reciprocal are positive and finite.
    """
    xp = namespace(scale)
    with np.errstate(all="ignore"):
        scale = cast(scale, "float32")
        inv = cast(xp.ones_like(scale) / scale, "float32")
    good = xp.isfinite(scale) & xp.isfinite(inv) & (scale > 0)
    if not bool(good.all()):
        raise InputError(
            "scale", scale[~good].reshape(-1)[0].item(), "positive, finite, and so its reciprocal"
        )
    return inv


def divided(x: Array, scale: Any) -> Array:
    """`x` as float32 times the reciprocal of `scale`: one fp32 product, as the kernels do it."""
    with np.errstate(over="ignore"):
        x = cast(x, "float32")
        return x * reciprocal(like(scale, x))
