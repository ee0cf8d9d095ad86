"""Every zoo model compiled: the artifact is the simulator, end to end and layer by layer.

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
import tvm
from torch import Tensor

from hwmpq import data, lower, targets, zoo
from hwmpq.formats import encoding_named
from hwmpq.frontend.relax_module import relax_module
from hwmpq.frontend.torch_export import trace
from hwmpq.graph import Graph, workload_of
from hwmpq.lower.layout import NHWC, layouts
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers
from hwmpq.storage import is_integer
from hwmpq.types import Workload

torch.set_num_threads(1)
TARGET = targets.native()
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
#: Models that are also built in mixed formats: one of a family.
MIXED = ("digits_cnn", "resnet20_cifar", "resnet18", "mobilenet_v2_tf", "squeezenet1_1", "vit_tiny")
#: The drift that is let pass at the outputs behind float layers, as a share of the largest one:
#: rounding of codes turns a last bit into a step, and twelve blocks of attention make more of it.
DRIFT = {"vit_tiny": 0.2}
ULP = {"fp32": 2.0**-18, "bf16": 2.0**-7, "fp16": 2.0**-10}


@dataclass(frozen=True, eq=False)
class Case:
    """A traced and calibrated model."""

    graph: Graph
    quantizers: Quantizers
    menu: tuple[str, ...]
    images: Tensor
    trained: bool

    def uniform(self, fmt: str) -> dict[str, str]:
        return {node.name: fmt for node in self.graph.layers}

    def mixed(self, seed: int) -> dict[str, str]:
        """Seeded formats; equal layers share one, which keeps the kernels to be compiled few."""
        rng = np.random.default_rng(seed)
        chosen: dict[Workload, str] = {}
        for node in self.graph.layers:
            menu = [f for f in self.menu if f != "w4a8"] if node.op == "matmul" else self.menu
            chosen.setdefault(workload_of(node, self.graph), str(rng.choice(menu)))
        return {n.name: chosen[workload_of(n, self.graph)] for n in self.graph.layers}


def images(name: str, shape: tuple[int, ...], count: int) -> Tensor:
    """Digits, or smooth noise: something with edges and plains."""
    if name == "digits_cnn":
        return torch.from_numpy(data.load("digits").batch(range(count)))
    generator = torch.Generator().manual_seed(4)
    coarse = torch.randn(count, shape[1], shape[2] // 8, shape[3] // 8, generator=generator)
    fine = torch.randn(count, *shape[1:], generator=generator)
    return torch.nn.functional.interpolate(coarse, size=shape[2:]) + 0.2 * fine


@pytest.fixture(scope="module", params=zoo.names())
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


@dataclass(frozen=True, eq=False)
class Run:
    """What an artifact gave for one image: its first output, and every kernel's result by name."""

    output: np.ndarray
    written: dict[str, np.ndarray]


def run(built: lower.Built, x: Tensor) -> Run:
    machine = tvm.relax.VirtualMachine(built.executable, tvm.cpu())
    seen = []

    def after(_f: object, name: str, before: bool, _r: object, *args: object) -> int:
        if not before and name.startswith("hwmpq_"):
            seen.append(args[-1].numpy().copy())  # type: ignore[attr-defined]
        return 0

    machine.set_instrument(after)
    arrays = [tvm.runtime.tensor(a) for a in (x.numpy(), *built.parameters.values())]
    output = machine["main"](*arrays).numpy()
    return Run(output, dict(zip(built.calls, seen, strict=True)))


def held(raw: np.ndarray, encoding: str, layout: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor in memory as the simulator holds it."""
    if layout == NHWC:
        n, c, h, w = shape
        raw = raw.reshape(n, h, w, c).transpose(0, 3, 1, 2)
    raw = np.ascontiguousarray(raw.reshape(shape))
    if is_integer(encoding):
        return torch.from_numpy(raw.astype(np.float32))
    return torch.from_numpy(np.array(encoding_named(encoding).dequantize(raw)))


def compare(simulator: Simulator, found: Run, x: Tensor) -> None:
    """Each node on the artifact's own operands."""
    graph, does = simulator.graph, simulator._does
    stored, layout = simulator.resolved.plan.stored, layouts(graph)
    tensors = {name: does.store(name, x) for name in graph.inputs}
    for node in graph.nodes:
        args = [does.read(node, i, tensors[t]) for i, t in enumerate(node.inputs)]
        want = (does.layer if node.is_layer else does.glue)(node, args)
        if node.name not in found.written:  # a view
            tensors[node.name] = want
            continue
        encoding = stored[node.name]
        mine = held(found.written[node.name], encoding, layout[node.name], graph.tensors[node.name])
        tensors[node.name] = mine
        if not node.is_layer or simulator.resolved.layers[node.name].epilogue.integer:
            assert torch.equal(mine, want), (node.name, encoding)
            continue
        differs = (mine - want).abs()
        if not is_integer(encoding):
            # A sum's last bits belong to its terms; of a small sum of large terms they are larger.
            bound = ULP[encoding] * want.abs().clamp(min=1e-3 * float(want.abs().max()))
            if encoding == "fp32":
                bound = ULP[encoding] * want.abs().max()
            assert bool((differs <= bound).all()), (node.name, encoding, float(differs.max()))
            continue
        assert float(differs.max()) <= 1, (node.name, encoding)
        assert float((differs > 0).float().mean()) < 1e-3, node.name


def built_for(case: Case, assignment: dict[str, str]) -> tuple[lower.Built, Simulator]:
    built = lower.build(relax_module(case.graph), assignment, case.quantizers, TARGET)
    return built, Simulator(case.graph, assignment, case.quantizers)


def test_with_integer_layers_every_bit_is_the_simulators(case: Case) -> None:
    built, simulator = built_for(case, case.uniform("w8a8"))
    stored, layout = simulator.resolved.plan.stored, layouts(case.graph)
    for x in case.images.split(1):
        found = run(built, x)
        tensors: dict[str, Tensor] = {}
        with torch.inference_mode():
            want = simulator(x, tensors.__setitem__)[0].numpy()
        assert np.array_equal(found.output, want)
        for name, raw in found.written.items():
            if name in tensors:
                mine = held(raw, stored[name], layout[name], case.graph.tensors[name])
                assert torch.equal(mine, tensors[name]), name


@pytest.mark.parametrize("case", MIXED, indirect=True)
def test_each_layer_of_a_mixed_network(case: Case, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["case"]
    built, simulator = built_for(case, case.mixed(len(name)))
    for x in case.images.split(1):
        found = run(built, x)
        with torch.inference_mode():
            want = simulator(x)[0].numpy()
            compare(simulator, found, x)
        assert np.abs(found.output - want).max() <= DRIFT.get(name, 0.05) * np.abs(want).max()
        if case.trained and name != "vit_tiny":
            assert found.output.argmax() == want.argmax()
