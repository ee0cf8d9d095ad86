"""Integers: symmetric narrow-range weights (`s8` is -127..127), unsigned activations (`u8`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from hwmpq.errors import InputError
from hwmpq.formats.arrays import Array, cast, like, namespace
from hwmpq.formats.encoding import Encoding, divided
from hwmpq.formats.format import Format

WIDTHS = range(2, 9)


@dataclass(frozen=True)
class IntegerEncoding(Encoding):
    """q = clip(rint(x · inv) + zero, qmin, qmax) in float32; x ≈ (q - zero) · scale.

    inv = float32(1) / float32(scale); rint rounds halves to even. Infinity saturates.
    """

    kind: ClassVar[Literal["int", "float"]] = "int"

    @property
    def scaled(self) -> bool:
        return True

    @property
    def precision(self) -> int:
        return self.bits

    def quantize(self, x: Array, scale: Any = 1.0, zero: Any = 0) -> Array:
        y = divided(x, scale)
        xp = namespace(y)
        if bool(xp.isnan(y).any()):
            raise InputError(
                f"cannot round to {self.name}", "NaN", "numbers", "Find what made the NaN."
            )
        codes = xp.clip(xp.round(y) + like(zero, y), int(self.qmin), int(self.qmax))
        return cast(codes, self.code_dtype)

    def dequantize(self, codes: Array, scale: Any = 1.0, zero: Any = 0) -> Array:
        steps = cast(codes, "int32") - like(zero, codes, "int32")
        with np.errstate(over="ignore"):
            return cast(cast(steps, "float32") * like(scale, codes), "float32")


def unsigned(bits: int) -> IntegerEncoding:
    """Activations: 0 .. 2^bits - 1, with a zero point."""
    return IntegerEncoding(f"u{bits}", bits, 0, 2**bits - 1, "uint8")


def signed(bits: int) -> IntegerEncoding:
    """Weights: ±(2^(bits-1) - 1), symmetric; the most negative code is never used."""
    top = 2 ** (bits - 1) - 1
    return IntegerEncoding(f"s{bits}", bits, -top, top, "int8")


FORMATS = tuple(Format(f"w{w}a{a}", signed(w), unsigned(a)) for w in WIDTHS for a in WIDTHS)
