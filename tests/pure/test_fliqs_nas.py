"""Search for networks: the space, its prices, and what is taken out of the shared weights."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fliqs_nas_run import MENU, SETTINGS, SPACE, digits, largest, run

from hwmpq.errors import InputError
from hwmpq.formats import bops, format_named
from hwmpq.frontend.torch_export import trace
from hwmpq.graph import network_of
from hwmpq.methods.fliqs.policy import shares
from hwmpq.methods.fliqs_nas.drawn import Drawn
from hwmpq.methods.fliqs_nas.found import numbers, taken, write
from hwmpq.methods.fliqs_nas.network import Network
from hwmpq.methods.fliqs_nas.prices import Prices
from hwmpq.methods.fliqs_nas.shared import SharedWeights
from hwmpq.methods.fliqs_nas.space import graph_of, space_for
from hwmpq.quantize.simulate import Simulator
from hwmpq.search.evaluate import index_of


def drawn_picks(count: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    return np.array([[rng.integers(len(o)) for o in SPACE.options] for _ in range(count)])


def test_a_graph_is_what_tracing_the_module_gives() -> None:
    architecture = SPACE.architecture(drawn_picks(1)[0])
    traced = trace(Network(architecture).eval(), (torch.zeros(1, *SPACE.image),))
    made = graph_of(architecture, SPACE.image[1:])
    assert [replace(n, source="") for n in traced.nodes] == list(made.nodes)
    assert (traced.inputs, traced.outputs) == (made.inputs, made.outputs)
    assert dict(traced.tensors) == made.tensors
    assert {k: v.shape for k, v in traced.constants.items()} == {
        k: v.shape for k, v in made.constants.items()
    }


def test_a_plan_costs_what_its_layers_cost() -> None:
    prices = Prices(SPACE, MENU, lambda workloads, formats: np.array(
        [[w.macs * format_named(f).weight.bits for f in formats] for w in workloads], float
    ))  # fmt: skip
    picks = drawn_picks(20)
    formats = np.random.default_rng(6).integers(len(MENU), size=(20, len(prices.slots)))
    seconds, work = (prices.costs(name, picks, formats) for name in ("latency_s", "bops"))
    for own, chosen, second, operations in zip(picks, formats, seconds, work, strict=True):
        layers = network_of(graph_of(SPACE.architecture(own), SPACE.image[1:])).layers
        fmt = {s: format_named(MENU[f]) for s, f in zip(prices.slots, chosen, strict=True)}
        assert operations == sum(bops(fmt[la.name], la.workload.macs) for la in layers)
        assert second == sum(la.workload.macs * fmt[la.name].weight.bits for la in layers)
        assert prices.problem(own).layers == tuple(la.name for la in layers)


def test_the_space_ends_where_the_image_does() -> None:
    small, large = space_for((3, 32, 32), 10), space_for((3, 224, 224), 1000)
    assert [max(s.channels) for s in small.stages] == [16, 24, 32, 64, 96]
    assert small.stem == (32, 1) and large.stem == (32, 2) and len(large.stages) == 7
    assert large.last == 1280


def test_what_was_trained_is_what_is_taken_out() -> None:
    """With the statistics of one batch, for that batch; and the rounded weights are the same."""
    x = torch.from_numpy(digits().batch(range(64)))
    shared = SharedWeights(SPACE, MENU, x, seed=1)
    with torch.no_grad():
        for name, p in shared.parameters.items():
            if ".norm." in name:  # also negative factors
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    architecture = SPACE.architecture(largest()[0])
    graph = graph_of(architecture, SPACE.image[1:])
    plan = {n.name: MENU[i % len(MENU)] for i, n in enumerate(graph.layers)}
    module = taken(shared, architecture, plan, [x])
    found = trace(module, (x[:1],))
    own = numbers(shared, found, plan)
    expected = Drawn(shared, graph, plan)(x)[0]
    got = Simulator(found, plan, own, "fast")(x)[0]
    # A value on the edge of two codes may fall to either side.
    wrong = (got - expected).abs().amax(1) > 1e-3 * expected.abs().max()
    assert wrong.float().mean() < 0.1
    gamma = dict(module.named_parameters())["stem.norm.weight"].detach().numpy()
    raw = dict(module.named_parameters())["stem.conv.weight"].detach()
    fmt = format_named(plan["stem.conv"])
    codes = fmt.quantize_weight(
        raw.numpy(), shared.weight_scale("stem.conv", fmt, raw).detach().numpy()
    ).codes
    folded = own.weights["stem.conv", fmt.name].codes
    assert (folded == codes * np.sign(gamma).reshape(-1, 1, 1, 1)).mean() > 0.99


def test_a_search_ends_in_a_module_within_its_budget(tmp_path: Path) -> None:
    def stop(done: int, _of: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", note=stop)
    found, again = run(tmp_path / "whole"), run(tmp_path / "stopped")
    assert again.solution.choice == found.solution.choice
    for name, value in found.shared.parameters.items():
        assert torch.equal(again.shared.parameters[name], value), name
    plan = found.solution.choice
    used = shares(found.problem, index_of(found.problem, plan))["bops"]
    assert 0.9 <= used <= 1
    own = numbers(found.shared, found.graph, plan)
    write(tmp_path, found, own)
    x = torch.from_numpy(digits().batch(range(8)))
    module = runpy.run_path(str(tmp_path / "network.py"))["build"]()
    torch.testing.assert_close(module(x), found.module(x))
    with pytest.raises(InputError, match="separate"):
        run(tmp_path / "separate", replace(SETTINGS, separate=True))


def test_blocks_decide_together(tmp_path: Path) -> None:
    found = run(tmp_path, replace(SETTINGS, steps=2, decide="block"), share=0.4)
    for block in ("stages.0.0", "stages.1.0"):
        assert len({f for name, f in found.solution.choice.items() if name.startswith(block)}) == 1
