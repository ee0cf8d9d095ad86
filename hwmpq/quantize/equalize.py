"""Cross-layer equalization: a factor per channel moves from a layer's inputs into its weights.

Between a producer and the layers that read its result, channel i is divided by s_i in the producer
and multiplied by s_i in the readers (Nagel et al., ICCV 2019, section 4.1; with LayerNorm as the
producer it is SmoothQuant's migration, arXiv 2211.10438). Weights have a scale per output channel,
so only what is shared counts: the result's one scale, and the readers' columns.

    s_i = sqrt(a_i / w_i)   a_i: largest |x_i| on the images, w_i: largest |weight| that reads x_i
    s_i = a_i / max(a)      where only depthwise layers read, whose channels have their own scales

Exact behind a ReLU, no activation and LayerNorm. A clamp 0 .. hi has one bound for all channels, so
there the result is the same only on images where no moved channel is clamped: a channel that
touches the bound stays as it is, others may grow until their largest value, with a margin, does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwmpq.graph import Graph, Node
from hwmpq.quantize.feed import Inputs, named
from hwmpq.quantize.interpret import Constants, evaluate

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
#: Factors stay between its reciprocal and this.
_LARGEST = 16.0
#: How far below a clamp's bound a channel is kept that grows.
_MARGIN = 1.1


@dataclass(frozen=True)
class Chain:
    """A producer (layer or layer_norm) and all layers that read its result."""

    producer: Node
    readers: tuple[Node, ...]


def chains(graph: Graph) -> list[Chain]:
    """In execution order. A constant that two nodes use is not touched."""
    readers = graph.readers()
    uses = Counter(name for node in graph.nodes for name in node.params.values())
    found = []
    for node in graph.nodes:
        reading = readers[node.name]
        if (
            _scales(node)
            and node.name not in graph.outputs
            and reading
            and all(i == 0 and r.op in ("conv2d", "linear") and _takes(r, graph)
                    for r, i in reading)
            and all(uses[p] == 1 for n in (node, *(r for r, _ in reading))
                    for p in n.params.values())
        ):  # fmt: skip
            found.append(Chain(node, tuple(reader for reader, _ in reading)))
    return found


def equalized(
    graph: Graph, batches: Sequence[Inputs], step: Callable[[], None] = lambda: None
) -> dict[str, F32]:
    """name -> constant of an equalized graph, as far as it changes. step: called per batch."""
    found = chains(graph)
    largest = _largest(graph, [chain.producer for chain in found], batches, step)
    constants = dict(graph.constants)
    for chain in found:
        factors = _factors(graph, chain, largest[chain.producer.name])
        producer = chain.producer
        for role in ("weight", "bias"):
            if role in producer.params:
                name = producer.params[role]
                constants[name] = _along(constants[name], 0, 1 / factors)
        for reader in chain.readers:
            name = reader.params["weight"]
            axis = 0 if _depthwise(reader, graph) else 1
            constants[name] = _along(constants[name], axis, factors)
    return {n: value for n, value in constants.items() if value is not graph.constants[n]}


def _scales(node: Node) -> bool:
    """Does dividing weight and bias by s divide the result by s?"""
    if node.op == "layer_norm":
        return True
    if node.op not in ("conv2d", "linear") or node.residual is not None:
        return False
    return node.attrs.get("act", "") in ("", "relu") or _bound(node) is not None


def _bound(node: Node) -> float | None:
    """The upper bound of a clamp from 0."""
    a = node.attrs
    return float(a["act_hi"]) if a.get("act") == "clamp" and a["act_lo"] == 0 else None


def _takes(reader: Node, graph: Graph) -> bool:
    """Can it be multiplied per input channel?"""
    return reader.op == "linear" or reader.attrs["groups"] == 1 or _depthwise(reader, graph)


def _depthwise(node: Node, graph: Graph) -> bool:
    out, each, *_ = graph.constants[node.params["weight"]].shape
    return node.op == "conv2d" and each == 1 and node.attrs["groups"] == out


def _largest(
    graph: Graph, producers: Sequence[Node], batches: Sequence[Inputs], step: Callable[[], None]
) -> dict[str, F64]:
    """producer -> largest |value| of each channel of its result."""
    axis = {node.name: 1 if node.op == "conv2d" else -1 for node in producers}
    found: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor) -> None:
        if name in axis:
            now = x.abs().movedim(axis[name], -1).flatten(0, -2).amax(0)
            found[name] = torch.maximum(found.get(name, now), now)

    constants = Constants(graph)
    with torch.inference_mode():
        for batch in batches:
            evaluate(graph, named(graph, batch), observe, constants=constants)
            step()
    return {name: x.double().numpy() for name, x in found.items()}


def _factors(graph: Graph, chain: Chain, a: F64) -> F64:
    """s per channel; 1 for channels that are always 0."""
    dense = [
        np.abs(w).max(axis=(0, *range(2, w.ndim)))
        for reader in chain.readers
        if not _depthwise(reader, graph)
        for w in [graph.constants[reader.params["weight"]].astype(np.float64)]
    ]
    bound = _bound(chain.producer)
    with np.errstate(divide="ignore", invalid="ignore"):
        if dense:
            s = np.sqrt(a / np.max(dense, axis=0))
            s = s / np.exp(np.mean(np.log(s[np.isfinite(s) & (s > 0)])))
        else:
            s = a / a.max()
    s = np.where(np.isfinite(s) & (a > 0), s, 1.0)
    if bound is not None:
        s = np.where(a >= bound, 1.0, np.maximum(s, _MARGIN * a / bound))
    return np.clip(s, 1 / _LARGEST, _LARGEST)


def _along(constant: F32, axis: int, factors: F64) -> F32:
    shape = [1] * constant.ndim
    shape[axis] = -1
    return (constant * factors.reshape(shape)).astype(np.float32)
