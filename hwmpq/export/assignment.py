"""Formats, scales and zero points as JSON, for other quantizers: `handover`.

`assignment.schema.json` beside this file is the JSON Schema of it: `schema()`, kept by a test. The
file also serves as --assignment. The weights' codes themselves are in `quantizers.safetensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from hwmpq.formats import Encoding, encoding_named
from hwmpq.graph import Graph
from hwmpq.quantizers import Quantizers
from hwmpq.resolve import Resolved, ResolvedLayer, resolve

SCHEMA = Path(__file__).with_suffix(".schema.json")
_STRICT: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class Number:
    """How a number is written. Integers: u is unsigned, s symmetric without its lowest code."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    encoding: str
    kind: Literal["int", "float"]
    bits: int

    @staticmethod
    def of(encoding: Encoding) -> Number:
        return Number(encoding.name, encoding.kind, encoding.bits)


@dataclass(frozen=True)
class Tensor:
    """value = (code - zero_point) * scale."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    tensor: str
    number: Number
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Weight:
    """value = code * scale. scale: none, one for all, per output channel, or per output channel and
    group of that many elements of its row."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    number: Number
    group: int | None
    scale: float | list[float] | list[list[float]] | None


@dataclass(frozen=True)
class Layer:
    """reads: the operands in order, a fused residual last; bias: corrected for the format."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    op: Literal["conv2d", "linear", "matmul"]
    reads: tuple[Tensor, ...]
    weight: Weight | None
    bias: list[float] | None


@dataclass(frozen=True)
class Handover:
    """A model's number formats. assignment: layer -> format; stored: every tensor as it is kept
    between layers, to be re-encoded for a layer that reads it otherwise."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    version: Literal[1]
    model: str
    assignment: dict[str, str]
    layers: dict[str, Layer]
    stored: tuple[Tensor, ...]


def handover(
    graph: Graph, assignment: Mapping[str, str], quantizers: Quantizers, model: str
) -> dict[str, Any]:
    """The JSON object. Raises InputError when assignment, layers and quantizers do not fit."""
    resolved = resolve(graph, assignment, quantizers)
    layers = {name: _layer(resolved, layer) for name, layer in resolved.layers.items()}
    stored = tuple(_tensor(resolved, t, e) for t, e in resolved.plan.stored.items())
    return asdict(Handover(1, model, dict(assignment), layers, stored))


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of `handover`."""
    from pydantic import TypeAdapter

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **TypeAdapter(Handover).json_schema(),
    }


def _tensor(resolved: Resolved, tensor: str, encoding: str) -> Tensor:
    q = resolved.quantizer(tensor, encoding)
    return Tensor(tensor, Number.of(encoding_named(encoding)), q.scale, q.zero)


def _layer(resolved: Resolved, layer: ResolvedLayer) -> Layer:
    node = layer.node
    reads = tuple(
        _tensor(resolved, tensor, resolved.plan.demand[node.name, index])
        for index, tensor in enumerate(node.inputs)
    )
    weight = None
    if layer.weight is not None:
        scale = layer.weight.scale
        fmt = layer.format
        weight = Weight(
            Number.of(fmt.weight), fmt.group, None if scale is None else np.asarray(scale).tolist()
        )
    bias = None if layer.bias is None else layer.bias.tolist()
    op: Any = node.op
    return Layer(op, reads, weight, bias)
