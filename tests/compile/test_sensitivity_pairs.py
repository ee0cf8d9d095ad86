"""Pair terms equal whole runs, reuse changes nothing but the work, Gauss-Newton is definite."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from hwmpq import sensitivity
from hwmpq.graph import Graph, Node
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.scores import LOSSES, Batch
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers
from hwmpq.sensitivity import rerun
from hwmpq.sensitivity.clado_block import blocks
from hwmpq.sensitivity.task import Forecast

FORMATS = ("fp32", "w4a4", "w2.bf16", "e2m1")
BATCH = 7  # of the 20 samples: the last one is smaller
Case = tuple[Graph, Quantizers, torch.Tensor, torch.Tensor]


def net() -> Graph:
    """Convolutions with a residual, self-attention over the pixels, a classifier."""
    rng = np.random.default_rng(1)
    conv = {"stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1}
    weights = {"stem": (6, 3, 3, 3), "mid": (6, 6, 3, 3), "out": (6, 6, 3, 3)}
    weights |= {"q": (6, 6), "v": (6, 6), "head": (4, 6)}
    nodes = (
        Node("stem", "conv2d", ("x",), {**conv, "act": "relu"}, {"weight": "stem.w"}),
        Node("mid", "conv2d", ("stem",), {**conv, "act": "relu"}, {"weight": "mid.w"}),
        Node("out", "conv2d", ("mid", "stem"), {**conv, "residual": True}, {"weight": "out.w"}),
        Node("tokens", "rearrange", ("out",),
             {"steps": [["reshape", [1, 6, 16]], ["permute", [0, 2, 1]]]}),
        Node("q", "linear", ("tokens",), {}, {"weight": "q.w"}),
        Node("v", "linear", ("tokens",), {}, {"weight": "v.w"}),
        Node("qk", "matmul", ("q", "tokens"), {"trans_b": True, "scale": 0.4}),
        Node("soft", "softmax", ("qk",), {"axis": 2}),
        Node("av", "matmul", ("soft", "v"), {"trans_b": False, "scale": 1.0}),
        Node("sum", "add", ("av", "tokens")),
        Node("pool", "mean", ("sum",), {"axes": [1], "keepdim": False}),
        Node("head", "linear", ("pool",), {}, {"weight": "head.w"}),
    )  # fmt: skip
    image, tokens = (1, 6, 4, 4), (1, 16, 6)
    shapes = {"x": (1, 3, 4, 4), "stem": image, "mid": image, "out": image, "qk": (1, 16, 16)}
    shapes |= {"soft": (1, 16, 16), "pool": (1, 6), "head": (1, 4)}
    shapes |= dict.fromkeys(("tokens", "q", "v", "av", "sum"), tokens)
    constants = {
        f"{n}.w": rng.normal(0, 1.5 / np.prod(s[1:]) ** 0.5, s).astype(np.float32)
        for n, s in weights.items()
    }
    return Graph(("x",), ("head",), nodes, shapes, constants)


@pytest.fixture(scope="module")
def case() -> Case:
    graph = net()
    x = torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    quantizers = calibrate(graph, [x], [*FORMATS, "w8a8", "bf16"])
    labels = torch.arange(20) % 4
    return graph, quantizers, x, labels


def legal(graph: Graph) -> np.ndarray:
    """Matmuls in e2m1 only; one cell less."""
    able = np.ones((len(graph.layers), len(FORMATS)), bool)
    for i, node in enumerate(graph.layers):
        if node.op == "matmul":
            able[i, 1:3] = False
    able[1, 2] = False
    return able


def brute_force(case: Case, choice: dict[str, str]) -> float:
    """Increase of the mean loss when these layers leave fp32, by whole runs."""
    graph, quantizers, x, labels = case
    everywhere = dict.fromkeys((n.name for n in graph.layers), "fp32")
    ref, y = (
        torch.cat(
            [Simulator(graph, everywhere | c, quantizers)(part)[0] for part in x.split(BATCH)]
        )
        for c in ({}, choice)
    )
    loss = LOSSES["kl" if labels is None else "cross-entropy"]
    return float((loss(y, Batch(ref, labels)) - loss(ref, Batch(ref, labels))).mean())


def test_clado_is_what_whole_runs_give(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, quantizers, x, labels = case
    able = legal(graph)
    forecasts: list[Forecast] = []

    def run() -> sensitivity.Sensitivity:
        return sensitivity.estimate(
            "clado", graph, quantizers, x, labels, formats=FORMATS, legal=able, batch=BATCH,
            forecast=forecasts.append,
        )  # fmt: skip

    found = run()
    c, error = found.pair_loss, found.pair_error
    assert c is not None and error is not None and np.array_equal(c, c.T)
    cells = [(i, j) for i, j in np.argwhere(able) if j]
    rows = [i * len(FORMATS) + j for i, j in cells]
    rest = np.setdiff1d(np.arange(len(c)), rows)
    assert not c[rest].any()
    alone = {}
    for cell, row in zip(cells, rows, strict=True):
        alone[cell] = brute_force(case, {found.layers[cell[0]]: FORMATS[cell[1]]})
        assert found.loss[cell] == pytest.approx(alone[cell], abs=1e-12)
        assert c[row, row] == 2 * found.loss[cell]
    for one, other in combinations(cells, 2):
        choice = {found.layers[i]: FORMATS[j] for i, j in (one, other)}
        both = brute_force(case, choice) - alone[one] - alone[other] if len(choice) == 2 else 0.0
        at = one[0] * len(FORMATS) + one[1], other[0] * len(FORMATS) + other[1]
        assert c[at] == pytest.approx(both, abs=1e-12)
        assert (error[at] > 0) == (len(choice) == 2 and both != 0)

    assert found.layer_runs == forecasts[0].layer_runs
    assert found.layer_runs_without_reuse == forecasts[0].without_reuse
    assert found.layer_runs < 0.6 * found.layer_runs_without_reuse
    monkeypatch.setattr(rerun, "LIMIT_BYTES", 0)
    whole = run()
    assert whole.pair_loss is not None and np.array_equal(whole.pair_loss, c)
    assert np.array_equal(whole.loss, found.loss, equal_nan=True)
    assert whole.layer_runs == whole.layer_runs_without_reuse == forecasts[1].layer_runs


def test_clado_block_measures_neighbours_only(case: Case) -> None:
    graph, quantizers, x, labels = case
    block = blocks(graph)
    names = list(block)
    assert block == {"stem": 0, "mid": 1, "out": 1, "q": 2, "v": 2, "qk": 2, "av": 2, "head": 3}

    def run(name: str) -> np.ndarray:
        formats = ("w8a8", "bf16")
        found = sensitivity.estimate(name, graph, quantizers, x, labels, formats=formats)
        assert found.pair_loss is not None
        return found.pair_loss

    some, every = run("clado-block"), run("clado")
    for (i, a), (j, b) in combinations(enumerate(names), 2):
        at = np.s_[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        assert np.array_equal(
            some[at], every[at] if abs(block[a] - block[b]) <= 1 else 0 * every[at]
        )
        assert every[at].any()


def test_gauss_newton(case: Case) -> None:
    """Equal to its definition, semidefinite, and near the measured loss for small errors."""
    graph, quantizers, x, _ = case
    found = sensitivity.estimate(
        "clado-gn", graph, quantizers, x, formats=FORMATS, legal=legal(graph)
    )
    c = found.pair_loss
    assert c is not None and np.linalg.eigvalsh(c).min() > -1e-9 * np.abs(c).max()
    everywhere = dict.fromkeys((n.name for n in graph.layers), "fp32")

    def logits(choice: dict[str, str]) -> torch.Tensor:
        return Simulator(graph, everywhere | choice, quantizers)(x)[0].double()

    p = logits({}).softmax(1)
    one, other = logits({"stem": "w4a4"}) - logits({}), logits({"head": "e2m1"}) - logits({})
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    term = (one[:, None, :] @ middle @ other[:, :, None]).mean()
    assert c[1, 7 * len(FORMATS) + 3] == pytest.approx(float(term), rel=1e-5)
    assert found.loss[0, 1] == pytest.approx(c[1, 1] / 2)
    assert found.pair_error is not None and (found.pair_error[1, 1] > 0)

    gauss, measured = (
        sensitivity.estimate(name, graph, quantizers, x, formats=("w8a8",)).loss
        for name in ("clado-gn", "measured")
    )
    assert gauss == pytest.approx(measured, rel=0.05)
