"""Sensitivity estimators: zero at fp32, monotone on a convex toy, resumable, deterministic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hwmpq import sensitivity
from hwmpq.errors import InputError, UnknownName
from hwmpq.graph import Graph, Node
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers
from hwmpq.sensitivity import rerun
from hwmpq.sensitivity.measured import losses
from hwmpq.sensitivity.task import Task

FORMATS = ("fp32", "w8a8", "w6a6", "w4a4", "w2a2", "bf16")
LAYERS = ("first", "left", "right", "last")


def linear(name: str, *inputs: str, act: str = "") -> Node:
    attrs = {"residual": len(inputs) > 1, "act": act}
    return Node(name, "linear", inputs, attrs, {"weight": f"{name}.weight"})


def net() -> Graph:
    """Two branches that are added, then a classifier."""
    nodes = (
        linear("first", "x", act="relu"),
        linear("left", "first"),
        linear("right", "first", act="relu"),
        Node("sum", "add", ("left", "right")),
        linear("last", "sum"),
    )
    shapes = {n: (1, 24) for n in ("x", "first", "left", "right", "sum")} | {"last": (1, 5)}
    rng = np.random.default_rng(0)
    weights = {n: rng.normal(0, 0.3, (shapes[n][1], 24)).astype(np.float32) for n in LAYERS}
    constants = {f"{n}.weight": w for n, w in weights.items()}
    return Graph(("x",), ("last",), nodes, shapes, constants)


@pytest.fixture(scope="module")
def case() -> tuple[Graph, Quantizers, torch.Tensor, torch.Tensor]:
    graph = net()
    x = torch.randn(96, 24, generator=torch.Generator().manual_seed(0))
    quantizers = calibrate(graph, [x], FORMATS)
    everywhere = dict.fromkeys(LAYERS, "fp32")
    labels = Simulator(graph, everywhere, quantizers)(x)[0].argmax(1)
    return graph, quantizers, x, labels


def test_the_registry() -> None:
    assert {"measured", "output-error", "weight-error"} <= set(sensitivity.names())
    with pytest.raises(UnknownName, match="unknown sensitivity estimator: got 'mesured'"):
        sensitivity.estimate("mesured", net(), Quantizers(), torch.zeros(1, 24), formats=["fp32"])


@pytest.mark.parametrize("name", sensitivity.names())
def test_every_estimator(
    name: str, case: tuple[Graph, Quantizers, torch.Tensor, torch.Tensor]
) -> None:
    """fp32 is zero, fewer bits are worse, illegal cells are nan, and a second run is the same."""
    graph, quantizers, x, _ = case
    legal = np.ones((4, 6), bool)
    legal[1, 2] = False
    steps: list[tuple[int, int, float]] = []
    saved: dict[str, float] = {}

    def run(**more: object) -> np.ndarray:
        given = {"formats": FORMATS, "legal": legal, **more}
        found = sensitivity.estimate(name, graph, quantizers, x, **given)  # type: ignore[arg-type]
        assert (found.layers, found.formats, found.estimator) == (LAYERS, FORMATS, name)
        assert found.samples == 96 and found.metric
        return found.loss

    loss = run(progress=lambda *step: steps.append(step), save=saved.__setitem__)
    assert np.array_equal(loss[:, 0], np.zeros(4))
    assert np.isnan(loss[1, 2]) and np.isnan(loss).sum() == 1
    assert (loss[:, 3] > loss[:, 1]).all() and (loss[:, 4] > loss[:, 3]).all(), loss
    assert [s[:2] for s in steps] == [(i, 19) for i in range(1, 20)]
    assert steps[-1][2] == 0 and steps[0][2] > 0
    assert len(saved) == 19 and saved["last|w2a2"] == loss[3, 4]

    known = dict(list(saved.items())[:11])
    again: dict[str, float] = {}
    resumed = run(done=known, save=again.__setitem__)
    assert np.array_equal(resumed, loss, equal_nan=True)
    assert set(again) == set(saved) - set(known)
    marked = run(done={**saved, "left|w8a8": 42.0})
    assert marked[1, 1] == 42


@pytest.mark.parametrize("name", ["output-error", "weight-error"])
def test_monotone_in_bits_on_a_convex_quadratic(name: str) -> None:
    """One linear layer, squared error: the loss is a convex quadratic of weights and input."""
    formats = ["fp32", *(f"w{b}a{b}" for b in range(8, 1, -1))]
    w = np.random.default_rng(5).normal(size=(16, 32)).astype(np.float32)
    node = Node("w", "linear", ("x",), {}, {"weight": "w"})
    graph = Graph(("x",), ("w",), (node,), {"x": (1, 32), "w": (1, 16)}, {"w": w})
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    quantizers = calibrate(graph, [x], formats)
    loss = sensitivity.estimate(name, graph, quantizers, x, formats=formats).loss[0]
    assert loss[0] == 0 and (np.diff(loss) > 0).all(), loss


def test_measured_is_the_loss_of_whole_runs(
    case: tuple[Graph, Quantizers, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, quantizers, x, labels = case
    everywhere = dict.fromkeys(LAYERS, "fp32")
    (reference,) = Simulator(graph, everywhere, quantizers)(x)
    found = sensitivity.estimate(
        "measured", graph, quantizers, x, labels, formats=FORMATS, batch=96
    ).loss
    for i, layer in enumerate(LAYERS):
        for j, fmt in enumerate(FORMATS[1:], 1):
            (y,) = Simulator(graph, {**everywhere, layer: fmt}, quantizers)(x)
            more = losses(y, reference, labels).mean() - losses(reference, reference, labels).mean()
            assert found[i, j] == pytest.approx(float(more), abs=1e-12)
    monkeypatch.setattr(rerun, "LIMIT_BYTES", 0)
    whole = sensitivity.estimate(
        "measured", graph, quantizers, x, labels, formats=FORMATS, batch=96
    ).loss
    assert np.array_equal(found, whole)


def test_without_labels_the_loss_is_the_distance_to_float(
    case: tuple[Graph, Quantizers, torch.Tensor, torch.Tensor],
) -> None:
    graph, quantizers, x, _ = case
    found = sensitivity.estimate("measured", graph, quantizers, x, formats=FORMATS)
    assert found.metric == "kl" and (found.loss >= 0).all()


def test_only_what_a_change_can_reach_is_run(
    case: tuple[Graph, Quantizers, torch.Tensor, torch.Tensor],
) -> None:
    graph, quantizers, x, _ = case
    formats = ("fp32", "w8a8", "bf16")
    task = Task(
        graph, quantizers, {"x": x}, None, LAYERS, formats, np.ones((4, 3), bool), None, {}, None,
        8, 0,
    )  # fmt: skip
    starts = {cell: rerun.first_change(task, cell) for cell in task.open_cells()}
    # `first` also feeds a fp32 layer, so it stays fp32; the sum before `last` is stored as codes.
    assert [starts[i, 1] for i in range(4)] == [0, 1, 2, 1]
    assert rerun.alive_bytes(graph) == 4 * 24 * 2
    work = rerun.work_per_cell(task)
    assert work[0, 1] > work[2, 1]


def test_what_is_refused(case: tuple[Graph, Quantizers, torch.Tensor, torch.Tensor]) -> None:
    graph, quantizers, x, labels = case

    def run(**more: object) -> None:
        sensitivity.estimate("measured", graph, quantizers, x, formats=["w8a8"], **more)  # type: ignore[arg-type]

    with pytest.raises(UnknownName, match="unknown layer: got 'frist'"):
        run(layers=["frist"])
    with pytest.raises(InputError, match=r"shape of legal: got \(1, 1\); allowed: \(4, 1\)"):
        run(legal=np.ones((1, 1), bool))
    with pytest.raises(InputError, match="labels: got 3; allowed: 96, one per sample"):
        run(labels=labels[:3])


def test_resnet20_ranks_its_layers(shared_data: Path) -> None:
    """On real weights: 8 bits cost almost nothing, 2 bits much, and few cells violate the order."""
    from hwmpq import zoo
    from hwmpq.frontend.torch_export import trace

    weights = shared_data / "weights" / "resnet20_cifar10_jpeg.safetensors"
    if not weights.is_file():
        pytest.skip(f"no {weights}")
    graph = trace(zoo.build("resnet20_cifar", weights).module, (torch.zeros(1, 3, 32, 32),))
    x = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 3 - 1.5
    formats = ("w8a8", "w4a4", "w2a2")
    quantizers = calibrate(graph, [x], formats)
    loss = sensitivity.estimate("measured", graph, quantizers, x, formats=formats).loss
    assert loss.shape == (20, 3) and np.median(loss[:, 0]) < 0.01
    assert (loss[:, 2] > loss[:, 0]).all()
    assert (np.diff(loss, axis=1) < 0).sum() <= 4, loss
