"""Calibration: ranges, zero points, the search of the clip, and what is calibrated at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hwmpq.errors import InputError, UnknownName
from hwmpq.formats import encoding_named, format_named
from hwmpq.graph import Graph, Node
from hwmpq.quantize.calibrate import calibrate, integer_encodings, observe
from hwmpq.quantize.ranges import Histogram, Method, quantizer_of
from hwmpq.requantize import Quantizer
from hwmpq.storage import plan


def histogram(values: np.ndarray) -> Histogram:
    x = torch.from_numpy(values.astype(np.float32))
    found = Histogram(min(0.0, float(x.min())), max(0.0, float(x.max())))
    found.add(x)
    return found


def error(values: np.ndarray, q: Quantizer, encoding: str) -> float:
    x = values.astype(np.float32)
    return float(((encoding_named(encoding).fake(x, q.scale, q.zero) - x) ** 2).mean())


RNG = np.random.default_rng(0)
SKEWED = np.concatenate([RNG.normal(0, 1, 20000), RNG.exponential(6, 300)])
POSITIVE = np.maximum(RNG.normal(-1, 1, 20000), 0) * RNG.exponential(1, 20000)
NEGATIVE = -RNG.exponential(1, 5000)


@pytest.mark.parametrize("values", [SKEWED, POSITIVE, NEGATIVE], ids=["skewed", "relu", "negative"])
@pytest.mark.parametrize("encoding", ["u2", "u4", "u8", "s4", "s8"])
def test_mse_is_no_worse_than_other_ranges(values: np.ndarray, encoding: str) -> None:
    h = histogram(values)
    methods: tuple[Method, ...] = ("mse", "minmax", "percentile")
    found = {m: quantizer_of(h, encoding, m, 99.9) for m in methods}
    errors = {m: error(values, q, encoding) for m, q in found.items()}
    assert errors["mse"] <= min(errors["minmax"], errors["percentile"]) * 1.02 + 1e-7, errors
    for q in found.values():
        kind = encoding_named(encoding)
        assert q.scale == float(np.float32(q.scale)) and kind.qmin <= q.zero <= kind.qmax
        assert float(kind.fake(np.zeros(1, np.float32), q.scale, q.zero)[0]) == 0
        assert encoding[0] == "u" or q.zero == 0


def test_clipping_pays_at_low_bits_only() -> None:
    h = histogram(SKEWED)
    four, eight = (quantizer_of(h, e, "mse", 99.99).scale * m for e, m in (("u4", 15), ("u8", 255)))
    assert four < 0.6 * (h.high - h.low) and four < eight


def test_zero_points_at_the_ends() -> None:
    assert quantizer_of(histogram(POSITIVE), "u8", "minmax", 100).zero == 0
    assert quantizer_of(histogram(NEGATIVE), "u8", "minmax", 100).zero == 255
    assert quantizer_of(histogram(np.zeros(9)), "u8", "mse", 100) == Quantizer(1.0, 0)
    assert quantizer_of(histogram(np.full(9, 5.0)), "u8", "mse", 100).scale == pytest.approx(
        5 / 255
    )
    assert quantizer_of(histogram(np.full(9, 1e-42)), "u8", "minmax", 100) == Quantizer(1.0, 0)


def test_percentiles_count_the_zeros() -> None:
    values = np.concatenate([np.zeros(9900), np.linspace(1, 100, 100)])
    wide, narrow = (quantizer_of(histogram(values), "u8", "percentile", p) for p in (100, 99.5))
    assert wide.scale * 255 == pytest.approx(100)
    assert narrow.scale * 255 == pytest.approx(50, abs=1.1)


def net() -> Graph:
    """A concat of a linear and its relu, a dead channel included."""
    nodes = (
        Node("a", "linear", ("x",), {}, {"weight": "a.weight"}),
        Node("r", "relu", ("a",)),
        Node("j", "concat", ("a", "r"), {"axis": 1}),
        Node("b", "linear", ("j",), {}, {"weight": "b.weight"}),
    )
    shapes = {"x": (1, 4), "a": (1, 6), "r": (1, 6), "j": (1, 12), "b": (1, 3)}
    rng = np.random.default_rng(1)
    weights = {"a.weight": rng.normal(size=(6, 4)), "b.weight": rng.normal(size=(3, 12))}
    weights["a.weight"][2] = 0
    constants = {k: v.astype(np.float32) for k, v in weights.items()}
    return Graph(("x",), ("b",), nodes, shapes, constants)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 4, generator=generator) for size in (8, 5)]


def test_every_need_of_every_assignment_is_met() -> None:
    graph, menu = net(), ("fp32", "w8a8", "w4a4", "bf16", "w3.bf16")
    quantizers = calibrate(graph, batches(), menu)
    for a in menu:
        for b in menu:
            formats = {"a": format_named(a), "b": format_named(b)}
            reads = {n: (f.activation.name, f.weight.name) for n, f in formats.items()}
            storage = plan(graph, reads)
            used = {(t, e) for t, e in storage.stored.items()}
            used |= {(graph.node(n).inputs[i], e) for (n, i), e in storage.demand.items()}
            for tensor, encoding in used:
                if encoding in ("u4", "u8"):
                    quantizers.activation(storage.root[tensor], encoding)
            for layer, name in (("a", a), ("b", b)):
                quantizers.weight(layer, name)


def test_members_of_a_root_share_the_union_of_their_ranges() -> None:
    graph = net()
    quantizers = calibrate(graph, batches(), ["w8a8"], "minmax")
    a = torch.cat(batches()).numpy() @ graph.constants["a.weight"].T
    (q,) = (q for (t, e), q in quantizers.activations.items() if t in "arj")
    assert q.scale == pytest.approx(float(a.max() - a.min()) / 255, rel=1e-5)
    assert q.zero == round(float(-a.min() / q.scale))


def test_weights_are_rounded_once_by_their_format() -> None:
    graph = net()
    quantizers = calibrate(graph, batches(), ["w4a8", "w4a4", "w8a8", "w4.bf16.g8"])
    assert quantizers.weight("a", "w4a8") is quantizers.weight("a", "w4a4")
    w = graph.constants["b.weight"]
    eight = quantizers.weight("b", "w8a8")
    assert np.array_equal(eight.scale, format_named("w8a8").max_scale(w))
    assert np.array_equal(quantizers.weight("b", "w4a8").scale, format_named("w4a8").mse_scale(w))
    assert quantizers.weight("b", "w4.bf16.g8").scale.shape == (3, 2)
    assert not quantizers.weight("a", "w4a4").codes[2].any()
    assert np.array_equal(quantizers.weight("a", "fp32").codes, graph.constants["a.weight"])


def test_calibration_is_deterministic_and_reports_progress() -> None:
    graph, steps = net(), []
    first, second = (
        calibrate(graph, iter(batches()), ["w4a4"], progress=lambda *at: steps.append(at))
        for _ in range(2)
    )
    assert first.activations == second.activations
    assert steps[:6] == [(i, 6) for i in range(1, 7)]


def test_settings_share_what_was_observed() -> None:
    """And are what each would be by itself, whichever was asked before."""
    graph, menu = net(), ("w4a4",)
    seen = observe(graph, batches(), menu, equalize=False)
    settings: list[tuple[Method, float, bool]] = [
        ("mse", 99.0, True), ("percentile", 90.0, False), ("percentile", 70.0, True),
        ("mse", 90.0, False),
    ]  # fmt: skip
    for method, percentile, search in settings:
        shared = seen.quantizers(method, percentile, bias=False, search=search)
        alone = calibrate(graph, batches(), menu, method, percentile, search=search)
        assert shared.activations == alone.activations
        for key, weight in alone.weights.items():
            assert np.array_equal(shared.weights[key].scale, weight.scale)
            assert np.array_equal(shared.weights[key].codes, weight.codes)
    first, *_, last = (seen.quantizers(m, p, bias=False, search=s) for m, p, s in settings)
    assert first.activations is last.activations and first.weights is not last.weights


def test_no_integer_format_needs_no_range() -> None:
    assert integer_encodings(net(), ["fp32", "bf16", "w4.bf16"]) == set()
    assert calibrate(net(), batches(), ["w4.bf16"]).activations == {}


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="calibration without images"):
        calibrate(net(), [], ["w8a8"])
    with pytest.raises(InputError, match="calibration method: got kl; allowed: mse, minmax"):
        calibrate(net(), batches(), ["w8a8"], "kl")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="percentile: got 3"):
        calibrate(net(), batches(), ["w8a8"], "percentile", 3)
    with pytest.raises(UnknownName, match="unknown format: got 'w9a9'"):
        calibrate(net(), batches(), ["w9a9"])
    with pytest.raises(InputError, match=r"values of tensor x: got .*inf; allowed: finite numbers"):
        calibrate(net(), [torch.full((1, 4), torch.inf)], ["w8a8"])
