"""What each ONNX operator is in torch: `OPS`, by operator name, for opset 13 and later.

A function takes the node's attributes, then its inputs: tensors, None where one is left out, and
plain Python values (numbers, lists) for the inputs named in `static`, which must be constant.
Source of every meaning: the ONNX operator reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hwmpq.frontend.builder import Refusal

Attrs = Mapping[str, Any]
#: A constant of one element, with any number of axes.
Number = float | list[Any] | None


@dataclass(frozen=True)
class Op:
    """static: positions of the inputs that must be constant. constant_only: no layer or glue node
    stands for it, so that all of its inputs must be constant."""

    function: Callable[..., Any]
    static: tuple[int, ...] = ()
    constant_only: bool = False


def _pads(a: Attrs, x: Tensor, kernel: Sequence[int]) -> tuple[int, int, int, int]:
    """top, left, bottom, right of a window's padding."""
    if len(kernel) != 2:
        raise Refusal(f"{len(kernel)}d window: only 2d is supported")
    kind = a.get("auto_pad", b"NOTSET").decode()
    if kind == "NOTSET":
        top, left, bottom, right = a.get("pads", (0, 0, 0, 0))
        return top, left, bottom, right
    if kind == "VALID":
        return 0, 0, 0, 0
    total = []
    for axis, size in enumerate(x.shape[2:]):
        stride = a.get("strides", (1, 1))[axis]
        reach = (kernel[axis] - 1) * a.get("dilations", (1, 1))[axis] + 1
        total.append(max((-(-size // stride) - 1) * stride + reach - size, 0))
    less = [amount // 2 for amount in total]
    more = [amount - half for amount, half in zip(total, less, strict=True)]
    first, last = (less, more) if kind == "SAME_UPPER" else (more, less)
    return first[0], first[1], last[0], last[1]


def _conv(a: Attrs, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    top, left, bottom, right = _pads(a, x, weight.shape[2:])
    padding = (top, left)
    if padding != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    stride, dilation = a.get("strides", (1, 1)), a.get("dilations", (1, 1))
    return F.conv2d(x, weight, bias, stride, padding, dilation, a.get("group", 1))


def _gemm(a: Attrs, x: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    if a.get("alpha", 1.0) != 1 or (c is not None and a.get("beta", 1.0) != 1):
        raise Refusal("alpha or beta other than 1")
    left = x.T if a.get("transA", 0) else x
    if c is None or c.ndim == 1:
        return F.linear(left, b if a.get("transB", 0) else b.T, c)
    return left @ (b.T if a.get("transB", 0) else b) + c


def _window(a: Attrs, x: Tensor) -> tuple[Any, Any, tuple[int, int, int, int]]:
    kernel = a["kernel_shape"]
    pads = _pads(a, x, kernel)
    if tuple(a.get("dilations", (1, 1))) != (1, 1):
        raise Refusal("pooling with dilation")
    return kernel, a.get("strides", (1, 1)), pads


def _max_pool(a: Attrs, x: Tensor) -> Tensor:
    """Padding that is larger at the end is what torch calls ceil_mode, where it is."""
    kernel, stride, (top, left, bottom, right) = _window(a, x)
    larger = (bottom, right) != (top, left)
    found = F.max_pool2d(x, kernel, stride, (top, left), 1, larger or bool(a.get("ceil_mode", 0)))
    ends = zip(x.shape[2:], (top + bottom, left + right), kernel, stride, strict=True)
    if larger and found.shape[2:] != tuple((n + p - k) // s + 1 for n, p, k, s in ends):
        raise Refusal(f"max pooling padded by {(top, left, bottom, right)}")
    return found


def _avg_pool(a: Attrs, x: Tensor) -> Tensor:
    kernel, stride, (top, left, bottom, right) = _window(a, x)
    counted, padding = bool(a.get("count_include_pad", 0)), (top, left)
    if padding != (bottom, right):
        if not counted:
            raise Refusal("average pooling padded unevenly, with the padding not counted")
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    return F.avg_pool2d(x, kernel, stride, padding, bool(a.get("ceil_mode", 0)), counted)


def _batch_norm(
    a: Attrs, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    if a.get("training_mode", 0):
        raise Refusal("training mode")
    return F.batch_norm(x, mean, var, scale, shift, False, 0.0, a.get("epsilon", 1e-5))


def _layer_norm(a: Attrs, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    size = x.shape[a.get("axis", -1) % x.ndim :]
    if tuple(scale.shape) != tuple(size):
        raise Refusal(f"scale of shape {tuple(scale.shape)}")
    return F.layer_norm(x, size, scale, shift, a.get("epsilon", 1e-5))


def _clip(a: Attrs, x: Tensor, low: Number = None, high: Number = None) -> Tensor:
    return torch.clamp(x, _number(low), _number(high))


def _number(value: Number) -> float | None:
    while isinstance(value, list):
        (value,) = value
    return value


def _hard_sigmoid(a: Attrs, x: Tensor) -> Tensor:
    alpha, beta = a.get("alpha", 0.2), a.get("beta", 0.5)
    if abs(alpha - 1 / 6) > 1e-6 or beta != 0.5:
        raise Refusal(f"alpha {alpha:g} and beta {beta:g}: only 1/6 and 0.5 are supported")
    return F.hardsigmoid(x)


def _div(a: Attrs, x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _reshape(a: Attrs, x: Tensor, shape: list[int]) -> Tensor:
    """0 keeps a size, -1 is what is left."""
    if not a.get("allowzero", 0):
        shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return x.reshape(shape)


def _flatten(a: Attrs, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    if axis % max(x.ndim, 1) == 1:
        return x.flatten(1)
    return x.reshape(int(torch.Size(x.shape[:axis]).numel()), -1)


def _transpose(a: Attrs, x: Tensor) -> Tensor:
    return x.permute(a.get("perm", tuple(reversed(range(x.ndim)))))


def _squeeze(a: Attrs, x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(a: Attrs, x: Tensor, axes: list[int]) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _slice(
    a: Attrs, x: Tensor, starts: list[int], ends: list[int],
    axes: list[int] | None = None, steps: list[int] | None = None,
) -> Tensor:  # fmt: skip
    axes, steps = axes or list(range(len(starts))), steps or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        first, last, _ = slice(start, end, step).indices(x.shape[axis])
        if step > 0:
            x = x[(slice(None),) * (axis % x.ndim) + (slice(first, last, step),)]
        else:
            x = x.index_select(axis, torch.tensor(range(first, last, step)))
    return x


def _split(a: Attrs, x: Tensor, sizes: list[int] | None = None) -> tuple[Tensor, ...]:
    """Without sizes: equal parts, of which the last may be smaller."""
    axis = a.get("axis", 0)
    total = x.shape[axis]
    size = -(-total // a["outputs"])
    sizes = sizes or [min(size, total - start) for start in range(0, total, size)]
    starts = accumulate([0, *sizes])
    return tuple(x.narrow(axis, start, n) for start, n in zip(starts, sizes, strict=False))


def _pad(
    a: Attrs, x: Tensor, pads: list[int], value: Number = None,
    axes: list[int] | None = None,
) -> Tensor:  # fmt: skip
    if a.get("mode", b"constant") != b"constant":
        raise Refusal(f"padding mode {a['mode'].decode()}")
    amounts, half = [(0, 0)] * x.ndim, len(pads) // 2
    for i, axis in enumerate(axes or range(x.ndim)):
        amounts[axis] = (pads[i], pads[half + i])
    flat = [amount for pair in reversed(amounts) for amount in pair]
    return F.pad(x, flat, value=_number(value) or 0.0)


def _gather(a: Attrs, x: Tensor, index: int | list[int]) -> Tensor:
    """An index, or neighbours in order."""
    axis = a.get("axis", 0)
    if isinstance(index, int):
        return x.select(axis, index)
    size = x.shape[axis]
    places = [i % size for i in index] if all(isinstance(i, int) for i in index) else []
    if not places or places != list(range(places[0], places[0] + len(places))):
        raise Refusal("an index that is neither one place nor neighbours in order")
    return x.narrow(axis, places[0], len(places))


def _reduce_mean(a: Attrs, x: Tensor, axes: list[int] | None = None) -> Tensor:
    where = axes or a.get("axes") or ()
    if not where and a.get("noop_with_empty_axes", 0):
        return x
    return x.mean(tuple(where) or tuple(range(x.ndim)), keepdim=bool(a.get("keepdims", 1)))


def _expand(a: Attrs, x: Tensor, shape: list[int]) -> Tensor:
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(shape)))


def _cast(a: Attrs, x: Tensor) -> Tensor:
    """By the numbers of ONNX's TensorProto.DataType."""
    kinds = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 11: torch.float64}
    if a["to"] not in kinds:
        raise Refusal(f"conversion to type {a['to']}")
    return x.to(kinds[a["to"]])


def _constant_of_shape(a: Attrs, shape: list[int]) -> Tensor:
    value: Tensor = a.get("value", torch.zeros(1))
    return value.reshape(()).expand(shape).clone()


def _plain(function: Callable[..., Tensor]) -> Op:
    """An operator without attributes."""
    return Op(lambda a, *inputs: function(*inputs))


OPS = {
    "Conv": Op(_conv),
    "Gemm": Op(_gemm),
    "MatMul": _plain(torch.matmul),
    "BatchNormalization": Op(_batch_norm),
    "LayerNormalization": Op(_layer_norm),
    "Relu": _plain(F.relu),
    "Sigmoid": _plain(torch.sigmoid),
    "Tanh": _plain(torch.tanh),
    "Silu": _plain(F.silu),
    "Gelu": Op(lambda a, x: F.gelu(x, approximate=a.get("approximate", b"none").decode())),
    "HardSwish": _plain(F.hardswish),
    "HardSigmoid": Op(_hard_sigmoid),
    "Clip": Op(_clip, (1, 2)),
    "Softmax": Op(lambda a, x: torch.softmax(x, a.get("axis", -1))),
    "Add": _plain(torch.add),
    "Sub": _plain(torch.sub),
    "Mul": _plain(torch.mul),
    "Div": Op(_div),
    "Neg": _plain(torch.neg),
    "MaxPool": Op(_max_pool),
    "AveragePool": Op(_avg_pool),
    "GlobalAveragePool": _plain(lambda x: F.adaptive_avg_pool2d(x, 1)),
    "GlobalMaxPool": _plain(lambda x: F.adaptive_max_pool2d(x, 1)),
    "ReduceMean": Op(_reduce_mean, (1,)),
    "Flatten": Op(_flatten),
    "Reshape": Op(_reshape, (1,)),
    "Transpose": Op(_transpose),
    "Squeeze": Op(_squeeze, (1,)),
    "Unsqueeze": Op(_unsqueeze, (1,)),
    "Slice": Op(_slice, (1, 2, 3, 4)),
    "Split": Op(_split, (1,)),
    "Concat": Op(lambda a, *parts: torch.cat(parts, a["axis"])),
    "Pad": Op(_pad, (1, 2, 3)),
    "Gather": Op(_gather, (1,)),
    "Expand": Op(_expand, (1,)),
    "Identity": _plain(lambda x: x),
    "Dropout": Op(lambda a, x, *_: x),
    "Cast": Op(_cast),
    "Constant": Op(lambda a: a["value"]),
    "ConstantOfShape": Op(_constant_of_shape, (0,)),
    **{
        name: Op(lambda a, *inputs, run=run: run(*inputs), constant_only=True)
        for name, run in (("Sqrt", torch.sqrt), ("Pow", torch.pow), ("Floor", torch.floor),
                          ("Reciprocal", torch.reciprocal), ("Equal", torch.eq),
                          ("Where", torch.where), ("Mod", torch.remainder))
    },
}  # fmt: skip
