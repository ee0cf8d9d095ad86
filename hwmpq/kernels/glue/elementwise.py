"""Operators on single elements: activations, clamps, add, mul, batch_affine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hwmpq.kernels.codes import INVERSE, RATIO, ZERO, from_f32, memory_dtype, quantize, to_f32
from hwmpq.kernels.glue import vmath
from hwmpq.kernels.glue.frame import Frame, dtype_lanes
from hwmpq.kernels.glue.walk import Space, walk
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.storage import is_integer

#: (ir, x, attrs, lanes) -> the function of fp32 values.
Function = Callable[[IR, Expr, dict[str, Any], int], Expr]


def _gelu(ir: IR, x: Expr, attrs: dict[str, Any], lanes: int) -> Expr:
    plain = attrs.get("approximate", "none") == "none"
    return (vmath.gelu if plain else vmath.gelu_tanh)(ir, x, lanes)


def _ramp(ir: IR, x: Expr, lanes: int) -> Expr:
    """clamp(x + 3, 0, 6)."""
    return vmath.between(ir, x + vmath.constant(ir, 3.0, lanes), 0.0, 6.0, lanes)


def _hardsigmoid(ir: IR, x: Expr, attrs: dict[str, Any], lanes: int) -> Expr:
    return _ramp(ir, x, lanes) / vmath.constant(ir, 6.0, lanes)


def _hardswish(ir: IR, x: Expr, attrs: dict[str, Any], lanes: int) -> Expr:
    x = ir.let(x)
    return x * _ramp(ir, x, lanes) / vmath.constant(ir, 6.0, lanes)


def _silu(ir: IR, x: Expr, attrs: dict[str, Any], lanes: int) -> Expr:
    x = ir.let(x)
    return x * vmath.sigmoid(ir, x, lanes)


def _relu(ir: IR, x: Expr, attrs: dict[str, Any], lanes: int) -> Expr:
    return ir.maximum(x, vmath.constant(ir, 0.0, lanes))


def _clamp(ir: IR, x: Expr, attrs: dict[str, Any], lanes: int) -> Expr:
    return vmath.between(ir, x, attrs["lo"], attrs["hi"], lanes)


_FUNCTIONS: dict[str, Function] = {
    "gelu": _gelu,
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
    "silu": _silu,
    "relu": _relu,
    "clamp": _clamp,
    "sigmoid": lambda ir, x, attrs, lanes: vmath.sigmoid(ir, x, lanes),
    "tanh": lambda ir, x, attrs, lanes: vmath.tanh(ir, x, lanes),
}


def _space(frame: Frame, extra: Sequence[tuple[int, ...]] = ()) -> Space:
    """The result's elements in memory order; buffers: inputs, extra (strides), out."""
    out = frame.call.out
    rows = [x.broadcast(out.shape) for x in frame.call.inputs] + list(extra) + [out.strides]
    return Space.of(out.physical, [[row[axis] for axis in out.order] for row in rows])


def unary(frame: Frame, function: Function) -> None:
    """The function of every element, in fp32."""
    attrs = frame.call.attributes

    def body(at: list[Expr], steps: tuple[int, ...], lanes: int) -> None:
        x = frame.value(0, at[0], lanes, steps[0])
        frame.put(at[1], function(frame.ir, x, attrs, lanes), lanes, steps[1])

    walk(frame.ir, _space(frame), frame.wide, frame.call, body)


def bounded(frame: Frame, function: Function) -> None:
    """relu and clamp: on codes, between the codes of the bounds, when the quantizer is shared."""
    call, ir = frame.call, frame.ir
    encoding = call.out.encoding
    if not (is_integer(encoding) and call.same_codes(0)):
        unary(frame, function)
        return
    dtype = memory_dtype(encoding)

    def code(value: float) -> Expr:
        number = ir.const(value, "float32")
        q = quantize(ir, number, frame.quantizers[-1], encoding, 1, frame.bounds)
        return ir.let(from_f32(ir, q, encoding, 1))

    attrs = call.attributes
    low = code(attrs.get("lo", 0.0))
    high = code(attrs["hi"]) if "hi" in attrs else None

    def body(at: list[Expr], steps: tuple[int, ...], lanes: int) -> None:
        x = frame.fetch(frame.inputs[0], at[0], lanes, steps[0])
        if high is not None:
            x = ir.minimum(x, ir.broadcast(high, lanes))
        x = ir.maximum(x, ir.broadcast(low, lanes))
        ir.store(frame.out, at[1], x, lanes, steps[1])

    walk(ir, _space(frame), dtype_lanes(call, dtype), call, body)


def _with_constant(frame: Frame, join: Callable[[Expr, Expr], Expr]) -> None:
    """One tensor and the parameter b, which lies like the result."""

    def body(at: list[Expr], steps: tuple[int, ...], lanes: int) -> None:
        b = frame.fetch(frame.params["b"], at[1], lanes, steps[1])
        frame.put(at[2], join(frame.value(0, at[0], lanes, steps[0]), b), lanes, steps[2])

    space = _space(frame, [frame.call.out.strides])
    walk(frame.ir, space, frame.wide, frame.call, body)


def binary(frame: Frame, join: Callable[[Expr, Expr], Expr]) -> None:
    """Two tensors, or one and a constant, joined as fp32 values."""
    if len(frame.call.inputs) == 1:
        _with_constant(frame, join)
        return

    def body(at: list[Expr], steps: tuple[int, ...], lanes: int) -> None:
        a, b = (frame.value(i, at[i], lanes, steps[i]) for i in range(2))
        frame.put(at[2], join(a, b), lanes, steps[2])

    walk(frame.ir, _space(frame), frame.wide, frame.call, body)


def add(frame: Frame) -> None:
    """Two tensors with an integer result are added in its steps, as `quantize/glue.py` says."""
    call, ir = frame.call, frame.ir
    if len(call.inputs) == 1 or not is_integer(call.out.encoding):
        binary(frame, lambda a, b: a + b)
        return

    def term(index: int, at: Expr, lanes: int, stride: int) -> Expr:
        """One operand in steps of the result: rint of a single fp32 product."""
        if stride == 0:
            return ir.broadcast(term(index, at, 1, 1), lanes)
        encoding = call.inputs[index].encoding
        x = to_f32(ir, frame.fetch(frame.inputs[index], at, lanes, stride), encoding, lanes)
        if not is_integer(encoding):
            return ir.rint(x * ir.broadcast(frame.scalar(INVERSE), lanes), lanes)
        zero, ratio = (_scalar(ir, frame.quantizers[index], s, lanes) for s in (ZERO, RATIO))
        return ir.rint((x - zero) * ratio, lanes)

    low, high = frame.bounds

    def joined(a: Expr, b: Expr, lanes: int) -> Expr:
        if call.avx2 and lanes >= 8:
            return frame.packed(a + b, lanes)
        q = a + b + ir.broadcast(frame.scalar(ZERO), lanes)
        return from_f32(ir, vmath.between(ir, q, low, high, lanes), call.out.encoding, lanes)

    def body(at: list[Expr], steps: tuple[int, ...], lanes: int) -> None:
        a, b = (term(i, at[i], lanes, steps[i]) for i in range(2))
        ir.store(frame.out, at[2], joined(a, b, lanes), lanes, steps[2])

    walk(ir, _space(frame), frame.wide, call, body)


def _scalar(ir: IR, vector: Buffer, index: int, lanes: int) -> Expr:
    return ir.broadcast(ir.load(vector, index), lanes)


def batch_affine(frame: Frame) -> None:
    """x · scale + shift per channel, rounded twice as torch does."""
    ir, shape = frame.ir, frame.call.out.shape
    along = (0, 1) + (0,) * (len(shape) - 2)

    def body(at: list[Expr], steps: tuple[int, ...], lanes: int) -> None:
        scale = frame.fetch(frame.params["scale"], at[1], lanes, steps[1])
        shift = frame.fetch(frame.params["shift"], at[1], lanes, steps[1])
        product = ir.fence(frame.value(0, at[0], lanes, steps[0]) * scale, lanes)
        frame.put(at[2], product + shift, lanes, steps[2])

    walk(ir, _space(frame, [along]), frame.wide, frame.call, body)


_BOUNDED = ("relu", "clamp")

EMITTERS: dict[str, Callable[[Frame], None]] = {
    **{
        name: partial(bounded if name in _BOUNDED else unary, function=function)
        for name, function in _FUNCTIONS.items()
    },
    "add": add,
    "mul": partial(binary, join=lambda a, b: a * b),
    "batch_affine": batch_affine,
}
