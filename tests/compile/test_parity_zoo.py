"""The zoo, one model of a kind, compiled: it is the simulator, end to end and layer by layer.

With integer layers a network is bit exact, whatever float operators lie between them. A layer in a
float format takes its sums in another order: there, each node is compared given the artifact's own
operands: it is at most one code or a few units in the last place away, all else is equal; and the
whole by its class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import Traced, compare, identical, run
from torch import Tensor

from hwmpq import data, zoo
from hwmpq.frontend.torch_export import trace
from hwmpq.quantize.calibrate import calibrate

torch.set_num_threads(1)
MENU = ("fp32", "w8a8", "bf16", "w4a8")
#: Weights by model, in the shared folder; without it and for the others: seeded random ones, whose
#: classes are next to ties.
WEIGHTS = {
    "resnet20_cifar": "resnet20_cifar10.safetensors",
    "resnet56_cifar": "resnet56_cifar10.safetensors",
    "mobilenet_v2_tf": "mobilenet_v2_tf.safetensors",
    "squeezenet1_1": "squeezenet1_1.safetensors",
    "vit_tiny": "deit_tiny.safetensors",
}
#: Models left out -> the model that has all their blocks.
ALIKE = {
    "resnet18": "resnet50", "resnet56_cifar": "resnet20_cifar", "mobilenet_v2": "mobilenet_v2_tf"
}  # fmt: skip
#: Models that are also built in mixed formats: one of a family.
MIXED = ("digits_cnn", "resnet20_cifar", "mobilenet_v2_tf", "squeezenet1_1", "vit_tiny")
#: The drift that is let pass at the outputs behind float layers, as a share of the largest one:
#: rounding of codes turns a last bit into a step, and twelve blocks of attention make more of it.
DRIFT = {"vit_tiny": 0.2}


@dataclass(frozen=True, eq=False)
class Case(Traced):
    images: Tensor
    trained: bool


def images(name: str, shape: tuple[int, ...], count: int) -> Tensor:
    """Digits, or smooth noise: something with edges and plains."""
    if name == "digits_cnn":
        return torch.from_numpy(data.load("digits").batch(range(count)))
    generator = torch.Generator().manual_seed(4)
    coarse = torch.randn(count, shape[1], shape[2] // 8, shape[3] // 8, generator=generator)
    fine = torch.randn(count, *shape[1:], generator=generator)
    return torch.nn.functional.interpolate(coarse, size=shape[2:]) + 0.2 * fine


@pytest.fixture(scope="module", params=[name for name in zoo.names() if name not in ALIKE])
def case(request: pytest.FixtureRequest) -> Case:
    name = request.param
    weights = None
    if name in WEIGHTS:
        try:
            weights = Path(request.getfixturevalue("shared_data")) / "weights" / WEIGHTS[name]
        except pytest.skip.Exception:
            weights = None
    if weights is not None and not weights.is_file():
        weights = None
    model = zoo.build(name, weights)
    small = model.input_shape[-1] < 64
    x = images(name, model.input_shape, 3 if small else 1)
    graph = trace(model.module, (x[:1],))
    menu = MENU if small else MENU[:-1]  # 4-bit scales are searched for: seconds in a large net
    trained = weights is not None or name == "digits_cnn"
    return Case(graph, calibrate(graph, [x], menu), menu, x, trained)


def test_with_integer_layers_every_bit_is_the_simulators(case: Case) -> None:
    built, simulator = case.built(case.uniform("w8a8"))
    for x in case.images.split(1):
        identical(simulator, run(built, x), [x])


@pytest.mark.parametrize("case", MIXED, indirect=True)
def test_each_layer_of_a_mixed_network(case: Case, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["case"]
    built, simulator = case.built(case.mixed(len(name)))
    for x in case.images.split(1):
        found = run(built, x)
        with torch.inference_mode():
            want = simulator(x)[0].numpy()
            compare(simulator, found, [x])
        (output,) = found.outputs
        assert np.abs(output - want).max() <= DRIFT.get(name, 0.05) * np.abs(want).max()
        if case.trained and name != "vit_tiny":
            assert output.argmax() == want.argmax()
