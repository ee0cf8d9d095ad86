"""Traces agree with exact Hessians within their standard error; `fisher` with its definition."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hwmpq import sensitivity
from hwmpq.formats import encoding_named, format_named
from hwmpq.graph import Graph, Node
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.scores import LOSSES
from hwmpq.quantizers import Quantizers
from hwmpq.sensitivity import hessian_trace
from hwmpq.sensitivity.task import Task

SAMPLES = 12


def net() -> Graph:
    """x -> convolution, gelu, product with itself, classifier: all kinds of layers, smooth."""
    rng = np.random.default_rng(2)
    conv = {"stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1}
    nodes = (
        Node("conv", "conv2d", ("x",), conv, {"weight": "conv.w"}),
        Node("gelu", "gelu", ("conv",), {"approximate": "none"}),
        Node("rows", "rearrange", ("gelu",), {"steps": [["reshape", [1, 3, 9]]]}),
        Node("gram", "matmul", ("rows", "rows"), {"trans_b": True, "scale": 0.5}),
        Node("mean", "mean", ("gram",), {"axes": [1], "keepdim": False}),
        Node("head", "linear", ("mean",), {}, {"weight": "head.w"}),
    )
    shapes = {"x": (1, 2, 3, 3), "conv": (1, 3, 3, 3), "gelu": (1, 3, 3, 3), "rows": (1, 3, 9)}
    shapes |= {"gram": (1, 3, 3), "mean": (1, 3), "head": (1, 4)}
    constants = {
        "conv.w": rng.normal(0, 0.4, (3, 2, 3, 3)).astype(np.float32),
        "head.w": rng.normal(0, 1, (4, 3)).astype(np.float32),
    }
    return Graph(("x",), ("head",), nodes, shapes, constants)


def logits(x: Tensor, conv: Tensor, a: Tensor, b: Tensor, head: Tensor, mean: Tensor) -> Tensor:
    """The net by hand; a, b, mean are added to what `gram` and `head` read."""
    rows = F.gelu(F.conv2d(x, conv, padding=1)).reshape(-1, 3, 9)
    gram = (rows + a) @ (rows + b).transpose(1, 2) * 0.5
    return F.linear(gram.mean(1) + mean, head)


@pytest.fixture(scope="module")
def case() -> tuple[Graph, Quantizers, Tensor, Tensor]:
    graph = net()
    x = torch.randn(SAMPLES, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    return graph, calibrate(graph, [x], ["w8a8", "w4a4"]), x, torch.arange(SAMPLES) % 4


def exact_traces(graph: Graph, x: Tensor, labels: Tensor) -> dict[tuple[str, int], float]:
    """By the whole Hessian of each place, sample after sample for an operand."""
    at = {
        ("conv", -1): torch.from_numpy(graph.constants["conv.w"]).double(),
        ("gram", 0): torch.zeros(SAMPLES, 3, 9).double(),
        ("gram", 1): torch.zeros(SAMPLES, 3, 9).double(),
        ("head", -1): torch.from_numpy(graph.constants["head.w"]).double(),
        ("head", 0): torch.zeros(SAMPLES, 3).double(),
        ("conv", 0): x.double(),
    }

    def loss(place: tuple[str, int], value: Tensor) -> Tensor:
        v = at | {place: value}
        y = logits(
            v["conv", 0], v["conv", -1], v["gram", 0], v["gram", 1], v["head", -1], v["head", 0]
        )
        return F.cross_entropy(y, labels)

    found = {}
    for place, value in at.items():
        gradient = torch.func.jacrev(partial(loss, place))
        hessian = torch.func.jacrev(gradient)(value)
        found[place] = float(hessian.reshape(value.numel(), value.numel()).trace())
    return found


def test_hutchinson_gives_the_exact_traces(case: tuple[Graph, Quantizers, Tensor, Tensor]) -> None:
    graph, quantizers, x, labels = case
    task = Task(
        graph, quantizers, {"x": x}, labels, tuple(n.name for n in graph.layers), ("w4a4",),
        np.ones((3, 1), bool), None, lambda item: None, None, None, 5, 0, LOSSES["cross-entropy"],
    )  # fmt: skip
    exact = exact_traces(graph, x, labels)
    traces = hessian_trace.hutchinson(task)
    assert set(traces) == set(exact)
    for place, values in traces.items():
        assert hessian_trace.LEAST <= len(values) <= hessian_trace.MOST
        error = values.std(ddof=1) / len(values) ** 0.5
        assert abs(values.mean() - exact[place]) < 3.5 * error, place
    # Neither another seed nor other batches change the law.
    other = hessian_trace.hutchinson(replace(task, batch=SAMPLES, seed=1))
    values = other["head", 0]
    error = values.std(ddof=1) / len(values) ** 0.5
    assert abs(values.mean() - exact["head", 0]) < 3.5 * error


def test_piecewise_linear_nets_need_plain_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways estimate the same traces; without products of layers there is less noise."""
    rng = np.random.default_rng(3)
    w = {n: rng.normal(0, 0.5, (6, 6)).astype(np.float32) for n in ("first.w", "last.w")}
    nodes = (
        Node("first", "linear", ("x",), {"act": "relu"}, {"weight": "first.w"}),
        Node("sum", "add", ("first", "x")),
        Node("last", "linear", ("sum",), {}, {"weight": "last.w"}),
    )
    graph = Graph(("x",), ("last",), nodes, dict.fromkeys(("x", "first", "sum", "last"), (1, 6)), w)
    x = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(0))
    task = Task(
        graph, Quantizers(), {"x": x}, torch.arange(SAMPLES) % 4, ("first", "last"), ("w4a4",),
        np.ones((2, 1), bool), None, lambda item: None, None, None, 5, 0, LOSSES["cross-entropy"],
    )  # fmt: skip
    assert hessian_trace.piecewise_linear(task)
    assert not hessian_trace.piecewise_linear(replace(task, graph=net()))
    linear = hessian_trace.hutchinson(task)
    monkeypatch.setattr(hessian_trace, "piecewise_linear", lambda task: False)
    monkeypatch.setattr(hessian_trace, "LEAST", 64)
    for place, values in hessian_trace.hutchinson(task).items():
        own = linear[place]
        error = np.hypot(*(v.std(ddof=1) / len(v) ** 0.5 for v in (values, own)))
        assert abs(values.mean() - own.mean()) < 3.5 * error, place
        assert own.std() < values.std() and (own > 0).all()


def test_the_estimate_is_trace_times_error(case: tuple[Graph, Quantizers, Tensor, Tensor]) -> None:
    graph, quantizers, x, labels = case
    exact = exact_traces(graph, x, labels)
    found = sensitivity.estimate(
        "hessian-trace", graph, quantizers, x, labels, formats=["w8a8", "w4a4"]
    )
    assert found.loss_error is not None and found.metric == "cross-entropy"
    fmt = format_named("w4a4")
    w = graph.constants["conv.w"]
    noise_w = float(((fmt.dequantize_weight(quantizers.weight("conv", "w4a4")) - w) ** 2).sum())
    q = quantizers.activation("x", "u4")
    noise_x = float((encoding_named("u4").fake(x, q.scale, q.zero) - x).square().sum()) / SAMPLES
    by_hand = exact["conv", -1] / w.size * noise_w / 2 + exact["conv", 0] / 18 * noise_x / 2
    assert abs(found.loss[0, 1] - by_hand) < 3.5 * found.loss_error[0, 1]


def test_fisher_is_its_definition(case: tuple[Graph, Quantizers, Tensor, Tensor]) -> None:
    graph, quantizers, x, labels = case
    found = sensitivity.estimate("fisher", graph, quantizers, x, labels, formats=["w4a4"])
    zero = torch.zeros(SAMPLES, 3)
    conv, head = (torch.from_numpy(graph.constants[n]) for n in ("conv.w", "head.w"))
    nothing = torch.zeros(SAMPLES, 3, 9)
    read = (logits(x, conv, nothing, nothing, torch.eye(3), zero)).detach()
    y = F.linear(read, head).requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(y, labels, reduction="sum"), y)
    fmt, q = format_named("w4a4"), quantizers.activation("mean", "u4")
    rounded = torch.from_numpy(fmt.dequantize_weight(quantizers.weight("head", "w4a4")))
    change = F.linear(encoding_named("u4").fake(read, q.scale, q.zero), rounded) - y.detach()
    by_hand = float((g * change).square().sum(1).mean()) / 2
    assert found.loss[2, 0] == pytest.approx(by_hand, rel=1e-4)
    assert found.loss_error is not None and 0 < found.loss_error[2, 0] < found.loss[2, 0]


def test_drawn_labels_stand_in_for_missing_ones(
    case: tuple[Graph, Quantizers, Tensor, Tensor],
) -> None:
    """Without labels the gradient of the loss is 0; that of drawn labels is not."""
    graph, quantizers, x, _ = case
    found = sensitivity.estimate("fisher", graph, quantizers, x, formats=["w8a8", "w4a4"])
    assert found.metric == "kl" and (found.loss > 0).all()
    assert (found.loss[:, 1] > found.loss[:, 0]).all()
