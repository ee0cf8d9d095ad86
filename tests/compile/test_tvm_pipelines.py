"""Modules of TVM's own front ends, and hand-written ones, through pipelines with our passes."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from onnx import numpy_helper
from torch import nn
from tvm import relax
from tvm.ir.instrument import pass_instrument
from tvm.relax.frontend.onnx import from_onnx

from hwmpq import lower, targets
from hwmpq.export.onnx import onnx_model
from hwmpq.frontend.relax_import import annotate
from hwmpq.frontend.torch_export import trace
from hwmpq.graph import Graph
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.simulate import Simulator


class Small(nn.Module):
    """BatchNorm, a clamp, a residual, a pool and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.point = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.norm(self.stem(x)))
        x = torch.relu(self.point(torch.relu(self.deep(x))) + x)
        return self.head(nn.functional.max_pool2d(x, 2).mean((2, 3)))


def example(name: str, checkout: Path) -> dict[str, Any]:
    return runpy.run_path(str(checkout / "examples" / "tvm" / f"{name}.py"))


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, torch.Tensor, Graph]:
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(8, 3, 11, 13)
    return model, x, trace(model, (x[:1],))


def test_the_onnx_front_end(case: tuple[nn.Module, torch.Tensor, Graph], checkout: Path) -> None:
    """What TVM makes of the file becomes the graph that our own front end makes of the model."""
    model, x, graph = case
    file = onnx_model(graph)
    weights = {item.name: numpy_helper.to_array(item) for item in file.graph.initializer}
    found = lower.graph_of(annotate(weights)(from_onnx(file)))
    assert [(n.name, n.op, n.attrs.get("act", "")) for n in found.layers] == [
        (n.name, n.op, n.attrs["act"]) for n in graph.layers
    ]
    assert [n.op for n in found.nodes] == [n.op for n in graph.nodes]
    run = example("from_onnx", checkout)["quantized"](file, x.numpy())
    numbers = calibrate(graph, list(x.split(1)), ["w8a8"], steps=["bias"])
    simulated = Simulator(graph, {n.name: "w8a8" for n in graph.layers}, numbers)
    with torch.no_grad():
        for image in x.split(1):
            y, want, real = run(image.numpy()), simulated(image)[0].numpy(), model(image).numpy()
            np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
            assert np.abs(y - real).max() <= 2 * np.abs(want - real).max() + 1e-5


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of TVM's own use of torch
def test_the_torch_front_end(case: tuple[nn.Module, torch.Tensor, Graph], checkout: Path) -> None:
    model, x, _ = case
    assignment = {"stem": "w8a8", "deep": "bf16", "point": "w4a8", "head": "fp32"}
    run = example("from_torch", checkout)["quantized"](model, x, assignment)
    with torch.no_grad():
        want = model(x[:1]).numpy()
    assert 0 < np.abs(run(x[:1].numpy()) - want).max() < 0.1 * np.abs(want).max()


def test_hand_written_relax(checkout: Path) -> None:
    made = example("hand_written", checkout)
    module = made["written"]()
    x = np.random.default_rng(1).normal(size=(8, 3, 16, 16)).astype(np.float32)
    lowered, run = made["quantized"](module, x)
    script = lowered.script()
    assert "R.exp" in script and "R.nn.conv2d" not in script and "R.matmul" not in script
    executable = relax.build(module, tvm.target.Target(dict(targets.native().tvm)))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    want = machine["main"](tvm.runtime.tensor(x[:1])).numpy()
    assert 0 < np.abs(run(x[:1]) - want).max() < 0.1 * np.abs(want).max()


def test_passes_are_seen_by_instruments_and_print(
    case: tuple[nn.Module, torch.Tensor, Graph],
) -> None:
    _, x, graph = case
    seen: dict[str, str] = {}

    @pass_instrument
    class Note:
        def run_after_pass(self, module: Any, info: Any) -> None:
            if info.name.startswith("hwmpq."):
                seen[info.name] = module.script()

    file = onnx_model(graph)
    weights = {item.name: numpy_helper.to_array(item) for item in file.graph.initializer}
    target = targets.native()
    named = lower.graph_of(annotate(weights)(from_onnx(file)))
    passes = tvm.transform.Sequential(
        [
            annotate(weights),
            relax.transform.FoldConstant(),
            lower.assign_formats({n.name: "w8a8" for n in graph.layers}),
            lower.select_kernels(target),
            lower.lower_annotated(calibrate(named, [x[:1]], ["w8a8"]), target),
        ]
    )
    with tvm.transform.PassContext(instruments=[Note()]):
        passes(from_onnx(file))
    assert list(seen) == [
        "hwmpq.Annotate", "hwmpq.AssignFormats", "hwmpq.SelectKernels", "hwmpq.LowerAnnotated"
    ]  # fmt: skip
    assert '"hwmpq.name": "stem"' in seen["hwmpq.Annotate"]
    assert '"hwmpq.format": "w8a8"' in seen["hwmpq.AssignFormats"]
    assert '"hwmpq.kernel": "conv2d.' in seen["hwmpq.SelectKernels"]
    assert "hwmpq_conv2d" in seen["hwmpq.LowerAnnotated"]
