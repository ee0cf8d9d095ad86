"""Calibration: from images to the Quantizers of a menu of formats. Deterministic.

Passes of the fp32 interpreter over the images: equalization where it is asked for (`equalize`),
exact ranges, then the layers' mean inputs (`correct`) and histograms of 2048 bins, one per
quantizer root (`storage.quantizer_roots`; the values of all members count). Every tensor that some
assignment could store or read as an integer gets a quantizer for each encoding of the menu.
Unsigned encodings are asymmetric and always hold 0, which a tensor that is never negative has as
code 0; signed ones (operand b of a matmul) are symmetric. A softmax has the fixed range 0 .. 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from hwmpq.errors import InputError
from hwmpq.formats import QuantizedWeight, encoding_named, format_named
from hwmpq.graph import Graph
from hwmpq.quantize.correct import shifted_biases
from hwmpq.quantize.equalize import equalized
from hwmpq.quantize.feed import Inputs, named, samples
from hwmpq.quantize.interpret import Constants, evaluate
from hwmpq.quantize.ranges import METHODS, Histogram, Method, quantizer_of
from hwmpq.quantizers import F32, Quantizers
from hwmpq.requantize import Quantizer
from hwmpq.storage import is_integer, keeps_encoding, plan, quantizer_roots

#: Called with (steps done, steps in all).
Progress = Callable[[int, int], None]
#: Widest weights whose scale is searched for; above it, max|w| has the least error nearly always.
_MSE_BITS = 6
Key = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Observed:
    """What calibration images tell, and what was made of it, for the menu of formats.

    graph: the float graph, equalized if that was asked for; constants: those that changed by it;
    histograms: of each root in `wanted` (root, encoding); means: of what layers read, [1, ...].
    """

    graph: Graph
    menu: tuple[str, ...]
    constants: Mapping[str, F32]
    wanted: Set[Key]
    histograms: Mapping[str, Histogram]
    means: Mapping[str, Tensor]
    _activations: dict[tuple[Method, float], dict[Key, Quantizer]] = field(default_factory=dict)
    _weights: dict[bool, dict[Key, QuantizedWeight]] = field(default_factory=dict)

    def quantizers(
        self, method: Method, percentile: float, bias: bool, search: bool,
        step: Callable[[], None] = lambda: None,
    ) -> Quantizers:  # fmt: skip
        """As `calibrate`; what settings have in common is made once. step: called per format."""
        ranges = method, percentile if method == "percentile" else 0.0
        if ranges not in self._activations:
            self._activations[ranges] = self._ranged(method, percentile)
        if search not in self._weights:
            made: dict[Key, QuantizedWeight] = {}
            for name in self.menu:
                _round_weights(self.graph, name, made, search)
                step()
            self._weights[search] = made
        weights = self._weights[search]
        biases = shifted_biases(self.graph, self.means, weights) if bias else {}
        return Quantizers(self._activations[ranges], weights, biases, self.constants)

    def _ranged(self, method: Method, percentile: float) -> dict[Key, Quantizer]:
        fixed, found = _softmax_roots(self.graph), {}
        for root, encoding in sorted(self.wanted):
            if root in fixed:
                scale = np.float32(1 / encoding_named(encoding).qmax)
                found[root, encoding] = Quantizer(float(scale), 0)
            else:
                histogram = self.histograms[root]
                found[root, encoding] = quantizer_of(histogram, encoding, method, percentile)
        return found


def calibrate(
    graph: Graph,
    batches: Iterable[Inputs],
    formats: Sequence[str],
    method: Method = "mse",
    percentile: float = 99.99,
    progress: Progress | None = None,
    steps: Sequence[str] = (),
    search: bool = True,
) -> Quantizers:
    """Quantizers for all layers and all `formats`; fp32 is always among them.

    batches: fp32 inputs, NCHW, normalized; kept until the end. steps: of `ptq.OF_MENU`.
    search: are the scales of narrow weights searched for, or do they reach to the largest weight?
    Raises InputError for no batches, an unknown method, and values that are not finite;
    UnknownName for an unknown format.
    """
    if method not in METHODS:
        raise InputError("calibration method", method, METHODS)
    if not 50 < percentile <= 100:
        raise InputError("percentile", percentile, "above 50, at most 100")
    batches = list(batches)
    total = (2 + ("equalize" in steps)) * len(batches) + len({"fp32", *formats})
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    seen = observe(graph, batches, formats, "equalize" in steps, step)
    return seen.quantizers(method, percentile, "bias" in steps, search, step)


def observe(
    graph: Graph,
    batches: Sequence[Inputs],
    formats: Sequence[str],
    equalize: bool,
    step: Callable[[], None] = lambda: None,
) -> Observed:
    """The passes over the images, which no setting but `equalize` changes. step: called per batch.

    Raises InputError and UnknownName as `calibrate`.
    """
    if not batches:
        raise InputError("calibration without images", next="Give at least one batch.")
    menu = tuple(dict.fromkeys(("fp32", *formats)))
    wanted = integer_encodings(graph, menu)
    constants = equalized(graph, batches, step) if equalize else {}
    graph = replace(graph, constants={**graph.constants, **constants})
    histograms = _ranges(graph, batches, wanted, step)
    means = _fill(graph, batches, histograms, step)
    return Observed(graph, menu, constants, wanted, histograms, means)


def integer_encodings(graph: Graph, formats: Sequence[str]) -> set[Key]:
    """(quantizer root, integer encoding) of all that an assignment from the menu could need."""
    integers = [fmt for fmt in map(format_named, formats) if fmt.is_integer]
    if not integers:
        return set()
    reads = sorted({fmt.activation.name for fmt in integers} | {"u8"})
    weighs = sorted({fmt.weight.name for fmt in integers})
    kinds: set[tuple[str, bool]] = set()
    for pair in product(reads, weighs):
        storage = plan(graph, {node.name: pair for node in graph.layers})
        used = [(t, e) for t, e in storage.stored.items()]
        for node in graph.nodes:
            used += [(t, storage.demand[node.name, i]) for i, t in enumerate(node.inputs)]
        kinds |= {(storage.root[t], e in weighs) for t, e in used if is_integer(e)}
    return {(root, e) for root, signed in kinds for e in (weighs if signed else reads)}


def _ranges(
    graph: Graph,
    batches: Sequence[Inputs],
    wanted: Set[Key],
    step: Callable[[], None],
) -> dict[str, Histogram]:
    """Empty histograms over the exact range of each wanted root, 0 included."""
    roots = {root for root, _ in wanted}
    of = quantizer_roots(graph)
    ends = {root: (0.0, 0.0) for root in roots}

    def observe(name: str, x: Tensor) -> None:
        root = of[name]
        if root in roots:
            low, high = (float(end) for end in torch.aminmax(x))
            if not math.isfinite(high - low):
                raise InputError(f"values of tensor {name}", f"{low} .. {high}", "finite numbers")
            ends[root] = (min(ends[root][0], low), max(ends[root][1], high))

    _run(graph, batches, observe, step)
    return {root: Histogram(low, high) for root, (low, high) in ends.items()}


def _fill(
    graph: Graph,
    batches: Sequence[Inputs],
    histograms: dict[str, Histogram],
    step: Callable[[], None],
) -> dict[str, Tensor]:
    """Fill the histograms; returns the mean over the samples of what each layer with weights
    reads, [1, ...]."""
    of = quantizer_roots(graph)
    read = {node.inputs[0] for node in graph.layers if "weight" in node.params}
    sums: dict[str, Tensor] = {}
    count = sum(samples(batch) for batch in batches)

    def observe(name: str, x: Tensor) -> None:
        if of[name] in histograms:
            histograms[of[name]].add(x)
        if name in read:
            total = x.sum(0, keepdim=True)
            sums[name] = sums[name] + total if name in sums else total

    _run(graph, batches, observe, step)
    return {name: total / count for name, total in sums.items()}


def _run(
    graph: Graph,
    batches: Sequence[Inputs],
    observe: Callable[[str, Tensor], None],
    step: Callable[[], None],
) -> None:
    constants = Constants(graph)
    with torch.inference_mode():
        for batch in batches:
            evaluate(graph, named(graph, batch), observe, constants=constants)
            step()


def _softmax_roots(graph: Graph) -> frozenset[str]:
    """Roots whose members are softmax results, or those passed on."""
    keeps = keeps_encoding(graph)
    of = quantizer_roots(graph)
    made = {node.name: node.op for node in graph.nodes}
    softmax = {of[name] for name, op in made.items() if op == "softmax"}
    mixed = {
        of[name] for name in graph.tensors if made.get(name) != "softmax" and name not in keeps
    }
    return frozenset(softmax - mixed)


def _round_weights(
    graph: Graph, name: str, weights: dict[Key, QuantizedWeight], search: bool
) -> None:
    """Add every layer's weights in the format; formats with equal weights share them."""
    fmt = format_named(name)
    twins = [
        other
        for other in dict.fromkeys(known for _, known in weights)
        if (f := format_named(other)).weight == fmt.weight
        and (f.granularity, f.group) == (fmt.granularity, fmt.group)
    ]
    for node in graph.layers:
        if node.op == "matmul":
            continue
        if twins:
            weights[node.name, name] = weights[node.name, twins[0]]
            continue
        w = graph.constants[node.params["weight"]]
        clipped = search and fmt.weight.scaled and fmt.weight.bits <= _MSE_BITS
        rounded = fmt.quantize_weight(w, fmt.mse_scale(w) if clipped else None)
        weights[node.name, name] = rounded
