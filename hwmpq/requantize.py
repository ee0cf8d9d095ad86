"""The epilogue of a layer: from the accumulator to what is stored. One definition.

Integer accumulator, integer result (design section 4):
    q = clamp(rint(f32(acc + bias) · m_c) [+ rint(f32(r − z_r) · m_r)] + z, lo, hi)
Every rint is taken of a *single* fp32 product, so that a compiler's contraction to fused
multiply-add cannot change it. All other cases go through the fp32 value y:
    y = f32(acc + bias) · m_c   (integer accumulator)   or
    y = acc · m_c + bias        (float accumulator; m = 1 unless the weights have a scale)
    y = clamp(y [+ value of r], lo, hi);   stored as y, or as q = clamp(rint(y / s) + z)
where a division by a scale is always the product with its fp32 reciprocal, and every product and
every sum is rounded to fp32: nothing is fused.

`constants` computes the numbers, `apply` is their meaning on numpy or torch arrays: the simulator
calls it, the compiled kernels are tested against it bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.formats import reciprocal
from hwmpq.storage import is_integer

F32 = NDArray[np.float32]
#: Index of each scalar in `Epilogue.scalars`, the fp32 vector that a kernel is given.
Z_IN, Z_OUT, LO, HI, INV_OUT, M_RES, Z_RES, SCALARS = 0, 1, 2, 3, 4, 5, 6, 8
_UNBOUNDED = np.float32(3.0e38)


@dataclass(frozen=True)
class Quantizer:
    """Scale and zero point of one tensor in one encoding: value = (code − zero) · scale."""

    scale: float = 1.0
    zero: int = 0


@dataclass(frozen=True, eq=False)
class Epilogue:
    """multiplier, bias: [channels] (bias is int32 behind an integer accumulator, else fp32);
    scalars: fp32 [SCALARS]; encodings of the result and of the residual ('' = none)."""

    multiplier: F32
    bias: NDArray[Any]
    scalars: F32
    out: str
    residual: str
    integer: bool

    @property
    def to_code(self) -> bool:
        return is_integer(self.out)


def constants(
    *,
    integer: bool,
    channels: int,
    bias: F32 | None,
    x: Quantizer,
    weight_scale: F32 | float,
    weight_sum: NDArray[np.int64] | None,
    out: str,
    out_quantizer: Quantizer,
    out_range: tuple[int, int] = (0, 255),
    residual: str = "",
    residual_quantizer: Quantizer = Quantizer(),
    act_range: tuple[float | None, float | None] = (None, None),
    scale: float = 1.0,
) -> Epilogue:
    """The numbers of one layer's epilogue.

    integer: the accumulator is an int32 of codes. weight_sum: Σ of the weight codes per channel
    (folds the input's zero point into the bias). out_range: smallest and largest code of `out`.
    act_range: bounds of a relu or clamp in real values. scale: constant factor on the product
    (1/√d of an attention).
    """
    real_bias = np.zeros(channels, np.float64) if bias is None else bias.astype(np.float64)
    product = np.broadcast_to(
        np.float64(x.scale) * np.asarray(weight_scale, np.float64) * scale, (channels,)
    )
    if integer:
        # Bounded so that acc + bias cannot leave int32: |acc| < 2^30 for any layer we take.
        folded = np.clip(np.rint(real_bias / product), -(2**30), 2**30)
        zero = 0 if weight_sum is None else x.zero * weight_sum
        full_bias: NDArray[Any] = (folded - zero).astype(np.int32)
        multiplier = product.astype(np.float32)
        if is_integer(out):
            multiplier = (product / np.float64(np.float32(out_quantizer.scale))).astype(np.float32)
    else:
        full_bias = real_bias.astype(np.float32)
        multiplier = product.astype(np.float32)
    inverse = reciprocal(out_quantizer.scale)
    low, high = act_range
    scalars = np.zeros(SCALARS, np.float32)
    scalars[Z_IN] = x.zero
    scalars[Z_OUT] = out_quantizer.zero
    scalars[INV_OUT] = inverse
    scalars[Z_RES] = residual_quantizer.zero
    if is_integer(out):
        # rint is monotone: clamping the code is clamping the value.
        def code(value: float | None, otherwise: int) -> float:
            if value is None:
                return otherwise
            q = np.rint(np.float32(value) * inverse) + out_quantizer.zero
            return float(np.clip(q, *out_range))

        scalars[LO], scalars[HI] = code(low, out_range[0]), code(high, out_range[1])
    else:
        scalars[LO] = -_UNBOUNDED if low is None else low
        scalars[HI] = _UNBOUNDED if high is None else high
    if residual and is_integer(residual):
        ratio = np.float64(residual_quantizer.scale)
        if integer and is_integer(out):
            ratio = ratio / np.float64(np.float32(out_quantizer.scale))
        scalars[M_RES] = ratio
    return Epilogue(multiplier, full_bias, scalars, out, residual, integer)


def apply(acc: Any, e: Epilogue, residual: Any = None, channel_axis: int = -1) -> Any:
    """What is stored, as fp32 values or as fp32-held codes, for an accumulator array.

    acc: int32/int64 or fp32, channels on `channel_axis`; residual: codes or values, same shape.
    numpy and torch arrays are served alike; the result is float32 (codes are exact in it).
    """
    shape = [1] * acc.ndim
    shape[channel_axis] = -1
    like = _Like(acc)
    multiplier = like.array(e.multiplier).reshape(shape)
    bias = like.array(e.bias).reshape(shape)
    s = [np.float32(v) for v in e.scalars]
    if e.integer:
        y = like.f32(acc + bias) * multiplier
        if e.to_code:
            q = like.rint(y)
            if residual is not None:
                if is_integer(e.residual):
                    q = q + like.rint((like.f32(residual) - s[Z_RES].item()) * s[M_RES].item())
                else:
                    q = q + like.rint(like.f32(residual) * s[INV_OUT].item())
            return (q + s[Z_OUT].item()).clip(s[LO].item(), s[HI].item())
    else:
        y = acc * multiplier + bias
    if residual is not None:
        r = like.f32(residual)
        y = y + ((r - s[Z_RES].item()) * s[M_RES].item() if is_integer(e.residual) else r)
    if e.to_code:
        q = like.rint(y * s[INV_OUT].item()) + s[Z_OUT].item()
        return q.clip(s[LO].item(), s[HI].item())
    return y.clip(s[LO].item(), s[HI].item())


class _Like:
    """The four functions that numpy and torch spell differently."""

    def __init__(self, array: Any):
        self.numpy = isinstance(array, np.ndarray)

    def f32(self, array: Any) -> Any:
        return array.astype(np.float32) if self.numpy else array.float()

    def rint(self, array: Any) -> Any:
        return np.rint(array) if self.numpy else array.round()

    def array(self, value: NDArray[Any]) -> Any:
        if self.numpy:
            return value
        import torch

        return torch.from_numpy(np.ascontiguousarray(value))
