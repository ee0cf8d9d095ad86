"""Model families beyond the zoo: traced, quantized, compiled, and run as the simulator says."""

from __future__ import annotations

from dataclasses import dataclass

import models_beyond
import numpy as np
import pytest
import torch
from models_beyond import MODELS
from parity import Traced, compare, identical, run
from torch import Tensor, nn

from hwmpq.frontend.torch_export import trace
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.simulate import Simulator

torch.set_num_threads(1)
MENU = ("fp32", "w8a8", "bf16", "w4a8", "w2a8")
#: Largest drift at the outputs behind float layers, as a share of the largest output: codes that
#: round the other way, in networks of random weights.
DRIFT = 0.05


@dataclass(frozen=True, eq=False)
class Case(Traced):
    """inputs: two samples of each input."""

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]

    @property
    def sample(self) -> tuple[Tensor, ...]:
        return tuple(x[:1] for x in self.inputs)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    name = request.param
    module = models_beyond.build(name)
    generator = torch.Generator().manual_seed(4)
    inputs = tuple(torch.randn(2, *shape, generator=generator) for shape in MODELS[name].shapes)
    graph = trace(module, tuple(x[:1] for x in inputs))
    quantizers = calibrate(graph, [dict(zip(graph.inputs, inputs, strict=True))], MENU)
    return Case(graph, quantizers, MENU, name, module, inputs)


def test_in_fp32_it_is_torch(case: Case) -> None:
    """The simulator is; the artifacts below are the simulator."""
    simulator = Simulator(case.graph, case.uniform("fp32"), case.quantizers)
    with torch.no_grad():
        want = case.module(*case.sample)
        found = simulator(dict(zip(case.graph.inputs, case.sample, strict=True)))
    for mine, theirs in zip(found, want if isinstance(want, tuple) else [want], strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_in_w8a8_every_bit_is_the_simulators(case: Case) -> None:
    built, simulator = case.built(case.uniform("w8a8"))
    identical(simulator, run(built, *case.sample), case.sample)


def test_in_mixed_formats_each_node_is_the_simulators(case: Case) -> None:
    assignment = case.mixed(seed=len(case.name))
    built, simulator = case.built(assignment)
    found = run(built, *case.sample)
    with torch.inference_mode():
        want = simulator(dict(zip(case.graph.inputs, case.sample, strict=True)))
        compare(simulator, found, case.sample)
    for mine, theirs in zip(found.outputs, want, strict=True):
        assert np.abs(mine - theirs.numpy()).max() <= DRIFT * np.abs(theirs.numpy()).max()
