"""Sensitivity estimators: zero at fp32, monotone on a convex toy, resumable, deterministic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwmpq import sensitivity
from hwmpq.errors import InputError, UnknownName
from hwmpq.graph import Graph, Node
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.scores import LOSSES, Batch
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers
from hwmpq.sensitivity import rerun
from hwmpq.sensitivity.task import SHARED, Forecast, Kept, Task
from hwmpq.types import Sensitivity

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
    saved: dict[str, Kept] = {}

    def run(**more: object) -> Sensitivity:
        given = {"formats": FORMATS, "legal": legal, **more}
        found = sensitivity.estimate(name, graph, quantizers, x, **given)  # type: ignore[arg-type]
        assert (found.layers, found.formats, found.estimator) == (LAYERS, FORMATS, name)
        assert found.samples == 96 and found.metric
        return found

    whole = run(progress=lambda *step: steps.append(step), save=saved.__setitem__)
    loss, error = whole.loss, whole.loss_error
    assert error is not None and np.array_equal(error[:, 0], np.zeros(4))
    assert np.array_equal(loss[:, 0], np.zeros(4))
    assert np.isnan(loss[1, 2]) and np.isnan(loss).sum() == 1
    assert (loss[:, 3] > loss[:, 1]).all() and (loss[:, 4] > loss[:, 3]).all(), loss
    counts = [done for done, _, _ in steps]
    assert counts == sorted(set(counts)) and counts[-1] == steps[-1][1] >= 19
    assert steps[-1][2] == 0 and steps[0][2] > 0
    assert saved["last|w2a2"][0] == loss[3, 4] and len(saved) >= 19

    for stop in (5, len(saved) // 2, len(saved)):  # as if interrupted there
        known, again = dict(list(saved.items())[:stop]), dict[str, Kept]()
        resumed = run(done=known.get, save=again.__setitem__)
        for was, now in ((loss, resumed.loss), (error, resumed.loss_error)):
            assert now is not None and np.array_equal(was, now, equal_nan=True)
        if whole.pair_loss is not None and resumed.pair_loss is not None:
            assert np.array_equal(whole.pair_loss, resumed.pair_loss)
        assert set(again) | set(known) == set(saved)
    assert not again, "everything was known"


@pytest.mark.parametrize("name", ["measured", "clado-gn", "clado"])
def test_what_one_estimator_ran_another_does_not_run(
    name: str, case: tuple[Graph, Quantizers, torch.Tensor, torch.Tensor]
) -> None:
    graph, quantizers, x, labels = case
    saved: dict[str, Kept] = {}
    forecasts: list[Forecast] = []

    def run(of: str, **more: Any) -> Sensitivity:
        given = {"formats": FORMATS, "batch": 40, "forecast": forecasts.append, **more}
        return sensitivity.estimate(of, graph, quantizers, x, labels, **given)

    run("output-error", save=saved.__setitem__)
    shared = {item: kept for item, kept in saved.items() if item.startswith(SHARED)}
    alone, found = run(name), run(name, done=shared.get)
    assert np.array_equal(found.loss, alone.loss)
    if alone.pair_loss is not None:
        assert np.array_equal(found.pair_loss, alone.pair_loss)
    _, whole, rest = forecasts
    assert rest.layer_runs < whole.layer_runs
    assert name == "clado" or rest.layer_runs == len(LAYERS), "those of fp32"


def test_seeds(case: tuple[Graph, Quantizers, torch.Tensor, torch.Tensor]) -> None:
    """What draws numbers draws others for another seed, and the same for the same."""
    graph, quantizers, x, _ = case

    def run(name: str, seed: int) -> np.ndarray:
        formats = ["w4a4"]
        return sensitivity.estimate(name, graph, quantizers, x, formats=formats, seed=seed).loss

    for name in ("fisher", "hessian-trace"):
        assert np.array_equal(run(name, 3), run(name, 3))
        assert not np.array_equal(run(name, 3), run(name, 4))


@pytest.mark.parametrize("name", sensitivity.names())
def test_monotone_in_bits_on_a_convex_quadratic(name: str) -> None:
    """One linear layer and small logits: the loss is nearly a convex quadratic of what it reads."""
    formats = ["fp32", *(f"w{b}a{b}" for b in range(8, 1, -1))]
    w = np.random.default_rng(5).normal(0, 0.02, size=(16, 32)).astype(np.float32)
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
            loss, batch = LOSSES["cross-entropy"], Batch(reference, labels)
            more = (loss(y, batch) - loss(reference, batch)).mean()
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


def task_of(
    case: tuple[Graph, Quantizers, torch.Tensor, torch.Tensor], formats: tuple[str, ...]
) -> Task:
    graph, quantizers, x, labels = case
    legal = np.ones((4, len(formats)), bool)
    return Task(
        graph, quantizers, {"x": x}, labels, LAYERS, formats, legal,
        None, lambda item: None, None, None, 40, 0, LOSSES["cross-entropy"],
    )  # fmt: skip


def test_only_what_a_change_can_reach_is_run(
    case: tuple[Graph, Quantizers, torch.Tensor, torch.Tensor],
) -> None:
    runs = rerun.Runs(task_of(case, ("fp32", "w8a8", "bf16")))
    # `first` also feeds a fp32 layer, so it stays fp32; the sum before `last` is stored as codes.
    assert [runs.first_change(((i, 1),)) for i in range(4)] == [0, 1, 2, 1]
    # Both readers of `first` together make it codes, which neither of them alone does.
    assert runs.difference(((1, 1),), ((1, 1), (2, 1))) == 0
    assert runs.difference(((0, 1),), ((0, 1), (3, 1))) == 1
    assert rerun.alive_bytes(case[0]) == 4 * 24 * 2
    work = runs.work(runs.schedule([((0, 1),), ((2, 1),)]))
    assert work[((0, 1),)] > work[((2, 1),)]


def squared(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """A user's loss: the distance to the classes as one-hot vectors."""
    assert batch.labels is not None and batch.reference.shape == outputs.shape
    return (outputs - torch.nn.functional.one_hot(batch.labels, 5)).square().sum(1)


def whole(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    return squared(outputs, batch).mean()


def outside_torch(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    return torch.from_numpy(outputs.detach().numpy()).square().sum(1)


def of_fp32_only(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Not a number where the outputs are not float's."""
    return (batch.reference - outputs).abs().sum(1).neg().sqrt()


def test_the_users_loss(case: tuple[Graph, Quantizers, torch.Tensor, torch.Tensor]) -> None:
    graph, quantizers, x, labels = case
    everywhere = dict.fromkeys(LAYERS, "fp32")
    batch = Batch(Simulator(graph, everywhere, quantizers)(x)[0], labels)
    word = f"{__name__}:squared"
    formats = ["fp32", "w4a4"]
    found = sensitivity.estimate(
        "measured", graph, quantizers, x, labels, loss=word, formats=formats, batch=96
    )
    assert found.metric == word
    (y,) = Simulator(graph, {**everywhere, "left": "w4a4"}, quantizers)(x)
    more = squared(y, batch).double().mean() - squared(batch.reference, batch).double().mean()
    assert found.loss[1, 1] == pytest.approx(float(more), abs=1e-6)
    for name in set(sensitivity.names()) - {"measured", "output-error", "weight-error", "clado-gn"}:
        other = sensitivity.estimate(
            name, graph, quantizers, x[:16], labels[:16], loss=word, formats=formats
        )
        usual = sensitivity.estimate(name, graph, quantizers, x[:16], labels[:16], formats=formats)
        assert other.metric == word and np.isfinite(other.loss).all(), name
        assert not np.allclose(other.loss, usual.loss), name


@pytest.mark.parametrize(
    ("estimator", "loss", "words"),
    [
        ("measured", f"{__name__}:whole", r"shape of the result of loss .*whole: got \(\)"),
        ("measured", f"{__name__}:of_fp32_only", r"is not finite: got nan for sample 0, "),
        ("measured", f"{__name__}:FORMATS", r"FORMATS: got tuple; allowed: a function"),
        ("measured", f"{__name__}:missing", r"cannot find .*missing"),
        ("measured", "cross-entropie", r"unknown loss.*Nearest: cross-entropy"),
        ("fisher", f"{__name__}:outside_torch", r"without a gradient; allowed: torch operations"),
        ("hessian-trace", f"{__name__}:outside_torch", r"without a gradient"),
        ("output-error", "kl", r"got kl; allowed: none: .* any loss: .*measured"),
        ("clado-gn", f"{__name__}:squared", r"squared; allowed: cross-entropy, kl"),
    ],
)
def test_losses_that_are_refused(
    case: tuple[Graph, Quantizers, torch.Tensor, torch.Tensor],
    estimator: str, loss: str, words: str,
) -> None:  # fmt: skip
    graph, quantizers, x, labels = case
    with pytest.raises(InputError, match=words):
        sensitivity.estimate(
            estimator, graph, quantizers, x, labels, loss=loss, formats=["fp32", "w4a4"]
        )


def test_cross_entropy_needs_labels(
    case: tuple[Graph, Quantizers, torch.Tensor, torch.Tensor],
) -> None:
    graph, quantizers, x, _ = case
    with pytest.raises(InputError, match=r"cross-entropy without labels. Use the loss kl"):
        sensitivity.estimate(
            "measured", graph, quantizers, x, loss="cross-entropy", formats=["w4a4"]
        )


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
