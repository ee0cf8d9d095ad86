"""AdaRound: each weight goes up or down so that outputs, not weights, come out right.

Nagel et al., ICML 2020 (arXiv 2004.10568). A weight is s · clamp(floor(w/s) + h(v), qmin, qmax)
with the rectified sigmoid h(v) = clamp(1.2 · sigmoid(v) − 0.1, 0, 1), and v minimises

    |y − y_float|² / |y_nearest − y_float|² + 0.1 · mean over weights of 1 − |2h − 1|^β

of a unit's output, after the activation, on the inputs that the rounded network really hands on.
β falls from 20 to 2 behind a fifth of the iterations without the second term, which drives h to 0
or 1. A unit is a layer or a block (`block_ends`; BRECQ). The errors are relative to nearest
rounding's, so no factor depends on the net; a unit where that is not improved keeps nearest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwmpq.formats import Encoding, QuantizedWeight, format_named
from hwmpq.graph import Graph, Node
from hwmpq.quantize.blocks import block_ends
from hwmpq.quantize.feed import Inputs
from hwmpq.quantize.pair import Pair
from hwmpq.quantizers import Quantizers

#: Part of the key of what was kept: raise it when the result changes.
VERSION = 1
#: Stretch of the rectified sigmoid, iterations before rounding is asked for, β's ends.
_ZETA, _GAMMA, _WARM, _BETAS = 1.1, -0.1, 0.2, (20.0, 2.0)
#: Cost of a training step over a forward pass.
_STEP_COST = 3.5


@dataclass(frozen=True)
class Settings:
    """blocks: units are blocks, not layers; iterations of each unit, one batch each; rate: Adam's;
    weight: of the second term."""

    blocks: bool = False
    iterations: int = 250
    rate: float = 2e-2
    weight: float = 0.1


@dataclass(frozen=True, eq=False)
class Keeper:
    """done: a unit -> what was kept of it; save: keep it; note: called with (units done, in all);
    forecast: called with the seconds it will take, before it starts."""

    done: Callable[[str], bytes | None] = lambda unit: None
    save: Callable[[str, bytes], None] = lambda unit, value: None
    note: Callable[[int, int], None] = lambda done, total: None
    forecast: Callable[[float], None] = lambda seconds: None


def adaround(
    graph: Graph,
    assignment: Mapping[str, str],
    quantizers: Quantizers,
    batches: Sequence[Inputs],
    settings: Settings = Settings(),
    keeper: Keeper = Keeper(),
    seed: int = 0,
) -> Quantizers:
    """The quantizers with learned codes for the integer weights of the assignment's cells."""
    pair = Pair(graph, assignment, quantizers, batches)
    nodes = pair.graph.nodes
    ends = block_ends(pair.graph) if settings.blocks else list(range(1, len(nodes) + 1))
    weights, start, seconds = dict(quantizers.weights), 0, 0.0
    if keeper.done(nodes[-1].name) is None:
        seconds = _forward_seconds(pair, batches[0]) * _STEP_COST * settings.iterations
    keeper.forecast(seconds)
    for number, stop in enumerate(ends):
        part = [
            Rounded(pair, node, assignment[node.name], weights[node.name, assignment[node.name]])
            for node in nodes[start:stop]
            if _learnable(node, assignment)
        ]
        with torch.no_grad():
            pair.advance_float(stop)
        if part:
            unit = nodes[stop - 1].name
            kept = keeper.done(unit)
            if kept is None:
                _learn(pair, part, stop, settings, seed)
                keeper.save(unit, _packed(part))
            else:
                _unpack(part, kept)
            for layer in part:
                weights[layer.key] = layer.result()
                pair.weights[layer.key[0]] = layer.value(layer.up.float())
        with torch.no_grad():
            pair.advance_rounded(stop)
        keeper.note(number + 1, len(ends))
        start = stop
    return replace(quantizers, weights=weights)


def _learnable(node: Node, assignment: Mapping[str, str]) -> bool:
    return "weight" in node.params and node.is_layer and (
        format_named(assignment[node.name]).weight.kind == "int"
    )  # fmt: skip


class Rounded:
    """A layer's weight between the two codes next to it. up: bool, like the weight; nearest at
    first. logits: v."""

    def __init__(self, pair: Pair, node: Node, format_name: str, weight: QuantizedWeight):
        fmt = format_named(format_name)
        self.key = node.name, format_name
        self.encoding: Encoding = fmt.weight
        self.weight = weight
        one = QuantizedWeight(np.ones_like(weight.codes), weight.scale)
        self.scale = torch.from_numpy(np.ascontiguousarray(fmt.dequantize_weight(one)))
        exact = pair.constants(node.params["weight"]) / self.scale
        self.floor = exact.floor()
        part = (exact - self.floor).clamp(0.01, 0.99)
        self.up = part >= 0.5
        inner = (part - _GAMMA) / (_ZETA - _GAMMA)
        self.logits = (inner / (1 - inner)).log().requires_grad_()

    def soft(self) -> Tensor:
        """h(v)."""
        return (self.logits.sigmoid() * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)

    def value(self, up: Tensor) -> Tensor:
        """The weight for h = up."""
        codes = (self.floor + up).clamp(self.encoding.qmin, self.encoding.qmax)
        return codes * self.scale

    def result(self) -> QuantizedWeight:
        """Its codes, in the scale they came with."""
        codes = (self.floor + self.up).clamp(self.encoding.qmin, self.encoding.qmax)
        return QuantizedWeight(codes.numpy().astype(self.weight.codes.dtype), self.weight.scale)


def _learn(pair: Pair, part: list[Rounded], stop: int, settings: Settings, seed: int) -> None:
    """Set `up` of the unit's layers, which end before node `stop`."""
    nearest = [layer.up for layer in part]
    before = _error(pair, part, stop)
    if before == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([layer.logits for layer in part], settings.rate)
    batches, order = len(pair.rounded_states), torch.empty(0)
    warm = int(_WARM * settings.iterations)
    for i in range(settings.iterations):
        if i % batches == 0:
            order = torch.randperm(batches, generator=generator)
        softs = [layer.soft() for layer in part]
        for layer, soft in zip(part, softs, strict=True):
            pair.weights[layer.key[0]] = layer.value(soft)
        loss = _distance(pair, int(order[i % batches]), stop) / before
        if i >= warm:
            at = (i - warm) / (settings.iterations - warm)
            beta = _BETAS[1] + (_BETAS[0] - _BETAS[1]) * (1 - at)
            open_ = [(1 - (2 * soft - 1).abs() ** beta).sum() for soft in softs]
            count = sum(soft.numel() for soft in softs)
            loss = loss + settings.weight * torch.stack(open_).sum() / count
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for layer in part:
        layer.up = layer.soft().detach() >= 0.5
    if _error(pair, part, stop) >= before:
        for layer, up in zip(part, nearest, strict=True):
            layer.up = up


def _error(pair: Pair, part: Sequence[Rounded], stop: int) -> float:
    """Mean squared error of the unit's output as its layers are rounded now."""
    with torch.no_grad():
        for layer in part:
            pair.weights[layer.key[0]] = layer.value(layer.up.float())
        batches = range(len(pair.rounded_states))
        return float(np.mean([float(_distance(pair, k, stop)) for k in batches]))


def _distance(pair: Pair, batch: int, stop: int) -> Tensor:
    """Mean squared difference of the last node's results, of one batch."""
    state = pair.rounded_states[batch].copy()
    pair.rounded.advance(state, stop)
    name = pair.graph.nodes[stop - 1].name
    return (state.held[name] - pair.float_states[batch].held[name]).square().mean()


def _packed(part: Sequence[Rounded]) -> bytes:
    return np.packbits(np.concatenate([layer.up.numpy().ravel() for layer in part])).tobytes()


def _unpack(part: Sequence[Rounded], kept: bytes) -> None:
    bits: NDArray[np.bool_] = np.unpackbits(np.frombuffer(kept, np.uint8)).astype(bool)
    at = 0
    for layer in part:
        count = layer.up.numel()
        layer.up = torch.from_numpy(bits[at : at + count]).reshape(layer.up.shape)
        at += count


def _forward_seconds(pair: Pair, batch: Inputs) -> float:
    with torch.no_grad():
        began = time.perf_counter()
        pair.rounded(batch)
        return time.perf_counter() - began
