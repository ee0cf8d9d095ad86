"""What each Relax operator is in the canonical graph: `OPS`, by operator name.

A converter takes (reader, call, operands, name), adds a node to the draft and returns its tensor;
or None: the call stays what it is. `FOLDED` are computed at once when all operands are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.frontend.builder import Steps
from hwmpq.frontend.relax_reader import (
    NCHW,
    NHWC,
    Converter,
    Pieces,
    Reader,
    Value,
    elementwise,
    is_tensor,
)


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]


def _conv2d(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
    (x, weight), a = args, call.attrs
    layout, kernel = str(a.data_layout), str(a.kernel_layout)
    known = layout in ("NCHW", "NHWC") and str(a.out_layout) == layout and set(kernel) == {*"OIHW"}
    if not (known and is_tensor(x) and isinstance(weight, np.ndarray)):
        return None
    x = r.first(x) if layout == "NHWC" else x
    weight = weight.transpose([kernel.index(axis) for axis in "OIHW"])
    stride, pads, dilation = (_ints(v) for v in (a.strides, a.padding, a.dilation))
    n, _, *size = r.draft.tensors[x]
    ends = zip(size, pads[:2], pads[2:], weight.shape[2:], dilation, stride, strict=True)
    out = [(s + p + q - d * (k - 1) - 1) // t + 1 for s, p, q, k, d, t in ends]
    attrs = {"stride": stride, "padding": pads, "dilation": dilation, "groups": int(a.groups)}
    found = r.layer("conv2d", x, weight, attrs, (n, len(weight), *out))
    return r.last(found, name) if layout == "NHWC" else found


def _matmul(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
    """A linear, where the second operand is a constant matrix."""
    a, b = args
    if not is_tensor(a) or len(r.draft.tensors[a]) < 2:
        return None
    shape = r.draft.tensors[a]
    if isinstance(b, np.ndarray) and b.ndim == 2:
        return r.layer("linear", a, np.ascontiguousarray(b.T), {}, (*shape[:-1], b.shape[1]))
    if not is_tensor(b) or r.draft.tensors[b][:-2] != shape[:-2]:
        return None
    attrs = {"trans_b": False, "scale": 1.0, "residual": False, "act": ""}
    return r.glue(name, "matmul", [a, b], attrs, shape=(*shape[:-1], r.draft.tensors[b][-1]))


def _binary(op: str, turned: Callable[[NDArray[Any]], NDArray[Any]] | None = None) -> Converter:
    """add, mul. turned: what a constant second operand becomes (of a difference, a quotient)."""

    def convert(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
        a, b = args
        if isinstance(a, np.ndarray) and turned is None:
            a, b = b, a
        if not is_tensor(a):
            return None
        shape = r.draft.tensors[a]
        if isinstance(b, np.ndarray):
            if np.broadcast_shapes(shape, b.shape) != shape:
                return None
            value = b if turned is None else turned(b)
            return r.glue(name, op, [a], params={"b": value.astype(np.float32)})
        if turned is not None or not is_tensor(b):
            return None
        return r.glue(name, op, [a, b], shape=np.broadcast_shapes(shape, r.draft.tensors[b]))

    return convert


def _unary(op: str, **attrs: Any) -> Converter:
    def convert(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
        return r.glue(name, op, args, attrs) if is_tensor(*args) else None

    return convert


def _clip(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
    x, *ends = args
    low, high = (float(end.value) for end in ends)
    return r.glue(name, "clamp", [x], {"lo": low, "hi": high}) if is_tensor(x) else None


def _softmax(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
    (x,) = args
    if not is_tensor(x):
        return None
    last = len(r.draft.tensors[x]) - 1
    if int(call.attrs.axis) % (last + 1) != last:
        return None
    return r.glue(name, "softmax", [x], {"axis": last})


def _layer_norm(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
    (x, weight, bias), axes = args, _ints(call.attrs.axes)
    known = isinstance(weight, np.ndarray) and isinstance(bias, np.ndarray)
    if not (is_tensor(x) and known) or axes not in ([-1], [len(r.draft.tensors[x]) - 1]):
        return None
    params = {"weight": weight, "bias": bias}
    return r.glue(name, "layer_norm", [x], {"eps": float(call.attrs.epsilon)}, params)


def _batch_norm(r: Reader, call: Any, args: Sequence[Value], name: str) -> Pieces | None:
    x, *rest = args
    if not (is_tensor(x) and all(isinstance(v, np.ndarray) for v in rest)):
        return None
    if int(call.attrs.axis) != 1 or bool(call.attrs.training):
        return None
    params = dict(zip(("weight", "bias", "mean", "var"), rest, strict=True))
    return Pieces([r.glue(name, "batch_norm", [x], {"eps": float(call.attrs.epsilon)}, params)])


def _pool(op: str) -> Converter:
    def convert(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
        (x,), a = args, call.attrs
        if not is_tensor(x) or bool(a.ceil_mode) or _ints(a.dilation) != [1, 1]:
            return None
        kernel, stride, pads = (_ints(v) for v in (a.pool_size, a.strides, a.padding))
        layout = str(a.layout)
        if layout not in ("NCHW", "NHWC") or (op == "avg_pool2d" and pads[:2] != pads[2:]):
            return None
        x = r.first(x) if layout == "NHWC" else x
        attrs: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": pads, "ceil": False}
        if op == "avg_pool2d":
            attrs["count_include_pad"] = bool(a.count_include_pad)
        n, c, *size = r.draft.tensors[x]
        ends = zip(size, pads[:2], pads[2:], kernel, stride, strict=True)
        out = [(s + p + q - k) // t + 1 for s, p, q, k, t in ends]
        found = r.glue(name, op, [x], attrs, shape=(n, c, *out))
        return r.last(found, name) if layout == "NHWC" else found

    return convert


def _mean(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
    (x,), a = args, call.attrs
    if not is_tensor(x) or a.axis is None:
        return None
    shape, keep = r.draft.tensors[x], bool(a.keepdims)
    axes = sorted(axis % len(shape) for axis in _ints(a.axis))
    if x in r.nchw and axes == [1, 2] and not keep:
        x, axes = r.nchw[x], [2, 3]
        shape = r.draft.tensors[x]
    left = [1 if i in axes else s for i, s in enumerate(shape) if keep or i not in axes]
    return r.glue(name, "mean", [x], {"axes": axes, "keepdim": keep}, shape=left)


def _global_pool(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
    (x,), size, layout = args, call.attrs.output_size, str(call.attrs.layout)
    known = layout in ("NCHW", "NHWC") and size is not None and _ints(size) == [1, 1]
    if not (known and is_tensor(x)):
        return None
    x = r.first(x) if layout == "NHWC" else x
    shape = (*r.draft.tensors[x][:2], 1, 1)
    found = r.glue(name, "mean", [x], {"axes": [2, 3], "keepdim": True}, shape=shape)
    return r.last(found, name) if layout == "NHWC" else found


def _concat(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
    (given,) = args
    if call.attrs.axis is None or not all(is_tensor(p) or isinstance(p, np.ndarray) for p in given):
        return None
    parts = [
        r.constant(f"{name}.part{i}", part) if isinstance(part, np.ndarray) else part
        for i, part in enumerate(given)
    ]
    axis = int(call.attrs.axis) % len(r.draft.tensors[parts[0]])
    if all(part in r.nchw for part in parts):
        return r.last(_joined(r, [r.nchw[part] for part in parts], NHWC[axis], name), name)
    return _joined(r, parts, axis, name)


def _joined(r: Reader, parts: Sequence[Value], axis: int, name: str) -> str:
    shapes = [r.draft.tensors[part] for part in parts]
    whole = sum(shape[axis] for shape in shapes)
    shape = (*shapes[0][:axis], whole, *shapes[0][axis + 1 :])
    return r.glue(name, "concat", parts, {"axis": axis}, shape=shape)


def _pad(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
    (x, *_), a = args, call.attrs
    if not is_tensor(x) or str(a.pad_mode) != "constant" or float(a.pad_value) != 0.0:
        return None
    flat = _ints(a.pad_width)
    return _padded(r, x, list(zip(flat[::2], flat[1::2], strict=True)), name)


def _padded(r: Reader, x: str, pads: Sequence[tuple[int, int]], name: str) -> str:
    last = x in r.nchw
    if last:
        x, pads = r.nchw[x], [pads[axis] for axis in NCHW]
    shape = [s + p + q for s, (p, q) in zip(r.draft.tensors[x], pads, strict=True)]
    found = r.glue(name, "pad", [x], {"pads": pads, "value": 0.0}, shape=shape)
    return r.last(found, name) if last else found


def _view(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
    """reshape, flatten, squeeze, expand_dims: the shape of the result says it all."""
    x = args[0]
    if not is_tensor(x):
        return None
    return r.rearrange(x, [["reshape", _ints(call.ty.shape.values)]], name)


def _permute(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
    (x,), axes = args, call.attrs.axes
    if not is_tensor(x):
        return None
    rank = len(r.draft.tensors[x])
    order = list(reversed(range(rank))) if axes is None else [i % rank for i in _ints(axes)]
    return r.rearrange(x, [["permute", order]], name)


def _broadcast(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
    x, shape = args
    if not (is_tensor(x) and isinstance(shape, tuple)):
        return None
    old = r.draft.tensors[x]
    padded = [1] * (len(shape) - len(old)) + list(old)
    return r.rearrange(x, [["reshape", padded], ["expand", list(shape)]], name)


def _slice(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
    if not is_tensor(args[0]):
        return None
    try:
        axes, starts, ends, *strides = (_ints(getattr(v, "fields", v)) for v in call.args[1:])
    except TypeError:  # computed places
        return None
    steps: Steps = []
    shape = r.draft.tensors[args[0]]
    for i, axis in enumerate(axes):
        stride = strides[0][i] if strides else 1
        start, stop, _ = slice(starts[i], ends[i], stride).indices(shape[axis])
        steps.append(["slice", axis % len(shape), start, stop, stride])
    return r.rearrange(args[0], steps, name) if all(s[-1] > 0 for s in steps) else None


def _function(r: Reader, call: Any, args: Sequence[Value], name: str) -> str | None:
    """A PrimFunc that the ONNX front end makes of a Clip or a Pad."""
    operands = args[1]
    if not isinstance(operands, Pieces) or not is_tensor(operands[0]):
        return None
    function = r.module[call.args[0]]
    kind = type(stored := _stored(function)).__name__
    if kind in ("Max", "Min") and len(operands) == 2:
        return _bound(r, kind, *operands, name)
    if kind == "Call" and stored.op.name == "prim.if_then_else" and len(operands) == 1:
        pads = _pads(function, r.draft.tensors[operands[0]], _ints(call.ty.shape.values))
        return None if pads is None else _padded(r, operands[0], pads, name)
    return None


def _bound(r: Reader, kind: str, x: Value, limit: Value, name: str) -> str | None:
    """The larger, or the smaller, of each element and a number: a lower bound of 0 is a relu; an
    upper one behind it makes a clamp."""
    if not isinstance(limit, np.ndarray) or limit.size != 1:
        return None
    before = r.draft.nodes.get(x)
    if kind == "Max":
        return r.glue(name, "relu", [x]) if float(limit) == 0 else None
    if before is None or before.op != "relu":
        return None
    return r.glue(name, "clamp", before.inputs, {"lo": 0.0, "hi": float(limit)})


def _pads(function: Any, shape: Sequence[int], out: Sequence[int]) -> list[tuple[int, int]] | None:
    """The zeros before and behind each axis, where they are all that a PrimFunc adds to a tensor.

    It moves elements by their places alone, so one run on numbers that all differ tells.
    """
    import tvm

    count = math.prod(shape)
    if len(shape) != len(out) or count >= 1 << np.finfo(np.float32).nmant:
        return None
    x = np.arange(1, count + 1, dtype=np.float32).reshape(shape)
    found = tvm.runtime.tensor(np.zeros(out, np.float32))
    main = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    tvm.compile(main, "llvm")["main"](tvm.runtime.tensor(x), found)
    y = found.numpy()
    first = np.argwhere(y == 1)
    if len(first) != 1:
        return None
    pads = [(int(a), o - s - int(a)) for a, s, o in zip(first[0], shape, out, strict=True)]
    fits = all(behind >= 0 for _, behind in pads)
    return pads if fits and np.array_equal(y, np.pad(x, pads)) else None


def _stored(function: Any) -> Any:
    """What a PrimFunc of nested loops around one store stores; None for any other."""
    part = function.body
    while part is not None and type(part).__name__ != "BufferStore":
        part = getattr(part, "block", getattr(part, "body", None))
    return None if part is None else part.value


OPS: dict[str, Converter] = {
    "relax.nn.conv2d": _conv2d, "relax.matmul": _matmul,
    **{
        f"relax.{name}": elementwise(convert)
        for name, convert in {
            "add": _binary("add"), "multiply": _binary("mul"),
            "subtract": _binary("add", np.negative),
            "divide": _binary("mul", lambda b: 1.0 / b.astype(np.float64)),
            "nn.relu": _unary("relu"), "sigmoid": _unary("sigmoid"), "tanh": _unary("tanh"),
            "nn.silu": _unary("silu"), "nn.gelu": _unary("gelu", approximate="none"),
            "nn.gelu_tanh": _unary("gelu", approximate="tanh"), "clip": _clip,
        }.items()
    },
    "relax.nn.softmax": _softmax, "relax.nn.layer_norm": _layer_norm,
    "relax.nn.batch_norm": _batch_norm, "relax.nn.max_pool2d": _pool("max_pool2d"),
    "relax.nn.avg_pool2d": _pool("avg_pool2d"), "relax.mean": _mean,
    "relax.nn.adaptive_avg_pool2d": _global_pool, "relax.concat": _concat,
    "relax.nn.pad": _pad, "relax.permute_dims": _permute, "relax.broadcast_to": _broadcast,
    "relax.strided_slice": _slice, "relax.call_tir": _function,
    **dict.fromkeys(
        ("relax.reshape", "relax.flatten", "relax.squeeze", "relax.expand_dims"), _view
    ),
}  # fmt: skip

FOLDED: dict[str, Callable[[Any, Sequence[Any]], NDArray[Any]]] = {
    "relax.reshape": lambda call, args: args[0].reshape(args[1]),
    "relax.permute_dims": lambda call, args: args[0].transpose(
        None if call.attrs.axes is None else _ints(call.attrs.axes)
    ),
    "relax.isnan": lambda call, args: np.asarray(np.isnan(args[0])),
    "relax.where": lambda call, args: np.where(*args),
}
