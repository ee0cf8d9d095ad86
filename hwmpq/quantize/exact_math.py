"""The float glue operators as the compiled kernels compute them, bit by bit, in torch.

The interpreter's operators are torch's own: their polynomials and orders of sums are of nobody's
choosing. Here every step is the step of `hwmpq.kernels.glue` (`vmath`, `rows`, `mean`, `pool`),
with its constants. torch rounds each of its fp32 operations on its own, as the kernels do.

A fused multiply-add is torch's own `addcmul` where that rounds once. No torch function promises it,
but its builds by GCC for x86 do; `fuses` asks the one at hand. Elsewhere it is fp64: the product of
two fp32 numbers is exact there; the sum is rounded to fp64 and then to fp32. This differs from the
one rounding of the hardware only where the fp64 sum was inexact and came to lie on the middle
between two fp32 numbers: about once in 2^29 operations, by one unit in the last place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hwmpq.formats import encoding_named, reciprocal
from hwmpq.graph import Node
from hwmpq.kernels.glue import vmath
from hwmpq.kernels.glue.rows import partial_sums
from hwmpq.quantize import interpret
from hwmpq.quantize.interpret import Op, Param
from hwmpq.requantize import Quantizer

#: Operators of which torch's own function differs from that here by less than
#: CLOSE · (|value| + the number given): five times what was measured.
_ROUGH = {"gelu": 1.0, "silu": 1.0, "sigmoid": 1.0, "tanh": 1.0, "softmax": 0.0}
CLOSE = 4e-6
#: Elements that are computed together: what they need stays near the processor.
_BLOCK = 1 << 16


def apply(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    """The fp32 result of a glue node, bit for bit that of its kernel."""
    return OPS.get(node.op, interpret.apply)(node, args, param)


def encoded(node: Node, args: Sequence[Tensor], param: Param, out: tuple[str, Quantizer]) -> Tensor:
    """The result of a glue node as fp32-held codes of an integer encoding.

    Where torch's own value is not next to the middle of two codes, its code is the code: only the
    others (of a softmax: their rows) are computed step by step, which takes longer.
    """
    encoding, q = encoding_named(out[0]), out[1]

    def encode(value: Tensor) -> Tensor:
        codes: Tensor = encoding.quantize(value, q.scale, q.zero)
        return codes.float()

    if node.op not in _ROUGH:
        return encode(apply(node, args, param))
    x = args[0]
    if _turned(x):
        return encoded(node, [x.permute(0, 2, 3, 1)], param, out).permute(0, 3, 1, 2)
    inverse = float(reciprocal(q.scale))
    limit = 0.5 - CLOSE * _ROUGH[node.op] * inverse
    rough = interpret.apply(node, args, param).contiguous()
    found = torch.empty_like(rough)
    shape = (-1, x.shape[-1]) if node.op == "softmax" else (-1,)
    values, codes, unsure = rough.reshape(shape), found.view(shape), []
    many = max(1, _BLOCK // values[0].numel())
    for start in range(0, len(values), many):
        part = slice(start, start + many)
        steps = values[part] * inverse
        nearest = steps.round()
        apart = (steps - nearest).abs_().add_(steps.abs_(), alpha=CLOSE)
        torch.clamp(nearest.add_(q.zero), encoding.qmin, encoding.qmax, out=codes[part])
        doubtful = ~(apart < limit)  # so that no NaN is let pass
        unsure.append((doubtful.any(-1) if len(shape) > 1 else doubtful).nonzero()[:, 0] + start)
    where = torch.cat(unsure)
    codes[where] = encode(apply(node, [x.reshape(shape)[where]], param))
    return found


def fma(a: Tensor | float, b: Tensor, c: Tensor | float, out: Tensor | None = None) -> Tensor:
    """a · b + c, rounded once (see above). Plain numbers are fp32 numbers; out may be a, b or c."""
    if not fuses():
        found = (b.double() * a + c).float()
        return found if out is None else out.copy_(found)
    c = c if isinstance(c, Tensor) else _scalar(c)
    if isinstance(a, Tensor):
        return torch.addcmul(c, a, b, out=out)
    return torch.add(c, b, alpha=a, out=out)


@cache
def fuses() -> bool:
    """Whether torch's fp32 `addcmul` and `add` with a factor round once, as compiled for this
    processor: in whole vectors and in what is left behind them."""
    generator = torch.Generator().manual_seed(0)
    for size in (*range(1, 80), 4096):
        x, y, z = torch.randn(3, size, generator=generator)
        found = torch.addcmul(z, x, y), torch.add(z[0], x, alpha=float(y[0]))
        exact = x.double() * y + z, x.double() * y[0] + z[0]
        if any(not torch.equal(f, e.float()) for f, e in zip(found, exact, strict=True)):
            return False
    return True


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded: torch's own fp32 square root may be a unit off (a vector library's), and
    no fp64 root of an fp32 number is that close to the middle of two."""
    return x.double().sqrt().float()


def polynomial(x: Tensor, square: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Highest power first: pairs a·x + b, then Horner in x², each a fused multiply-add."""
    numbers = [_f32(value) for value in coefficients]
    rest = iter(numbers)
    if len(numbers) % 2:
        y = torch.full_like(x, next(rest))
    else:
        y = fma(next(rest), x, next(rest))
    for a, b in zip(rest, rest, strict=True):
        pair = fma(a, x, b)
        y = fma(y, square, pair, out=pair)
    return y


def exp(x: Tensor) -> Tensor:
    return exp_within(x.clamp(*(_f32(bound) for bound in vmath.EXP_RANGE)))


def exp_within(x: Tensor) -> Tensor:
    """e^x for x in EXP_RANGE."""
    k = (x * _f32(vmath.LOG2_E)).round_()
    r = x.sub(k, alpha=vmath.LN2[0])  # an exact product: fused or not is the same
    r = fma(-_f32(vmath.LN2[1]), k, r, out=r)
    square = r * r
    y = fma(polynomial(r, square, vmath.EXP), square, r, out=r).add_(1.0)
    y.view(torch.int32).add_(k.int(), alpha=1 << 23)  # y · 2^k, which is a normal number
    return y


def sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + exp(-x))


def gelu(x: Tensor) -> Tensor:
    t = torch.minimum(x, -x).clamp_(min=vmath.TAIL_END)
    above = x.clamp(min=0.0)
    return fma(t, exp_within(polynomial(t, t * t, vmath.TAIL)), above, out=above)


def gelu_tanh(x: Tensor) -> Tensor:
    inner = fma(x * x * _f32(vmath.GELU_CUBE), x, x)
    return x * sigmoid(inner * _f32(vmath.GELU_SLOPE))


def tanh(x: Tensor) -> Tensor:
    one = _f32(vmath.TANH_ONE)
    x = x.clamp(-one, one)
    square = x * x
    fourth = square * square
    above = x * polynomial(square, fourth, vmath.TANH_ABOVE)
    return above / polynomial(square, fourth, vmath.TANH_BELOW)


def hardsigmoid(x: Tensor) -> Tensor:
    return (x + 3.0).clamp(0.0, 6.0) / 6.0


def hardswish(x: Tensor) -> Tensor:
    return x * (x + 3.0).clamp(0.0, 6.0) / 6.0


def summed(x: Tensor) -> Tensor:
    """The sum over the first axis, in the order that `kernels.glue.rows` defines."""
    count = partial_sums(len(x))
    rest = len(x) % count
    sums = x[:count].clone()
    for first in range(count, len(x) - rest, count):
        sums += x[first : first + count]
    if rest:
        sums[count - rest :] += x[len(x) - rest :]
    while len(sums) > 1:
        half = len(sums) // 2
        sums = sums[:half] + sums[half:]
    return sums[0]


def _row_sums(x: Tensor) -> Tensor:
    return summed(x.movedim(-1, 0)).unsqueeze(-1)


def softmax(x: Tensor) -> Tensor:
    """Over the last axis."""
    distance = x - x.amax(-1, keepdim=True)
    shares = exp_within(distance.clamp_(min=_f32(vmath.EXP_RANGE[0])))
    return shares.mul_(1.0 / _row_sums(shares))


def _softmax(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    return _in_blocks(softmax, args[0], args[0].shape[-1])


def _layer_norm(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    x, size = args[0], float(args[0].shape[-1])
    weight, bias = param(node.params["weight"]), param(node.params["bias"])
    distance = x - _row_sums(x) / size
    variance = _row_sums(distance * distance) / size
    factor = 1.0 / sqrt(variance + _f32(node.attrs["eps"]))
    return distance * factor * weight + bias


def _mean(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    """The terms are in the order of the axes."""
    x = args[0]
    axes = sorted(a % x.ndim for a in node.attrs["axes"])
    kept = [a for a in range(x.ndim) if a not in axes]
    terms = x.permute(*axes, *kept).flatten(0, len(axes) - 1) if axes else x[None]
    mean = summed(terms) / float(len(terms))
    if node.attrs["keepdim"]:
        mean = mean.reshape([1 if a in axes else x.shape[a] for a in range(x.ndim)])
    return mean


def _avg_pool2d(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    """One pixel of the window after the other; those outside add 0."""
    top, left, bottom, right = node.attrs["padding"]
    (kh, kw), (sh, sw) = node.attrs["kernel"], node.attrs["stride"]
    x = F.pad(args[0], (left, right, top, bottom))
    height, width = (x.shape[2] - kh) // sh + 1, (x.shape[3] - kw) // sw + 1

    def windows(images: Tensor) -> Tensor:
        acc: Tensor | None = None
        for i, j in itertools.product(range(kh), range(kw)):
            y = images[:, :, i : i + (height - 1) * sh + 1 : sh, j : j + (width - 1) * sw + 1 : sw]
            acc = y if acc is None else acc + y
        assert acc is not None
        return acc

    if node.attrs["count_include_pad"]:
        return windows(x) / float(kh * kw)
    ones = torch.ones_like(args[0][:1, :1])
    return windows(x) / windows(F.pad(ones, (left, right, top, bottom)))


def _unary(function: Callable[[Tensor], Tensor]) -> Op:
    return lambda node, args, param: _in_blocks(function, args[0])


def _gelu(node: Node, args: Sequence[Tensor], param: Param) -> Tensor:
    plain = node.attrs.get("approximate", "none") == "none"
    return _in_blocks(gelu if plain else gelu_tanh, args[0])


#: Operators whose torch counterpart is not the kernel's arithmetic; the others are exact.
OPS: dict[str, Op] = {
    "gelu": _gelu,
    "silu": _unary(lambda x: x * sigmoid(x)),
    "hardswish": _unary(hardswish),
    "hardsigmoid": _unary(hardsigmoid),
    "sigmoid": _unary(sigmoid),
    "tanh": _unary(tanh),
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "mean": _mean,
    "avg_pool2d": _avg_pool2d,
}


@cache
def _scalar(value: float) -> Tensor:
    """As a tensor, which takes longer to make than to add to thousands of elements."""
    return torch.tensor(value)


def _f32(value: float) -> float:
    """The fp32 number that a kernel's constant is."""
    return float(np.float32(value))


def _in_blocks(function: Callable[[Tensor], Tensor], x: Tensor, row: int = 1) -> Tensor:
    """A function of single elements, or of rows of the last axis; the result lies in memory as x
    does."""
    if x.numel() <= _BLOCK:
        return function(x)
    if row == 1 and _turned(x):
        return _in_blocks(function, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    flat = x.reshape(-1, row) if row > 1 else x.reshape(-1)
    parts = torch.split(flat, max(1, _BLOCK // row))
    return torch.cat([function(part) for part in parts]).reshape(x.shape)


def _turned(x: Tensor) -> bool:
    """Whether an image lies channels-last."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return last and not x.is_contiguous()
