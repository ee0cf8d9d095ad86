"""Is a compiled network its simulator? What the tests of the zoo's and of other models share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import tvm
from torch import Tensor

from hwmpq import lower, targets
from hwmpq.formats import encoding_named
from hwmpq.frontend.relax_module import relax_module
from hwmpq.graph import Graph, workload_of
from hwmpq.lower.layout import NHWC, layouts
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers
from hwmpq.storage import is_integer
from hwmpq.types import Workload

TARGET = targets.native()
ULP = {"fp32": 2.0**-18, "bf16": 2.0**-7, "fp16": 2.0**-10}


@dataclass(frozen=True, eq=False)
class Traced:
    """A traced and calibrated model; menu: the formats it has quantizers for."""

    graph: Graph
    quantizers: Quantizers
    menu: tuple[str, ...]

    def uniform(self, fmt: str) -> dict[str, str]:
        return {node.name: fmt for node in self.graph.layers}

    def mixed(self, seed: int) -> dict[str, str]:
        """Seeded formats; equal layers share one, which keeps the kernels to be compiled few."""
        rng = np.random.default_rng(seed)
        chosen: dict[Workload, str] = {}
        for node in self.graph.layers:
            narrow = ("w4a8", "w2a8") if node.op == "matmul" else ()
            menu = [f for f in self.menu if f not in narrow]
            chosen.setdefault(workload_of(node, self.graph), str(rng.choice(menu)))
        return {n.name: chosen[workload_of(n, self.graph)] for n in self.graph.layers}

    def built(self, assignment: dict[str, str]) -> tuple[lower.Built, Simulator]:
        built = lower.build(relax_module(self.graph), assignment, self.quantizers, TARGET)
        return built, Simulator(self.graph, assignment, self.quantizers)


@dataclass(frozen=True, eq=False)
class Run:
    """What an artifact gave for one sample: its outputs, and every kernel's result by name."""

    outputs: list[np.ndarray]
    written: dict[str, np.ndarray]


def run(built: lower.Built, *inputs: Tensor) -> Run:
    machine = tvm.relax.VirtualMachine(built.executable, tvm.cpu())
    seen = []

    def after(_f: object, name: str, before: bool, _r: object, *args: object) -> int:
        if not before and name.startswith("hwmpq_"):
            seen.append(args[-1].numpy().copy())  # type: ignore[attr-defined]
        return 0

    machine.set_instrument(after)
    given = (*(x.numpy() for x in inputs), *built.parameters.values())
    result = machine["main"](*(tvm.runtime.tensor(a) for a in given))
    outputs = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
    return Run([y.numpy() for y in outputs], dict(zip(built.calls, seen, strict=True)))


def held(raw: np.ndarray, encoding: str, layout: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor in memory as the simulator holds it."""
    if layout == NHWC:
        n, c, h, w = shape
        raw = raw.reshape(n, h, w, c).transpose(0, 3, 1, 2)
    raw = np.ascontiguousarray(raw.reshape(shape))
    if is_integer(encoding):
        return torch.from_numpy(raw.astype(np.float32))
    return torch.from_numpy(np.array(encoding_named(encoding).dequantize(raw)))


def identical(simulator: Simulator, found: Run, inputs: Sequence[Tensor]) -> None:
    """Every output and every kernel's result is the simulator's, bit by bit, end to end."""
    graph = simulator.graph
    stored, layout = simulator.resolved.plan.stored, layouts(graph)
    tensors: dict[str, Tensor] = {}
    with torch.inference_mode():
        want = simulator(dict(zip(graph.inputs, inputs, strict=True)), tensors.__setitem__)
    for name, mine, theirs in zip(graph.outputs, found.outputs, want, strict=True):
        assert np.array_equal(mine, theirs.numpy()), name
    for name, raw in found.written.items():
        if name in tensors:
            mine = held(raw, stored[name], layout[name], graph.tensors[name])
            assert torch.equal(mine, tensors[name]), name


def compare(simulator: Simulator, found: Run, inputs: Sequence[Tensor]) -> None:
    """Each node on the artifact's own operands."""
    graph, does = simulator.graph, simulator._does
    stored, layout = simulator.resolved.plan.stored, layouts(graph)
    tensors = {name: does.store(name, x) for name, x in zip(graph.inputs, inputs, strict=True)}
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
