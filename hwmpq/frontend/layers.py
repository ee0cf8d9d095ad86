"""Converters of the operators that take a number format: convolutions, linears, matmuls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from hwmpq.frontend.builder import Builder, Call, Const, Converter, Refusal, Value, same_view
from hwmpq.graph import Node


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value if len(value) == 2 else (value[0], value[0])
    return int(first), int(second)


def conv2d(b: Builder, call: Call) -> Value:
    x, weight, bias = call.get("input"), call["weight"], call.get("bias")
    if call.get("transposed", False):
        raise Refusal("transposed convolution")
    if not isinstance(weight, Const) or isinstance(bias, str):
        raise Refusal("convolution whose weight is computed from the input")
    if weight.value.ndim != 4:
        raise Refusal(f"{weight.value.ndim - 2}d convolution: only 2d is supported")
    if len(b.shape(x)) != 4:
        raise Refusal("convolution of a tensor without batch axis")
    dilation, stride = _pair(call["dilation"]), _pair(call["stride"])
    padding = call["padding"]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.value.shape[2:], strict=True)]
        pads = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    else:
        ph, pw = (0, 0) if padding == "valid" else _pair(padding)
        pads = (ph, pw, ph, pw)
    attrs = {
        "stride": stride, "padding": pads, "dilation": dilation, "groups": int(call["groups"]),
    }  # fmt: skip
    return b.layer(call, "conv2d", b.operand(call, x), weight, bias, attrs)


def linear(b: Builder, call: Call) -> Value:
    weight, bias = call["weight"], call.get("bias")
    if not isinstance(weight, Const) or isinstance(bias, str):
        raise Refusal("linear whose weight is computed from the input")
    if weight.value.ndim != 2 or len(call.shape) < 2:
        raise Refusal("linear of a vector")
    return b.layer(call, "linear", b.operand(call, call["input"]), weight, bias, {})


def _transposed(b: Builder, matrix: Const) -> Const:
    """A constant [k, n] as a linear's weight [n, k]; a stored tensor `w` used as `w.t()` is `w`."""
    weight = matrix.value.t().contiguous()
    for name, stored in b.parameters.items():
        if same_view(stored, matrix.value.t()):
            return Const(stored, name, stored=True)
    return Const(weight, matrix.name, stored=matrix.stored)


def matmul(b: Builder, call: Call) -> Value:
    """matmul, mm, bmm: a linear when the second operand is a constant matrix."""
    left, right = call["self"], call.get("other", call.get("mat2"))
    return _product(b, call, left, right)


def _product(b: Builder, call: Call, left: Value, right: Value, bias: Const | None = None) -> str:
    if len(b.shape(left)) < 2 or len(b.shape(right)) < 2:
        raise Refusal("matmul with a vector")
    if isinstance(right, Const) and right.value.ndim == 2:
        shape = (*b.shape(left)[:-1], right.value.shape[1])
        weight = _transposed(b, right)
        return b.layer(call, "linear", b.operand(call, left), weight, bias, {}, shape)
    return attach_matmul(b, call, b.operand(call, left), b.operand(call, right))


def attach_matmul(
    b: Builder, call: Call, x: str, y: str, trans_b: bool = False, scale: float = 1.0
) -> str:
    """Append a matmul [..., m, k] × [..., k, n]; batch axes that differ are expanded first."""
    (*batch_x, m, _), (*batch_y, k, n) = b.shape(x), b.shape(y)
    if trans_b:
        k, n = n, k
    batch = list(np.broadcast_shapes(tuple(batch_x), tuple(batch_y)))
    x, y = _batched(b, call, x, batch), _batched(b, call, y, batch)
    attrs = {"trans_b": trans_b, "scale": scale, "residual": False, "act": ""}
    name = b.draft.glue_name(f"{call.name}_product")
    node = Node(name, "matmul", (x, y), attrs, {}, call.source)
    return b.draft.add(node, (*batch, m, n), call.path)


def _batched(b: Builder, call: Call, x: str, batch: list[int]) -> str:
    *old, rows, cols = b.shape(x)
    if old == batch:
        return x
    padded = [1] * (len(batch) - len(old)) + list(old)
    steps = [["reshape", [*padded, rows, cols]], ["expand", [*batch, rows, cols]]]
    return b.rearrange(call, x, steps, f"{call.name}_expand")


def addmm(b: Builder, call: Call) -> Value:
    """beta·self + alpha·(mat1 @ mat2): a linear with bias when self and mat2 are constants."""
    if call["beta"] != 1 or call["alpha"] != 1:
        raise Refusal("addmm with alpha or beta")
    bias, right = call["self"], call["mat2"]
    fits = isinstance(bias, Const) and bias.value.shape == b.shape(right)[1:]
    if fits and isinstance(right, Const):
        return _product(b, call, call["mat1"], right, bias)
    product = _product(b, call, call["mat1"], right)
    return _plus(b, call, product, bias)


def baddbmm(b: Builder, call: Call) -> Value:
    x, y = b.operand(call, call["batch1"]), b.operand(call, call["batch2"])
    product = attach_matmul(b, call, x, y, scale=float(call["alpha"]))
    if call["beta"] == 0:
        return product
    if call["beta"] != 1:
        raise Refusal("baddbmm with beta other than 0 and 1")
    return _plus(b, call, product, call["self"])


def _plus(b: Builder, call: Call, x: str, other: Value) -> str:
    if isinstance(other, Const):
        return b.glue(call, "add", [x], params={"b": b.param(other)})
    return b.glue(call, "add", [x, b.operand(call, other)])


def attention(b: Builder, call: Call) -> Value:
    """scaled_dot_product_attention: q kᵀ · scale [+ mask], softmax, times v."""
    mask = call.get("attn_mask")
    if call["is_causal"] or call.get("enable_gqa", False) or call["dropout_p"]:
        raise Refusal("attention that is causal, grouped or drops out")
    if isinstance(mask, Const) and mask.value.dtype == torch.bool:
        raise Refusal("attention with a boolean mask: use an additive float mask")
    query, key, value = (b.operand(call, call[x]) for x in ("query", "key", "value"))
    scale = call.get("scale", 1.0 / math.sqrt(b.shape(query)[-1]))
    logits = attach_matmul(b, call, query, key, trans_b=True, scale=float(scale))
    shape = b.shape(logits)
    if mask is not None:
        inputs = [logits] if isinstance(mask, Const) else [logits, b.operand(call, mask)]
        params = {"b": b.param(mask)} if isinstance(mask, Const) else {}
        logits = b.glue(call, "add", inputs, {}, params, shape, f"{call.name}_mask")
    weights = b.glue(
        call, "softmax", [logits], {"axis": len(shape) - 1}, {}, shape, f"{call.name}_softmax"
    )
    return attach_matmul(b, call, weights, value)


CONVERTERS: dict[str, Converter] = {
    **dict.fromkeys(
        ["aten.conv2d.default", "aten.conv2d.padding", "aten.convolution.default"], conv2d
    ),
    "aten.linear.default": linear,
    **dict.fromkeys(["aten.matmul.default", "aten.mm.default", "aten.bmm.default"], matmul),
    "aten.addmm.default": addmm,
    "aten.baddbmm.default": baddbmm,
    "aten.scaled_dot_product_attention.default": attention,
}

#: what cannot be taken, and why, where the bare name would not tell
REASONS = {
    **dict.fromkeys(["aten.conv1d.default", "aten.conv1d.padding"], "1d convolution"),
    **dict.fromkeys(["aten.conv3d.default", "aten.conv3d.padding"], "3d convolution"),
    **dict.fromkeys(
        ["aten.conv_transpose1d.default", "aten.conv_transpose2d.input",
         "aten.conv_transpose3d.input"], "transposed convolution",
    ),
    **dict.fromkeys(
        [f"aten.upsample_{kind}.vec" for kind in ("linear1d", "bilinear2d", "bicubic2d")]
        + ["aten._upsample_bilinear2d_aa.vec", "aten._upsample_bicubic2d_aa.vec",
           "aten.upsample_trilinear3d.vec"],
        "interpolating resize: only mode 'nearest' by whole factors is supported",
    ),
    **dict.fromkeys(
        ["aten.topk.default", "aten.sort.default", "aten.sort.stable", "aten.max.dim",
         "aten.min.dim", "aten.argmax.default", "aten.argmin.default", "aten.argsort.default"],
        "sorting and searching are not supported: end the model at its operand",
    ),
    **dict.fromkeys(
        ["aten.group_norm.default", "aten.instance_norm.default"],
        "statistics of the input over several axes: only batch_norm and layer_norm are supported",
    ),
}  # fmt: skip
