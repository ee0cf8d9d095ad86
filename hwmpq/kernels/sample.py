"""Operands for a kernel: random or extreme, with scales and zero points that are not trivial."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.formats import Format, QuantizedWeight, encoding_named
from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.nests import Call
from hwmpq.kernels.reference import Answer, accumulate, answer, depth
from hwmpq.requantize import Epilogue, Quantizer, constants
from hwmpq.storage import is_integer
from hwmpq.types import Workload

Array = NDArray[Any]
#: random: full range; most, least: all activations at their largest code and all weights at theirs
#: or at its negative: the largest sums that can occur.
VALUES = ("random", "most", "least")
#: Random elements repeat after so many: in a bundle they take little room, as deflate looks 32 KiB
#: back. A prime, so that no row, block or vector is as another.
PERIOD = 8191
#: About the scale of weights.
_SCALE = np.float32(0.01)


@dataclass(frozen=True, eq=False)
class Sample:
    """x, b, residual: as they lie in memory, in the reference's shape (b of a matmul only);
    weight: codes in torch's layout (None for a matmul); scales: of their groups, or None."""

    x: Array
    weight: Array | None
    b: Array | None
    epilogue: Epilogue
    residual: Array | None
    answer: Answer
    scales: Array | None = None


def draw(call: Call, seed: int, values: str = "random", positive: bool = False) -> Sample:
    """Operands of a call and its right result. The workload's epilogue says: bias, relu, clamp.

    positive: results of one sign, so that the bit patterns of floats are ordered as they are.
    """
    rng = np.random.default_rng(seed)
    w, fmt = call.workload, call.format
    x_quantizer = _quantizer(rng, call.x, 0.02)
    x = _operand(rng, call.x, _image(w, w.in_shape), values, "most")
    other = _operand(rng, fmt.weight.name, w.weight_shape, values, values)
    x_values, w_values = _values(call.x, x), _values(fmt.weight.name, other)
    scales = None
    if fmt.group is not None:
        scales = (rng.random(fmt.scale_shape(w.weight_shape)) + 0.5).astype(np.float32) * _SCALE
        w_values = fmt.dequantize_weight(QuantizedWeight(other, scales))
    acc = accumulate(w, x_values, w_values, x_quantizer.zero)
    magnitude = np.abs(acc)
    if not fmt.is_integer:
        magnitude = accumulate(w, np.abs(x_values), np.abs(w_values), 0)
    residual = None
    e, spread = _epilogue(rng, call, acc, other, x_quantizer, positive)
    if call.residual:
        residual = _residual(rng, call.residual, acc.shape, spread, positive)
    read = None if residual is None else _values(call.residual, residual)
    right = answer(acc, e, read, depth(w), magnitude)
    weight, b = (other, None) if w.has_weight else (None, other.astype(memory_dtype(call.b)))
    return Sample(x, weight, b, e, residual, right, scales)


def stored(encoding: str, values: Array) -> Array:
    """Codes or values as `Answer` holds them -> elements as they lie in memory."""
    if not is_integer(encoding):
        return np.asarray(encoding_named(encoding).quantize(values.astype(np.float32)))
    return values.astype(memory_dtype(encoding))


def read(encoding: str, elements: Array) -> Array:
    """The inverse of `stored`."""
    return _values(encoding, elements).astype(np.float64)


def _image(w: Workload, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A logical shape with its channels last."""
    if w.op in ("conv2d", "depthwise"):
        n, c, height, width = shape
        return (n, height, width, c)
    return shape


def _values(encoding: str, elements: Array) -> Array:
    """Codes of an integer encoding, values of a float one."""
    if is_integer(encoding):
        return elements
    return np.asarray(encoding_named(encoding).dequantize(elements))


def _quantizer(rng: np.random.Generator, encoding: str, scale: float) -> Quantizer:
    """An asymmetric one for an unsigned encoding."""
    if not is_integer(encoding):
        return Quantizer()
    top = int(encoding_named(encoding).qmax)
    zero = int(rng.integers(1, top)) if encoding.startswith("u") and top > 1 else 0
    return Quantizer(scale, zero)


def _operand(
    rng: np.random.Generator, encoding: str, shape: tuple[int, ...], values: str, end: str
) -> Array:
    """Codes in memory; `end` says which end of the range, unless values are random."""
    kind = encoding_named(encoding)
    sign = 1 if end == "most" else -1
    if is_integer(encoding):
        low, high = int(kind.qmin), int(kind.qmax)
        if values == "random":
            codes = _repeated(lambda count: rng.integers(low, high + 1, count), shape)
        else:
            codes = np.full(shape, sign * high)
        return codes.astype(memory_dtype(encoding))
    if values == "random":
        numbers = _repeated(rng.standard_normal, shape)
    else:  # large enough for fp16 to overflow when it is written
        numbers = np.full(shape, sign * 190.0)
    return np.asarray(kind.quantize(numbers.astype(np.float32)))


def _repeated(random: Callable[[int], Array], shape: tuple[int, ...]) -> Array:
    """A PERIOD of random elements, again and again."""
    return np.resize(random(min(math.prod(shape), PERIOD)), shape)


def _epilogue(
    rng: np.random.Generator,
    call: Call,
    acc: Array,
    weight: Array,
    x_quantizer: Quantizer,
    positive: bool,
) -> tuple[Epilogue, float]:
    """Constants that spread the results over the output's range, and their largest magnitude."""
    w, fmt = call.workload, call.format
    channels = acc.shape[-1]
    weight_scale = _weight_scale(rng, fmt, channels, w.has_weight)
    weight_sum = None
    if fmt.is_integer and w.has_weight:
        weight_sum = weight.reshape(channels, -1).astype(np.int64).sum(1)
    scale = 1.0 if w.has_weight else float(w["k"]) ** -0.5
    sums = acc if weight_sum is None else acc - x_quantizer.zero * weight_sum
    spread = float(np.abs(sums * x_quantizer.scale * weight_scale * scale).max()) or 1.0
    words = w.epilogue.split("+")
    bias = np.full(channels, 3.0 * spread if positive else 0.0)
    if "bias" in words:
        bias += rng.standard_normal(channels) * 0.2 * spread
    act: tuple[float | None, float | None] = (None, None)
    if "relu" in words:
        act = (0.0, None)
    elif "clamp" in words:
        act = (-0.25 * spread, 0.5 * spread)
    out_range = (0, 0)
    out_quantizer = Quantizer()
    if is_integer(call.out):
        encoding = encoding_named(call.out)
        out_range = (int(encoding.qmin), int(encoding.qmax))
        levels = out_range[1] - out_range[0]
        zero = out_range[0] + round(0.4 * levels) if call.out.startswith("u") else 0
        out_quantizer = Quantizer(2.2 * spread / levels, zero)
    e = constants(
        integer=fmt.is_integer,
        channels=channels,
        bias=bias.astype(np.float32),
        x=x_quantizer,
        weight_scale=weight_scale,
        weight_sum=weight_sum,
        out=call.out,
        out_quantizer=out_quantizer,
        out_range=out_range,
        residual=call.residual,
        residual_quantizer=_residual_quantizer(call.residual, spread),
        act_range=act,
        scale=scale,
    )
    return e, spread


def _weight_scale(
    rng: np.random.Generator, fmt: Format, channels: int, per_channel: bool
) -> NDArray[np.float32]:
    """One scale per channel, ones for weights that take none or whose groups have their own, one
    for operand b of a matmul."""
    if not fmt.weight.scaled or fmt.group is not None:
        return np.ones(channels, np.float32)
    scales = (rng.random(channels) + 0.5).astype(np.float32) * _SCALE
    return scales if per_channel else np.full(channels, scales[0])


def _residual_quantizer(encoding: str, spread: float) -> Quantizer:
    if not encoding or not is_integer(encoding):
        return Quantizer()
    top = int(encoding_named(encoding).qmax)
    return Quantizer(1.3 * spread / top, top // 3)


def _residual(
    rng: np.random.Generator, encoding: str, shape: tuple[int, ...], spread: float, positive: bool
) -> Array:
    if is_integer(encoding):
        return _operand(rng, encoding, shape, "random", "")
    numbers = _repeated(rng.standard_normal, shape) * 0.5 * spread
    numbers = np.abs(numbers) if positive else numbers
    return np.asarray(encoding_named(encoding).quantize(numbers.astype(np.float32)))
