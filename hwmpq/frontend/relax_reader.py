"""What a converter of Relax operators works with: the draft, and layers by their weights' names.

The canonical graph is NCHW. An NHWC tensor that was computed is a `rearrange` of an NCHW one
(`Reader.last`), and who wants NCHW reads that one (`Reader.first`): an NHWC form that nobody needs
goes with the dead nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.frontend.builder import Steps, shape_after
from hwmpq.frontend.draft import Draft
from hwmpq.graph import Node

#: Where the axes of an NCHW tensor lie in an NHWC one, and the other way round.
NCHW, NHWC = [0, 3, 1, 2], [0, 2, 3, 1]


class Pieces(tuple[Any, ...]):
    """Several values: a Relax tuple."""


#: A tensor's name, a constant, several values; a shape; or a plain Relax expression.
Value = Any
Converter = Callable[["Reader", Any, Sequence[Value], str], Value | None]


@dataclass(frozen=True, eq=False)
class Reader:
    """What a converter sees. names: contents of a weight -> its name (`contents`); nchw: an NHWC
    tensor -> the same in NCHW, where there is one."""

    draft: Draft
    module: Any
    names: Mapping[tuple[Any, ...], str]
    nchw: dict[str, str] = field(default_factory=dict)

    def glue(
        self, name: str, op: str, inputs: Sequence[str], attrs: Mapping[str, Any] | None = None,
        params: Mapping[str, NDArray[Any]] | None = None, shape: Sequence[int] | None = None,
    ) -> str:  # fmt: skip
        """Append a node; its shape is its first input's where none is given."""
        constants = {
            role: self.draft.constant(f"{name}.{role}", value)
            for role, value in (params or {}).items()
        }
        shape = self.draft.tensors[inputs[0]] if shape is None else shape
        return self.draft.add(Node(name, op, tuple(inputs), attrs or {}, constants), tuple(shape))

    def constant(self, wish: str, value: NDArray[Any]) -> str:
        """Append a node that gives the same value always."""
        name = self.draft.glue_name(wish)
        return self.glue(name, "constant", [], {}, {"value": value}, value.shape)

    def layer(
        self, op: str, x: str, weight: NDArray[Any], attrs: Mapping[str, Any], shape: Sequence[int]
    ) -> str:
        """Append a conv2d or linear, called after its weight."""
        known = self.names.get(contents(weight), "")
        path = known.removesuffix("weight").strip("._/") or op
        name = self.draft.layer_name(path)
        params = {"weight": self.draft.constant(f"{name}.weight", np.array(weight))}
        full = {**attrs, "residual": False, "act": ""}
        return self.draft.add(Node(name, op, (x,), full, params), tuple(shape))

    def rearrange(self, x: str, steps: Steps, name: str) -> str:
        shape = shape_after(self.draft.tensors[x], steps)
        return self.glue(name, "rearrange", [x], {"steps": steps}, shape=shape)

    def first(self, x: str) -> str:
        """An NHWC tensor in NCHW."""
        if x not in self.nchw:
            name = self.draft.glue_name(f"{x}.nchw")
            self.nchw[x] = self.rearrange(x, [["permute", NCHW]], name)
        return self.nchw[x]

    def last(self, x: str, name: str) -> str:
        """An NCHW tensor in NHWC."""
        found = self.rearrange(x, [["permute", NHWC]], self.draft.glue_name(name))
        self.nchw[found] = x
        return found


def contents(array: NDArray[Any]) -> tuple[Any, ...]:
    """Equal for equal fp32 arrays."""
    array = np.ascontiguousarray(array, np.float32)
    return array.shape, array.tobytes()


def is_tensor(*values: Value) -> bool:
    return all(isinstance(value, str) for value in values)


def elementwise(convert: Converter) -> Converter:
    """On NHWC tensors that are known in NCHW, the operator is applied to the latter: what follows a
    layer stands right behind it."""

    def behind(r: Reader, call: Any, args: Sequence[Value], name: str) -> Value | None:
        constants = [arg for arg in args if isinstance(arg, np.ndarray)]
        tensors = [arg for arg in args if is_tensor(arg)]
        if any(arg not in r.nchw for arg in tensors) or any(c.ndim > 4 for c in constants):
            return convert(r, call, args, name)
        found = convert(r, call, [_in_nchw(r, arg) for arg in args], name)
        return found if found is None else r.last(found, name)

    return behind


def _in_nchw(r: Reader, operand: Value) -> Value:
    """A tensor, a constant, or something without a layout."""
    if is_tensor(operand):
        return r.nchw[operand]
    if isinstance(operand, np.ndarray):
        return operand.reshape((1,) * (4 - operand.ndim) + operand.shape).transpose(NCHW)
    return operand
