"""What the policy decides: one row of options for each decision, and the plan that rows stand for.

A decision is a layer, tied layers, or a block (`quantize.blocks`). Its format is one row; with
separate decisions its weights' encoding is one and what it reads another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.formats import format_named
from hwmpq.graph import Graph
from hwmpq.quantize.blocks import block_ends
from hwmpq.search.decisions import merge
from hwmpq.search.evaluate import IndexArray
from hwmpq.types import BoolArray, FloatArray, Problem

IntArray = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Space:
    """allowed: [R, O] options of each row; of_layer: [L], the decision of each layer; format_of:
    [O, O], (weights' option, activations' option) -> format number or -1, where they are separate
    rows, else None; the weights' rows come first, then the activations'."""

    allowed: BoolArray
    of_layer: IntArray
    format_of: IntArray | None = None

    def formats(self, rows: IntArray) -> IndexArray:
        """Options [.., R] -> format numbers per layer [.., L]."""
        if self.format_of is None:
            return rows[..., self.of_layer]
        weights, activations = np.split(rows, 2, -1)
        return self.format_of[weights, activations][..., self.of_layer]

    def options(self, problem: Problem, axis: int) -> list[str]:
        """Names of a row's options: encodings of weights (axis 0) or activations, or formats."""
        if self.format_of is None:
            return list(problem.formats)
        names = []
        for f in self.format_of.max(1 - axis):
            fmt = format_named(problem.formats[f]) if f >= 0 else None
            names.append("" if fmt is None else (fmt.weight, fmt.activation)[axis].name)
        return names

    def spread(self, rows: FloatArray, formats: int) -> FloatArray:
        """A log-probability of each row's options, [R, O] -> of each layer's formats, [L, F], the
        decision's own at its first layer and 0 at the others; -inf where not allowed."""
        found = rows
        if self.format_of is not None:
            found = np.full((len(rows) // 2, formats), -np.inf)
            weights, activations = np.split(rows, 2)
            for w, a in np.argwhere(self.format_of >= 0):
                found[:, self.format_of[w, a]] = weights[:, w] + activations[:, a]
        each = found[self.of_layer]
        first = np.unique(self.of_layer, return_index=True)[1]
        later = np.setdiff1d(np.arange(len(each)), first)
        each[later] = np.where(np.isfinite(each[later]), 0.0, -np.inf)
        return each


def with_blocks(problem: Problem, graph: Graph) -> Problem:
    """The problem with the layers of each block tied."""
    ends = block_ends(graph)
    blocks = [
        tuple(node.name for node in graph.nodes[start:end] if node.is_layer)
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return replace(problem, ties=(*problem.ties, *(b for b in blocks if len(b) > 1)))


def space_of(problem: Problem, separate: bool) -> Space:
    """Raises InputError where a decision is left without options, or, for separate ones, where not
    every legal weight encoding goes with every legal activation encoding."""
    decisions = merge(problem)
    for d in np.flatnonzero(~decisions.legal.any(1)):
        tied = [problem.layers[i] for i in np.flatnonzero(decisions.of_layer == d)]
        raise InputError("layers of one decision have no format in common", ", ".join(tied))
    if not separate:
        return Space(decisions.legal, decisions.of_layer)
    pairs = [(f.weight.name, f.activation.name) for f in map(format_named, problem.formats)]
    weighs = list(dict.fromkeys(w for w, _ in pairs))
    reads = list(dict.fromkeys(a for _, a in pairs))
    width = max(len(weighs), len(reads))
    format_of = np.full((width, width), -1, np.intp)
    for f, (w, a) in enumerate(pairs):
        if format_of[weighs.index(w), reads.index(a)] >= 0:
            raise InputError(
                "separate decisions over formats of equal encodings", problem.formats[f],
                "one format for each pair of encodings", "Leave out its twin with groups.",
            )  # fmt: skip
        format_of[weighs.index(w), reads.index(a)] = f
    halves = [_half(decisions.legal, format_of, axis, problem.formats) for axis in (0, 1)]
    return Space(np.concatenate(halves), decisions.of_layer, format_of)


def _half(legal: BoolArray, format_of: IntArray, axis: int, formats: Sequence[str]) -> BoolArray:
    """Which options of one operand a decision has, [D, O]."""
    able = legal[:, format_of] & (format_of >= 0)
    of_weights, of_activations = (np.asarray(able.any(axis)) for axis in (2, 1))
    full = of_weights[:, :, None] & of_activations[:, None, :]
    if (full != able).any():
        raise InputError(
            "separate decisions for weights and activations over formats", ", ".join(formats),
            "every weight encoding with every activation encoding",
            "Give such --formats, for example w4a4,w4a8,w8a4,w8a8.",
        )  # fmt: skip
    return np.asarray((of_weights, of_activations)[axis])
