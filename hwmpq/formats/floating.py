"""Floating point: IEEE and bfloat16, OCP 8-bit (OFP8) and OCP Microscaling (MX) element types.

Sources: IEEE 754-2019; "OCP 8-bit Floating Point Specification (OFP8)" 1.0, tables 1 and 2 (e4m3 is
the variant without infinities, max 448; e5m2 max 57344); "OCP Microscaling Formats (MX)
Specification" 1.0, section 5.3 (e3m2 max 28, e2m3 max 7.5, e2m1 max 6; no infinity, no NaN).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from hwmpq.errors import InputError
from hwmpq.formats.arrays import Array, cast, everywhere, like, namespace
from hwmpq.formats.encoding import Encoding, divided
from hwmpq.formats.format import Format

_FP32_MANTISSA, _FP32_BIAS, _FP32_INF = 23, 127, 0x7F800000
#: Encodings that torch converts to by itself; 8-bit ones are scaled and saturate differently there.
_TORCH = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class FloatEncoding(Encoding):
    """Sign, exponent, mantissa; codes are bit patterns (fp32: the values themselves).

    Rounds to nearest, ties to even, through the subnormals; overflow and infinity saturate to the
    largest finite value. mantissa: its stored bits. max_code: magnitude bits of the largest finite
    value. nan: magnitude bits of the NaN that is written, None if there is none.
    At most 8 bits wide: x · inv is rounded, as for integers; wider ones take no scale but 1.
    """

    mantissa: int
    bias: int
    max_code: int
    nan: int | None
    kind: ClassVar[Literal["int", "float"]] = "float"

    @property
    def scaled(self) -> bool:
        return self.bits <= 8

    @property
    def precision(self) -> int:
        return self.mantissa + 1

    def quantize(self, x: Array, scale: Any = 1.0, zero: Any = 0) -> Array:
        self._check(scale, zero)
        y = divided(x, scale) if self.scaled else _float32(x)
        if self.code_dtype == "float32":
            return y
        xp = namespace(y)
        word = y.view(xp.int32)
        magnitude = word & 0x7FFFFFFF
        is_nan = magnitude > _FP32_INF
        if self.nan is None and bool(is_nan.any()):
            raise InputError(
                f"cannot round to {self.name}", "NaN", "numbers", "Find what made the NaN."
            )
        codes = xp.clip(self._round(xp.clip(magnitude, 0, _FP32_INF)), 0, self.max_code)
        if self.nan is not None:
            codes = xp.where(is_nan, self.nan, codes)
        sign = (word >> (32 - self.bits)) & (1 << (self.bits - 1))
        return cast(codes | sign, self.code_dtype)

    def _round(self, magnitude: Array) -> Array:
        """Magnitude bits of float32 -> unsaturated magnitude bits of this encoding, both int32."""
        xp = namespace(magnitude)
        shift = _FP32_MANTISSA - self.mantissa
        odd = (magnitude >> shift) & 1
        codes = (magnitude + odd + ((1 << (shift - 1)) - 1)) >> shift
        codes = codes - ((_FP32_BIAS - self.bias) << self.mantissa)
        if self.bias == _FP32_BIAS:
            return codes
        # Subnormals: in the sum one unit in the last place is one step of this encoding, so the
        # addition itself rounds, and the sum's low bits are the code.
        anchor = _FP32_MANTISSA + self._lowest - self.mantissa
        sums = magnitude.view(xp.float32) + 2.0**anchor
        subnormal = sums.view(xp.int32) - ((anchor + _FP32_BIAS) << _FP32_MANTISSA)
        smallest_normal = (self._lowest + _FP32_BIAS) << _FP32_MANTISSA
        return xp.where(magnitude < smallest_normal, subnormal, codes)

    def dequantize(self, codes: Array, scale: Any = 1.0, zero: Any = 0) -> Array:
        self._check(scale, zero)
        if self.code_dtype == "float32":
            return _float32(codes)
        xp = namespace(codes)
        word = cast(codes, "int32")
        code = word & ((1 << (self.bits - 1)) - 1)
        lift = (_FP32_BIAS - self.bias) << _FP32_MANTISSA
        values = ((code << (_FP32_MANTISSA - self.mantissa)) + lift).view(xp.float32)
        if self.bias != _FP32_BIAS:
            step = 2.0 ** (self._lowest - self.mantissa)
            values = xp.where(code < (1 << self.mantissa), cast(code, "float32") * step, values)
        if self.nan is not None:
            beyond = xp.where(code == self.max_code + 1, self._after_max, float("nan"))
            values = xp.where(code > self.max_code, beyond, values)
        values = cast(xp.where(word >> (self.bits - 1) == 1, -values, values), "float32")
        with np.errstate(over="ignore"):
            return cast(values * like(scale, codes), "float32") if self.scaled else values

    def fake(self, x: Array, scale: Any = 1.0, zero: Any = 0) -> Array:
        """As `Encoding.fake`; torch's own conversion, equal bit by bit, where it has the type."""
        xp = namespace(x)
        if xp is np or self.name not in _TORCH:
            return super().fake(x, scale, zero)
        self._check(scale, zero)
        y = _float32(x)
        if bool(xp.isnan(y).any()):  # torch keeps no sign of a NaN
            return super().fake(y)
        return y.clamp(self.qmin, self.qmax).to(getattr(xp, _TORCH[self.name])).float()

    @property
    def _lowest(self) -> int:
        """Exponent of the smallest normal value and of all subnormals."""
        return 1 - self.bias

    @property
    def _after_max(self) -> float:
        """Value of the code that follows max_code: infinity, if the encoding has one."""
        return float("nan") if self.nan == self.max_code + 1 else float("inf")

    def _check(self, scale: Any, zero: Any) -> None:
        if not everywhere(zero, 0):
            raise InputError(f"zero point of {self.name}", zero, 0)
        if not self.scaled and not everywhere(scale, 1):
            raise InputError(f"scale of {self.name}", scale, 1)


def _float32(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return cast(x, "float32")


def _float(
    name: str, exponent: int, mantissa: int, max_code: int, nan: int | None, code_dtype: str
) -> FloatEncoding:
    """One row: exponent and mantissa bits give bias 2^(exponent-1) - 1, width and largest value."""
    bias = 2 ** (exponent - 1) - 1
    fraction = max_code % 2**mantissa / 2**mantissa
    top = (1 + fraction) * 2.0 ** ((max_code >> mantissa) - bias)
    width = 1 + exponent + mantissa
    return FloatEncoding(name, width, -top, top, code_dtype, mantissa, bias, max_code, nan)


FP32 = _float("fp32", 8, 23, 0x7F7FFFFF, 0x7FC00000, "float32")
BF16 = _float("bf16", 8, 7, 0x7F7F, 0x7FC0, "uint16")
FP16 = _float("fp16", 5, 10, 0x7BFF, 0x7E00, "uint16")
E4M3 = _float("e4m3", 4, 3, 0x7E, 0x7F, "uint8")
E5M2 = _float("e5m2", 5, 2, 0x7B, 0x7E, "uint8")
E3M2 = _float("e3m2", 3, 2, 0x1F, None, "uint8")
E2M3 = _float("e2m3", 2, 3, 0x1F, None, "uint8")
E2M1 = _float("e2m1", 2, 1, 0x07, None, "uint8")

FORMATS = tuple(
    Format(encoding.name, encoding, encoding)
    for encoding in (FP32, BF16, FP16, E4M3, E5M2, E3M2, E2M3, E2M1)
)
