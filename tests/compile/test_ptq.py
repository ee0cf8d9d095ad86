"""Post-training quantization and training: each step does to a small network what it promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hwmpq.data import DataSet, from_arrays
from hwmpq.errors import InputError, UnknownName
from hwmpq.graph import Graph, Node
from hwmpq.quantize.adaround import Keeper, Settings, adaround
from hwmpq.quantize.blocks import block_ends
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.correct import corrected
from hwmpq.quantize.equalize import chains, equalized
from hwmpq.quantize.finetune import Settings as TrainSettings
from hwmpq.quantize.finetune import finetune
from hwmpq.quantize.interpret import evaluate
from hwmpq.quantize.ptq import check_steps
from hwmpq.quantize.ranges import Histogram, quantizer_of
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers

CHANNELS, SIZE, CLASSES = 12, 8, 5
FORMAT = "w3a8"


def network(act: str = "relu", hi: float = 6.0) -> Graph:
    """conv, depthwise, pointwise with unequal channels; their mean; a linear layer."""
    rng = np.random.default_rng(3)
    c = CHANNELS
    spread = np.geomspace(0.05, 1, c).reshape(-1, 1, 1, 1)
    values = {
        "a.weight": rng.normal(0, 0.4, (c, 3, 3, 3)) * spread,
        "a.bias": rng.normal(0.1, 0.1, c) * spread.ravel(),
        "b.weight": rng.normal(0, 0.4, (c, 1, 3, 3)),
        "b.bias": rng.normal(0.1, 0.2, c),
        "c.weight": rng.normal(0.1, 0.4, (c, c, 1, 1)),
        "c.bias": rng.normal(0, 0.2, c),
        "fc.weight": rng.normal(0, 0.5, (CLASSES, c)),
        "fc.bias": rng.normal(0, 0.2, CLASSES),
    }
    bounds = {"act_lo": 0.0, "act_hi": hi} if act == "clamp" else {}

    def conv(name: str, x: str, groups: int, act: str, pad: int) -> Node:
        attrs = {
            "stride": (1, 1), "padding": (pad,) * 4, "dilation": (1, 1), "groups": groups,
            "act": act, **(bounds if act == "clamp" else {}),
        }  # fmt: skip
        params = {"weight": f"{name}.weight", "bias": f"{name}.bias"}
        return Node(name, "conv2d", (x,), attrs, params)

    nodes = (
        conv("a", "x", 1, act, 1),
        conv("b", "a", c, act, 1),
        conv("c", "b", 1, "", 0),
        Node("pooled", "mean", ("c",), {"axes": (2, 3), "keepdim": False}),
        Node("fc", "linear", ("pooled",), {}, {"weight": "fc.weight", "bias": "fc.bias"}),
    )
    image = (1, c, SIZE, SIZE)
    tensors = {
        "x": (1, 3, SIZE, SIZE), "a": image, "b": image, "c": image, "pooled": (1, c),
        "fc": (1, CLASSES),
    }  # fmt: skip
    constants = {name: value.astype(np.float32) for name, value in values.items()}
    return Graph(("x",), ("fc",), nodes, tensors, constants)


def images(count: int = 32, seed: int = 0) -> Tensor:
    """Smooth ones, as real images are: neighbours and channels go together."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 3, 3, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic")
    return smooth + 0.2 * torch.randn(count, 3, SIZE, SIZE, generator=generator)


GRAPH = network()
BATCHES = list(images().split(8))
PLAN = dict.fromkeys(("a", "b", "c", "fc"), FORMAT)


@pytest.fixture(scope="module")
def plain() -> Quantizers:
    return calibrate(GRAPH, BATCHES, [FORMAT])


@pytest.fixture(scope="module")
def shifted() -> Quantizers:
    return calibrate(GRAPH, BATCHES, [FORMAT], steps=["bias"])


def float_outputs(graph: Graph, x: Tensor, name: str = "") -> Tensor:
    seen: dict[str, Tensor] = {}
    evaluate(graph, {"x": x}, seen.__setitem__)
    return seen[name or graph.outputs[0]]


def error(quantizers: Quantizers, name: str = "fc") -> float:
    """Mean squared error of a float tensor on images that nothing was fitted to."""
    x, seen = images(64, seed=1), dict[str, Tensor]()
    Simulator(GRAPH, PLAN, quantizers)(x, seen.__setitem__)
    return float((seen[name] - float_outputs(GRAPH, x, name)).square().mean())


def test_equalization_keeps_the_function_and_levels_the_channels() -> None:
    found = equalized(GRAPH, BATCHES)
    level = Quantizers(constants=found).graph(GRAPH)
    x = images(16, seed=2)
    torch.testing.assert_close(
        float_outputs(level, x), float_outputs(GRAPH, x), rtol=1e-4, atol=1e-5
    )
    before, after = (float_outputs(g, x, "a").amax((0, 2, 3)) for g in (GRAPH, level))
    assert after.max() / after.min() < 0.5 * before.max() / before.min()
    assert [chain.producer.name for chain in chains(GRAPH)] == ["a", "b"]


def test_a_channel_at_the_bound_of_a_clamp_stays() -> None:
    x = torch.cat(BATCHES)
    reach = float_outputs(GRAPH, x, "a").amax((0, 2, 3))
    graph = network("clamp", float(reach.median()))
    found = equalized(graph, BATCHES)
    level = Quantizers(constants=found).graph(graph)
    torch.testing.assert_close(
        float_outputs(level, x), float_outputs(graph, x), rtol=1e-4, atol=1e-5
    )
    touching = float_outputs(graph, x, "a").amax((0, 2, 3)) >= float(reach.median())
    same = (found["a.bias"] == graph.constants["a.bias"]) & (graph.constants["a.bias"] != 0)
    assert same[touching.numpy()].all() and not same[~touching.numpy()].all()


def test_bias_takes_back_the_mean_shift(plain: Quantizers, shifted: Quantizers) -> None:
    """Of one rounded layer, on the images it was measured on."""
    x = torch.cat(BATCHES)
    plan = {**dict.fromkeys(PLAN, "fp32"), "c": "w3.bf16"}

    def shift(steps: list[str]) -> float:
        q = calibrate(GRAPH, BATCHES, ["w3.bf16"], steps=steps)
        seen: dict[str, Tensor] = {}
        Simulator(GRAPH, plan, q)(x, seen.__setitem__)
        gap = seen["c"].mean((0, 2, 3)) - float_outputs(GRAPH, x, "c").mean((0, 2, 3))
        return float(gap.abs().max())

    assert shift(["bias"]) < 0.1 * shift([])
    assert error(shifted) < error(plain)


def test_affine_brings_back_means_and_deviations(plain: Quantizers, shifted: Quantizers) -> None:
    found = corrected(GRAPH, PLAN, shifted, BATCHES)
    x = torch.cat(BATCHES)
    seen: dict[str, Tensor] = {}
    Simulator(GRAPH, PLAN, found, "fast")(x, seen.__setitem__)
    want = float_outputs(GRAPH, x, "c")
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(
            statistic(seen["c"], (0, 2, 3)), statistic(want, (0, 2, 3)), rtol=0.03, atol=0.02
        )
    assert error(found) < error(plain)


@pytest.mark.parametrize("blocks", [False, True])
def test_adaround_beats_nearest_and_resumes(plain: Quantizers, blocks: bool) -> None:
    settings = Settings(blocks=blocks, iterations=80)
    kept: dict[str, bytes] = {}
    told: list[float] = []
    first = adaround(
        GRAPH, PLAN, plain, BATCHES, settings,
        Keeper(kept.get, kept.__setitem__, forecast=told.append),
    )  # fmt: skip
    assert error(first, "c") < 0.85 * error(plain, "c")
    assert told[0] > 0
    for key, weight in first.weights.items():
        moved = np.abs(weight.codes.astype(int) - plain.weights[key].codes.astype(int))
        assert moved.max() <= 1
        np.testing.assert_array_equal(weight.scale, plain.weights[key].scale)
    saved = dict(kept)
    del saved["fc"]
    learned: list[str] = []
    again = adaround(
        GRAPH, PLAN, plain, BATCHES, settings,
        Keeper(saved.get, lambda unit, value: learned.append(unit)),
    )  # fmt: skip
    assert learned == ["fc"]
    for key, weight in first.weights.items():
        np.testing.assert_array_equal(again.weights[key].codes, weight.codes)


def test_blocks_end_where_one_tensor_carries_on() -> None:
    assert block_ends(GRAPH) == [1, 2, 3, 5]


def test_all_numbers_survive_a_file(tmp_path: Path) -> None:
    start = calibrate(GRAPH, BATCHES, [FORMAT], steps=["equalize", "bias"])
    found = corrected(GRAPH, PLAN, start, BATCHES)
    found.only(PLAN).save(tmp_path / "q.safetensors")
    read = Quantizers.load(tmp_path / "q.safetensors")
    one, other = (Simulator(GRAPH, PLAN, q)(images(4))[0] for q in (found, read))
    assert torch.equal(one, other) and len(found.constants) > 0 and len(found.biases) > 0


def labelled() -> DataSet:
    x = images(64, seed=4)
    return from_arrays(x.numpy(), float_outputs(GRAPH, x).argmax(1).numpy())


def test_training_helps_and_resumes_as_if_never_stopped(plain: Quantizers, tmp_path: Path) -> None:
    settings = TrainSettings(30, batch=16, rate=2e-3, distill=1, augment=True, checkpoint=10)
    whole = finetune(GRAPH, PLAN, plain, labelled(), settings)
    assert error(whole.quantizers) < 0.5 * error(plain)
    path = tmp_path / "checkpoint.safetensors"

    def stop(step: int, loss: float) -> None:
        if step == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(GRAPH, PLAN, plain, labelled(), settings, path, stop)
    steps: list[int] = []
    resumed = finetune(GRAPH, PLAN, plain, labelled(), settings, path, lambda k, _: steps.append(k))
    assert steps[0] == 11 and resumed.loss == whole.loss
    for key, weight in whole.quantizers.weights.items():
        np.testing.assert_array_equal(resumed.quantizers.weights[key].codes, weight.codes)
    with pytest.raises(InputError, match=r"checkpoint .* of another run"):
        finetune(GRAPH, PLAN, plain, labelled(), TrainSettings(steps=31), path)


def test_the_trained_network_is_the_deployed_one(shifted: Quantizers) -> None:
    """Simulating fast what was trained gives what training saw, also for corrected biases."""
    settings = TrainSettings(steps=1, batch=16, rate=1e-12)
    trained = finetune(GRAPH, PLAN, shifted, labelled(), settings).quantizers
    x = images(8)
    one, other = (Simulator(GRAPH, PLAN, q)(x)[0] for q in (trained, shifted))
    assert float((one - other).abs().max()) < 0.02 * float(other.abs().max())
    assert all(trained.activations[k].zero == q.zero for k, q in shifted.activations.items())


@pytest.mark.parametrize(
    ("change", "text"),
    [({"steps": 0}, "steps"), ({"rate": 0.0}, "rate"), ({"distill": 1.5}, "distill")],
)
def test_impossible_settings(plain: Quantizers, change: dict[str, float], text: str) -> None:
    with pytest.raises(InputError, match=text):
        finetune(GRAPH, PLAN, plain, labelled(), TrainSettings(**{"steps": 1, **change}))  # type: ignore[arg-type]


def test_unknown_step() -> None:
    check_steps(("bias", "adaround"))
    with pytest.raises(UnknownName, match="step of --ptq"):
        check_steps(("adarond",))


def test_entropy_cuts_a_long_tail_and_keeps_a_full_range() -> None:
    rng = np.random.default_rng(0)

    def top(values: np.ndarray) -> float:
        h = Histogram(0.0, float(values.max()))
        h.add(torch.from_numpy(values.astype(np.float32)))
        return quantizer_of(h, "u4", "entropy", 100).scale * 15

    tailed = np.concatenate([np.abs(rng.normal(0, 1, 20000)), np.array([30.0])])
    assert top(tailed) < 15
    assert top(rng.uniform(0, 1, 20000)) > 0.9
