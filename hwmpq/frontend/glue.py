"""Converters of the carried operators: elementwise, normalization, pooling, pad, concat, mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hwmpq.frontend.builder import Builder, Call, Const, Converter, Refusal, Steps, Value
from hwmpq.frontend.layers import _pair


def _number(call: Call, value: object, name: str) -> Const:
    """A Python number as a constant."""
    if not isinstance(value, (int, float)):
        raise Refusal(f"operand of type {type(value).__name__}")
    return Const(torch.tensor(float(value)), f"{call.name}.{name}")


def _binary(b: Builder, call: Call, op: str, x: Value, other: object) -> str:
    """add or mul; a constant operand becomes the params entry b."""
    y = other if isinstance(other, (str, Const)) else _number(call, other, "b")
    if isinstance(x, Const):
        x, y = y, x
    if isinstance(y, str):
        return b.glue(call, op, [b.operand(call, x), y])
    if isinstance(x, str) and np.broadcast_shapes(b.shape(x), b.shape(y)) != b.shape(x):
        return b.glue(call, op, [x, b.operand(call, y)])
    return b.glue(call, op, [b.operand(call, x)], params={"b": b.param(y)})


def _scaled(b: Builder, call: Call, value: object, factor: float) -> object:
    """factor · value, for a number, a constant or a tensor."""
    if factor == 1:
        return value
    if isinstance(value, str):
        c = b.array(f"{call.name}.factor", factor)
        name = f"{call.name}_scaled"
        return b.glue(call, "mul", [value], {}, {"b": c}, b.shape(value), name)
    if isinstance(value, Const):
        return Const(value.value * factor, f"{call.name}.b")
    return value * factor if isinstance(value, (int, float)) else value


def add(b: Builder, call: Call) -> Value:
    other = _scaled(b, call, call["other"], call.get("alpha", 1))
    return _binary(b, call, "add", call["self"], other)


def sub(b: Builder, call: Call) -> Value:
    other = _scaled(b, call, call["other"], -call.get("alpha", 1))
    return _binary(b, call, "add", call["self"], other)


def rsub(b: Builder, call: Call) -> Value:
    if call.get("alpha", 1) != 1:
        raise Refusal("rsub with alpha")
    x = _scaled(b, call, call["self"], -1.0)
    assert isinstance(x, (str, Const))
    return _binary(b, call, "add", x, call["other"])


def mul(b: Builder, call: Call) -> Value:
    return _binary(b, call, "mul", call["self"], call["other"])


def div(b: Builder, call: Call) -> Value:
    other = call["other"]
    if isinstance(other, str):
        raise Refusal("division by a computed tensor")
    value = other.value if isinstance(other, Const) else torch.tensor(float(other))
    return _binary(b, call, "mul", call["self"], Const(1.0 / value.double(), f"{call.name}.b"))


def neg(b: Builder, call: Call) -> Value:
    return _binary(b, call, "mul", call["self"], -1.0)


def unary(op: str) -> Converter:
    def convert(b: Builder, call: Call) -> Value:
        attrs = {"approximate": str(call["approximate"])} if op == "gelu" else {}
        x = call.get("self", call.get("input"))
        return b.glue(call, op, [b.operand(call, x)], attrs)

    return convert


def clamp(b: Builder, call: Call) -> Value:
    """clamp, hardtanh, relu6: a lower bound of 0 alone is relu."""
    low = call.get("min", call.get("min_val"))
    high = call.get("max", call.get("max_val"))
    if call.op == "aten.relu6.default":
        low, high = 0.0, 6.0
    if low == 0 and high is None:
        return b.glue(call, "relu", [call["self"]])
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        raise Refusal("clamp without two constant bounds")
    return b.glue(call, "clamp", [call["self"]], {"lo": float(low), "hi": float(high)})


def softmax(b: Builder, call: Call) -> Value:
    x, rank = call["self"], len(call.shape)
    axis, last = call["dim"] % rank, rank - 1
    if axis == last:
        return b.glue(call, "softmax", [x], {"axis": last})
    axes = list(range(rank))
    axes[axis], axes[last] = last, axis
    turned = b.rearrange(call, x, [["permute", axes]], f"{call.name}_turned")
    shape = b.shape(turned)
    y = b.glue(call, "softmax", [turned], {"axis": last}, {}, shape)
    return b.rearrange(call, y, [["permute", axes]], f"{call.name}_back")


def layer_norm(b: Builder, call: Call) -> Value:
    size = list(call["normalized_shape"])
    weight, bias = call.get("weight"), call.get("bias")
    if size != [call.shape[-1]]:
        raise Refusal(f"layer_norm over {len(size)} axes: only the last one is supported")
    if isinstance(weight, str) or isinstance(bias, str):
        raise Refusal("layer_norm whose weight is computed from the input")
    path = call.path or call.name
    weight = weight or Const(torch.ones(size), f"{path}.weight")
    bias = bias or Const(torch.zeros(size), f"{path}.bias")
    params = {"weight": b.param(weight), "bias": b.param(bias)}
    return b.glue(call, "layer_norm", [call["input"]], {"eps": float(call["eps"])}, params)


def batch_norm(b: Builder, call: Call) -> Value:
    if call.get("training", False):
        raise Refusal("batch_norm in training mode: export after model.eval()")
    roles = {"weight": "weight", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    params = {}
    for role, short in roles.items():
        value = call.get(role)
        if isinstance(value, Const):
            params[short] = b.param(value)
        elif value is not None or short in ("mean", "var"):
            raise Refusal("batch_norm without stored statistics")
    return b.glue(call, "batch_norm", [call["input"]], {"eps": float(call["eps"])}, params)


def _pool(b: Builder, call: Call) -> tuple[dict[str, object], bool]:
    """Attributes of a pooling window, and whether ceil_mode made the result larger."""
    kernel = _pair(call["kernel_size"])
    stride = _pair(call.get("stride") or kernel)
    ph, pw = _pair(call["padding"])
    shape = b.shape(call["self"])
    if len(shape) != 4:
        raise Refusal("pooling of a tensor without batch axis")
    extra = [
        max(0, (out - 1) * s + k - size - 2 * p)
        for out, size, k, s, p in zip(
            call.shape[2:], shape[2:], kernel, stride, (ph, pw), strict=True
        )
    ]
    padding = (ph, pw, ph + extra[0], pw + extra[1])
    attrs = {"kernel": kernel, "stride": stride, "padding": padding, "ceil": False}
    return attrs, any(extra)


def max_pool2d(b: Builder, call: Call) -> Value:
    if _pair(call["dilation"]) != (1, 1):
        raise Refusal("max_pool2d with dilation")
    attrs, _ = _pool(b, call)
    return b.glue(call, "max_pool2d", [call["self"]], attrs)


def avg_pool2d(b: Builder, call: Call) -> Value:
    if call.get("divisor_override"):
        raise Refusal("avg_pool2d with divisor_override")
    attrs, grown = _pool(b, call)
    if grown:
        raise Refusal("avg_pool2d with ceil_mode")
    attrs["count_include_pad"] = bool(call["count_include_pad"])
    return b.glue(call, "avg_pool2d", [call["self"]], attrs)


def adaptive_avg_pool2d(b: Builder, call: Call) -> Value:
    x = call["self"]
    if call.shape[2:] == (1, 1):
        return b.glue(call, "mean", [x], {"axes": (2, 3), "keepdim": True})
    attrs = {**_adaptive(b, call), "count_include_pad": True}
    return b.glue(call, "avg_pool2d", [x], attrs)


def adaptive_max_pool2d(b: Builder, call: Call) -> Value:
    """The values; its second result, the indices, cannot be taken."""
    return b.glue(call, "max_pool2d", [call["self"]], _adaptive(b, call))


def _adaptive(b: Builder, call: Call) -> dict[str, object]:
    """Attributes of the windows that part an image evenly."""
    size, out = b.shape(call["self"])[-2:], call.shape[-2:]
    if len(call.shape) != 4 or size[0] % out[0] or size[1] % out[1]:
        name = call.op.split(".")[1]
        raise Refusal(f"{name} from {size} to {out}: windows of unequal size")
    window = (size[0] // out[0], size[1] // out[1])
    return {"kernel": window, "stride": window, "padding": (0, 0, 0, 0), "ceil": False}


def mean(b: Builder, call: Call) -> Value:
    x = call["self"]
    rank = len(b.shape(x))
    dims = call.get("dim") or range(rank)
    axes = tuple(sorted(d % rank for d in dims))
    return b.glue(call, "mean", [x], {"axes": axes, "keepdim": bool(call.get("keepdim", False))})


def cat(b: Builder, call: Call) -> Value:
    parts = [b.operand(call, value) for value in call["tensors"]]
    return b.glue(call, "concat", parts, {"axis": call["dim"] % len(call.shape)})


def stack(b: Builder, call: Call) -> Value:
    axis = call["dim"] % len(call.shape)
    one: list[int] = [*call.shape[:axis], 1, *call.shape[axis + 1 :]]
    steps: Steps = [["reshape", one]]
    parts = [
        b.rearrange(call, b.operand(call, value), steps, f"{call.name}_part")
        for value in call["tensors"]
    ]
    return b.glue(call, "concat", parts, {"axis": axis})


def pad(b: Builder, call: Call) -> Value:
    """Zero padding; a negative amount cuts off."""
    if str(call.get("mode", "constant")) != "constant" or call.get("value", 0.0) != 0.0:
        raise Refusal("padding other than with zeros")
    x: str = call["self"]
    shape, amounts = b.shape(x), _amounts(call["pad"], len(call.shape))
    cuts: Steps = [
        ["slice", axis, max(0, -before), size - max(0, -after), 1]
        for axis, ((before, after), size) in enumerate(zip(amounts, shape, strict=True))
        if before < 0 or after < 0
    ]
    if cuts:
        x = b.rearrange(call, x, cuts, f"{call.name}_cut")
    pads = tuple((max(0, before), max(0, after)) for before, after in amounts)
    return b.glue(call, "pad", [x], {"pads": pads, "value": 0.0})


def _amounts(flat: Sequence[int], rank: int) -> list[tuple[int, int]]:
    """torch's pad list, last axis first, as (before, after) per axis."""
    pairs = [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]
    return [(0, 0)] * (rank - len(pairs)) + pairs[::-1]


_UNARY = ("relu", "gelu", "silu", "hardswish", "sigmoid", "hardsigmoid", "tanh")

CONVERTERS: dict[str, Converter] = {
    **{f"aten.{name}.default": unary(name) for name in _UNARY},
    **dict.fromkeys(["aten.add.Tensor", "aten.add.Scalar"], add),
    **dict.fromkeys(["aten.sub.Tensor", "aten.sub.Scalar"], sub),
    **dict.fromkeys(["aten.rsub.Tensor", "aten.rsub.Scalar"], rsub),
    **dict.fromkeys(["aten.mul.Tensor", "aten.mul.Scalar"], mul),
    **dict.fromkeys(["aten.div.Tensor", "aten.div.Scalar"], div),
    "aten.neg.default": neg,
    **dict.fromkeys(
        ["aten.clamp.default", "aten.clamp_min.default", "aten.hardtanh.default",
         "aten.relu6.default"], clamp,
    ),
    **dict.fromkeys(["aten.softmax.int", "aten._softmax.default"], softmax),
    "aten.layer_norm.default": layer_norm,
    **dict.fromkeys(
        ["aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default"],
        batch_norm,
    ),
    "aten.max_pool2d.default": max_pool2d,
    "aten.avg_pool2d.default": avg_pool2d,
    "aten.adaptive_avg_pool2d.default": adaptive_avg_pool2d,
    "aten.adaptive_max_pool2d.default": adaptive_max_pool2d,
    **dict.fromkeys(["aten.mean.dim", "aten.mean.default"], mean),
    "aten.cat.default": cat,
    "aten.stack.default": stack,
    **dict.fromkeys(["aten.pad.default", "aten.constant_pad_nd.default"], pad),
}  # fmt: skip
