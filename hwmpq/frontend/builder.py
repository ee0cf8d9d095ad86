"""What a converter sees: one call of an exported operator, and the builder it adds nodes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hwmpq.frontend.draft import Draft
from hwmpq.graph import Node

Steps = list[list[Any]]


class Refusal(Exception):
    """Why one operator cannot be taken; collected and raised together as UnsupportedModel."""


@dataclass(frozen=True, eq=False)
class Const:
    """A tensor known while tracing. name: its state-dict name when `stored`, else the fx node's."""

    value: torch.Tensor
    name: str
    stored: bool = False

    def array(self) -> NDArray[np.float32]:
        """A writable copy. Raises Refusal for a value that is not of a real number type."""
        if self.value.is_complex():
            raise Refusal(f"complex constant {self.name}")
        value = self.value.detach().cpu().to(torch.float32).contiguous()
        return np.array(value.numpy(), dtype=np.float32)

    @property
    def scalar(self) -> float | None:
        """Its value when it is a single number."""
        return float(self.value.reshape(-1)[0]) if self.value.numel() == 1 else None


@dataclass(frozen=True)
class Pieces:
    """Views of one tensor that an operator returns as a list (unbind, split, chunk)."""

    source: str
    steps: tuple[Steps, ...]


#: an operand: a tensor's name, a constant, or several views
Value = str | Const | Pieces


@dataclass(frozen=True)
class Call:
    """One call. args: by schema name, tensors as Value; shape: of the (first) result."""

    name: str
    op: str
    args: Mapping[str, Any]
    shape: tuple[int, ...]
    path: str
    source: str

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def get(self, name: str, default: Any = None) -> Any:
        value = self.args.get(name)
        return default if value is None else value


class Builder:
    """Adds nodes to a draft. parameters: the module's state dict, for names of layers."""

    def __init__(self, draft: Draft, parameters: Mapping[str, torch.Tensor]):
        self.draft = draft
        self.parameters = parameters

    def shape(self, value: Value) -> tuple[int, ...]:
        if isinstance(value, Const):
            return tuple(value.value.shape)
        if isinstance(value, Pieces):
            raise Refusal("a list of tensors where one is expected")
        return self.draft.tensors[value]

    def param(self, value: Const) -> str:
        """Name of the constant in the draft."""
        return self.draft.constant(value.name, value.array())

    def array(self, wish: str, value: NDArray[Any] | float) -> str:
        return self.draft.constant(wish, np.asarray(value, dtype=np.float32))

    def operand(self, call: Call, value: Value) -> str:
        """A tensor's name; a constant becomes a `constant` node."""
        if isinstance(value, str):
            return value
        if isinstance(value, Pieces):
            raise Refusal("a list of tensors where one is expected")
        name = self.draft.glue_name(value.name.replace(".", "_"))
        node = Node(name, "constant", (), {}, {"value": self.param(value)}, call.source)
        return self.draft.add(node, tuple(value.value.shape), call.path)

    def glue(
        self,
        call: Call,
        op: str,
        inputs: Sequence[str],
        attrs: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        shape: Sequence[int] | None = None,
        name: str = "",
    ) -> str:
        """Append a glue node named after the call, or `name`; returns its tensor."""
        name = self.draft.glue_name(name or call.name)
        node = Node(name, op, tuple(inputs), dict(attrs or {}), dict(params or {}), call.source)
        return self.draft.add(node, tuple(call.shape if shape is None else shape), call.path)

    def rearrange(self, call: Call, x: str, steps: Steps, name: str = "") -> str:
        """A view of tensor `x`."""
        shape = shape_after(self.draft.tensors[x], steps)
        return self.glue(call, "rearrange", [x], {"steps": steps}, shape=shape, name=name)

    def layer(
        self,
        call: Call,
        op: str,
        x: str,
        weight: Const,
        bias: Const | None,
        attrs: Mapping[str, Any],
        shape: Sequence[int] | None = None,
    ) -> str:
        """Append a conv2d or linear named after its module or its weight."""
        wish = self._layer_path(call, weight) or call.name
        params = {"weight": self.param(_named(weight, f"{wish}.weight"))}
        if bias is not None:
            params["bias"] = self.param(_named(bias, f"{wish}.bias"))
        name = self.draft.layer_name(wish)
        full = {**attrs, "residual": False, "act": ""}
        node = Node(name, op, (x,), full, params, call.source)
        return self.draft.add(node, tuple(call.shape if shape is None else shape), call.path)

    def _layer_path(self, call: Call, weight: Const) -> str:
        """The module path if that module holds this weight, else the weight's own path."""
        held = self.parameters.get(f"{call.path}.weight")
        if held is not None and same_view(held, weight.value):
            return call.path
        if weight.stored:
            path = weight.name.removesuffix("weight")
            return path.rstrip("._") if path != weight.name else weight.name
        return call.path


def _named(value: Const, wish: str) -> Const:
    """A computed weight gets its layer's name; a stored one keeps its own."""
    return value if value.stored else Const(value.value, wish)


def same_view(tensor: torch.Tensor, view: torch.Tensor) -> bool:
    """Whether a view is the whole tensor, unchanged."""
    layout = (tensor.shape, tensor.stride(), tensor.dtype)
    same = layout == (view.shape, view.stride(), view.dtype)
    return same and tensor.data_ptr() == view.data_ptr()


def shape_after(shape: tuple[int, ...], steps: Steps) -> tuple[int, ...]:
    """Shape after the view operations of a `rearrange`."""
    for step in steps:
        match step:
            case ["reshape" | "expand", target]:
                shape = tuple(target)
            case ["permute", axes]:
                shape = tuple(shape[i] for i in axes)
            case ["slice", axis, start, stop, stride]:
                size = len(range(start, stop, stride))
                shape = (*shape[:axis], size, *shape[axis + 1 :])
            case _:
                raise ValueError(f"unknown step {step!r}")
    return shape


Converter = Callable[[Builder, Call], Value]
