"""Glue operators on codes: the rules that the compiled glue kernels follow bit by bit.

q, a, b: codes; z, s: zero point and scale of a tensor in its encoding; inv = f32(1) / f32(s);
every operation is one fp32 operation and every rint rounds halves to even.

  max_pool2d, rearrange   the operator on the codes; padding of a pool never wins
  concat                  the operator on the codes: all parts share one quantizer
  pad                     the codes of the padding are z
  relu                    max(q, z)
  clamp                   clamp(q, code(lo), code(hi)), code(v) = clamp(rint(f32(v) · inv) + z, qmin, qmax)
  add of two tensors      clamp(t(a) + t(b) + z, qmin, qmax); z, inv, qmin, qmax are the result's, and
                          an integer operand gives t(a) = rint((a − z_a) · f32(s_a / s)),
                          a float operand  t(a) = rint(a · inv)

All other glue, and an add whose result is a float, works on the fp32 values of its operands,
(q − z) · s of an integer, in the arithmetic of `exact_math`. The result is stored by `Encoding.quantize` (integers) or rounded by
`Encoding.fake` (floats).
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hwmpq.formats import Encoding, encoding_named, reciprocal
from hwmpq.graph import Node
from hwmpq.quantize.interpret import apply
from hwmpq.requantize import Quantizer
from hwmpq.storage import is_integer

#: An operand or result: its encoding and quantizer (the identity for floats).
Held = tuple[str, Quantizer]
Rule = Callable[[Node, Sequence[Tensor], Sequence[Held], Held], Tensor]


def moved(node: Node, args: Sequence[Tensor], held: Sequence[Held], out: Held) -> Tensor:
    """max_pool2d, rearrange, concat."""
    return apply(node, args, _no_param)


def padded(node: Node, args: Sequence[Tensor], held: Sequence[Held], out: Held) -> Tensor:
    """pad: with the code of 0."""
    pads = {**node.attrs, "value": float(out[1].zero)}
    return apply(Node(node.name, "pad", node.inputs, pads), args, _no_param)


def relu(node: Node, args: Sequence[Tensor], held: Sequence[Held], out: Held) -> Tensor:
    """relu: nothing below the code of 0."""
    return args[0].clamp(min=float(out[1].zero))


def clamped(node: Node, args: Sequence[Tensor], held: Sequence[Held], out: Held) -> Tensor:
    """clamp: rint is monotone, so clamping codes is clamping values."""
    low, high = (code(node.attrs[key], out) for key in ("lo", "hi"))
    return args[0].clamp(low, high)


def added(node: Node, args: Sequence[Tensor], held: Sequence[Held], out: Held) -> Tensor:
    """add of two tensors with an integer result."""
    encoding, quantizer = encoding_named(out[0]), out[1]
    a, b = (_term(x, kind, quantizer) for x, kind in zip(args, held, strict=True))
    return (a + b + float(quantizer.zero)).clamp(encoding.qmin, encoding.qmax)


#: Operators that have a rule of their own when their result is stored as an integer.
RULES: dict[str, Rule] = {
    "max_pool2d": moved,
    "rearrange": moved,
    "concat": moved,
    "pad": padded,
    "relu": relu,
    "clamp": clamped,
    "add": added,
}


def code(value: float, held: Held) -> float:
    """The code of one real number."""
    encoding: Encoding = encoding_named(held[0])
    q = np.rint(np.float32(value) * reciprocal(held[1].scale)) + held[1].zero
    return float(np.clip(q, encoding.qmin, encoding.qmax))


def _term(x: Tensor, held: Held, out: Quantizer) -> Tensor:
    encoding, quantizer = held
    if not is_integer(encoding):
        return torch.round(x * float(reciprocal(out.scale)))
    ratio = np.float32(np.float64(quantizer.scale) / np.float64(np.float32(out.scale)))
    return torch.round((x - float(quantizer.zero)) * float(ratio))


def _no_param(name: str) -> Tensor:
    raise KeyError(name)
