"""One use of a glue kernel: the operator, and how its tensors lie in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.formats import reciprocal
from hwmpq.kernels.codes import INVERSE, QUANTIZER, RATIO, SCALE, ZERO
from hwmpq.kernels.threads import pays
from hwmpq.requantize import Quantizer
from hwmpq.storage import is_integer

LAYOUTS = ("nhwc", "plain")
F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Operand:
    """A tensor in memory, flat. shape: logical (torch's, images NCHW); layout: 'nhwc' (a rank-4
    image, channels last) or 'plain' (row-major); encoding: 'fp32', 'bf16', 'fp16', 'u8', ..."""

    shape: tuple[int, ...]
    layout: str
    encoding: str

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS or (self.layout == "nhwc" and len(self.shape) != 4):
            raise InputError(f"layout of a tensor {self.shape}", self.layout, LAYOUTS)

    @property
    def order(self) -> tuple[int, ...]:
        """Logical axes in memory order, outermost first."""
        return (0, 2, 3, 1) if self.layout == "nhwc" else tuple(range(len(self.shape)))

    @property
    def physical(self) -> tuple[int, ...]:
        """Shape in memory order."""
        return tuple(self.shape[axis] for axis in self.order)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        """Elements between neighbours along each logical axis."""
        found, step = [0] * len(self.shape), 1
        for axis in reversed(self.order):
            found[axis], step = step, step * self.shape[axis]
        return tuple(found)

    def broadcast(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Strides along the logical axes of a shape that this tensor is broadcast to."""
        missing = len(shape) - len(self.shape)
        pairs = zip(self.shape, self.strides, strict=True)
        return (0,) * missing + tuple(0 if extent == 1 else step for extent, step in pairs)


@dataclass(frozen=True)
class GlueCall:
    """op: one of graph.GLUE_OPS but 'constant', or 'encode' (re-encodes or re-lays one tensor).

    attrs: canonical JSON of the node's attrs. shared: the result keeps the input's encoding and
    quantizer (codes are moved and compared, not rescaled). vector_bytes: width of a register;
    avx2: the target has these instructions.
    """

    op: str
    attrs: str
    inputs: tuple[Operand, ...]
    out: Operand
    shared: bool
    vector_bytes: int = 32
    threads: int = 1
    avx2: bool = False

    @property
    def attributes(self) -> dict[str, Any]:
        return dict(json.loads(self.attrs or "{}"))

    @property
    def roles(self) -> tuple[str, ...]:
        """The fp32 parameters, in argument order."""
        if self.op in ("add", "mul"):
            return ("b",) if len(self.inputs) == 1 else ()
        return _ROLES.get(self.op, ())

    @property
    def grid(self) -> bool:
        """Do the threads of a GPU run it? Only theirs are registers of one number."""
        return self.vector_bytes == 4

    def pays(self, elements: int) -> bool:
        """Whether a loop over so many elements is worth the thread pool; a grid is always there."""
        return self.grid or pays(self.threads, elements * _CYCLES.get(self.op, _FEW_CYCLES))

    def role_size(self, role: str) -> int:
        """Elements of a parameter as the kernel gets it."""
        if role == "b":
            return self.out.size
        return self.out.shape[-1 if self.op == "layer_norm" else 1]

    def same_codes(self, index: int) -> bool:
        """Whether an element of this operand is an element of the result, bit for bit."""
        encoding = self.inputs[index].encoding
        return encoding == self.out.encoding and (self.shared or not is_integer(encoding))


#: Cycles of an element, about: measured with AVX2 on data in the L2 cache. One for each that calls
#: exp, one for all that do not.
_CYCLES = dict.fromkeys(("gelu", "silu", "sigmoid", "tanh", "softmax", "layer_norm"), 2.0)
_FEW_CYCLES = 0.3

_ROLES = {"layer_norm": ("weight", "bias"), "batch_affine": ("scale", "shift")}


def parameters(
    call: GlueCall, constants: Mapping[str, NDArray[Any]], quantizers: Sequence[Quantizer]
) -> list[F32]:
    """Every argument after the inputs and before out, in order.

    constants: by role (weight, bias, scale, shift, b). quantizers: of each input, then of the
    result; those of float encodings are ignored.
    """
    operands = (*call.inputs, call.out)
    pairs = list(zip(operands, quantizers, strict=True))
    vectors = [_vector(operand, q, quantizers[-1]) for operand, q in pairs]
    return vectors + [_constant(call, role, constants[role]) for role in call.roles]


def _vector(operand: Operand, q: Quantizer, out: Quantizer) -> F32:
    vector = np.zeros(QUANTIZER, np.float32)
    vector[[SCALE, INVERSE, RATIO]] = 1.0
    if is_integer(operand.encoding):
        vector[SCALE], vector[ZERO], vector[INVERSE] = q.scale, q.zero, reciprocal(q.scale)
        vector[RATIO] = np.float64(q.scale) / np.float64(np.float32(out.scale))
    return vector


def _constant(call: GlueCall, role: str, value: NDArray[Any]) -> F32:
    if role == "b":
        value = np.broadcast_to(value, call.out.shape).transpose(call.out.order)
    flat = np.ascontiguousarray(value, np.float32).reshape(-1)
    if flat.size != call.role_size(role):
        raise InputError(f"elements of {role} of a {call.op}", flat.size, call.role_size(role))
    return flat
