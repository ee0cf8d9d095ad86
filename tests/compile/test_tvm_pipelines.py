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
from hwmpq.quantize.interpret import evaluate
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


class Padded(nn.Module):
    """Zeros around the channels, as in a shortcut of ResNet-20, and a constant beside a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.token = nn.Conv2d(3, 8, 1), nn.Parameter(torch.randn(1, 16, 1, 13))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = nn.functional.pad(self.conv(x), (0, 0, 0, 0, 3, 5))
        return torch.cat([self.token, wide], 2)


def test_what_the_onnx_front_end_makes_of_zeros_and_constants() -> None:
    """It writes a padding as a loop of its own."""
    x = torch.randn(1, 3, 11, 13)
    graph = trace(Padded().eval(), (x,))
    found = lower.graph_of(annotate()(from_onnx(onnx_model(graph))))
    assert [node.op for node in found.nodes] == ["conv2d", "pad", "constant", "concat"]
    (value,) = evaluate(found, {found.inputs[0]: x}).values()
    (want,) = evaluate(graph, {graph.inputs[0]: x}).values()
    torch.testing.assert_close(value, want)


class Beside(nn.Module):
    """What a TFLite file has in NHWC: a clamp, a depthwise one, a sum, a pad, a concat, a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.point, self.wide = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(14, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.stem(x))
        x = torch.relu(self.point(torch.relu(self.deep(x))) + x)
        x = torch.cat([self.wide(nn.functional.pad(x, (1, 1, 1, 1))), x], 1)
        return self.head(nn.functional.max_pool2d(x, 2).mean((2, 3)))


def in_tflite(model: Beside) -> Any:
    """The module on [1, 11, 13, 3] as a TFLite file."""
    from tflite import ActivationFunctionType as Act
    from tflite import Padding
    from tflite_file import File

    file, same = File(), {"Padding": Padding.SAME, "StrideH": 1, "StrideW": 1}

    def weights(name: str, axes: tuple[int, ...]) -> list[str]:
        layer = model.get_submodule(name)
        parts = {f"{name}.weight": layer.weight.permute(axes), f"{name}.bias": layer.bias}
        return [file.constant(k, v.detach().numpy()) for k, v in parts.items()]

    normal, deep = (0, 2, 3, 1), (1, 2, 3, 0)
    x, middle = file.tensor("x", (1, 11, 13, 3)), (1, 6, 7, 8)
    for name, like in {
        "stem": middle, "deep": middle, "point": middle, "sum": middle, "pad": (1, 8, 9, 8),
        "wide": (1, 6, 7, 6), "cat": (1, 6, 7, 14), "pool": (1, 3, 3, 14), "mean": (1, 14),
        "head": (1, 5),
    }.items():  # fmt: skip
        file.tensor(name, like)
    two = {"Padding": Padding.SAME, "StrideH": 2, "StrideW": 2}
    act = "FusedActivationFunction"
    file.apply("conv", [x, *weights("stem", normal)], "stem", **two, **{act: Act.RELU6})
    file.apply(
        "depthwise", ["stem", *weights("deep", deep)], "deep", DepthMultiplier=1, **same,
        **{act: Act.RELU},
    )  # fmt: skip
    file.apply("conv", ["deep", *weights("point", normal)], "point", **same)
    file.apply("add", ["point", "stem"], "sum", **{act: Act.RELU})
    around = file.constant("around", np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32))
    file.apply("pad", ["sum", around], "pad")
    valid = {**same, "Padding": Padding.VALID}
    file.apply("conv", ["pad", *weights("wide", normal)], "wide", **valid)
    file.apply("concat", ["wide", "sum"], "cat", Axis=3)
    pool = {**two, "Padding": Padding.VALID, "FilterHeight": 2, "FilterWidth": 2}
    file.apply("max_pool", ["cat"], "pool", **pool)
    axes = file.constant("axes", np.array([1, 2], np.int32))
    file.apply("mean", ["pool", axes], "mean", KeepDims=0)
    file.apply("linear", ["mean", *weights("head", (0, 1))], "head")
    return file.model([x], ["head"])


def test_the_tflite_front_end(checkout: Path) -> None:
    """In NHWC: the layers of the NCHW model, fused and named alike, and one change of layout."""
    pytest.importorskip("tflite", reason="the package tflite is not installed")
    from tvm.relax.frontend.tflite import from_tflite

    torch.manual_seed(0)
    model, x = Beside().eval(), torch.randn(4, 3, 11, 13)
    graph, file, made = trace(model, (x[:1],)), in_tflite(model), example("from_tflite", checkout)
    found = lower.graph_of(annotate(made["constants"](file))(from_tflite(file)))
    assert [n.op for n in found.nodes] == ["rearrange", *(n.op for n in graph.nodes)]
    for mine, other in zip(found.layers, graph.layers, strict=True):
        assert (mine.name, mine.op) == (other.name, other.op)
        assert mine.attrs["act"] == other.attrs["act"] and len(mine.inputs) == len(other.inputs)
    images = x.permute(0, 2, 3, 1).contiguous().numpy()
    run = made["quantized"](file, images)
    numbers = calibrate(graph, list(x.split(1)), ["w8a8"], steps=["bias"])
    simulated = Simulator(graph, {n.name: "w8a8" for n in graph.layers}, numbers)
    for image, same in zip(x.split(1), images, strict=True):
        want = simulated(image)[0].numpy()
        np.testing.assert_allclose(run(same[None]), want, rtol=1e-4, atol=1e-5)


def test_a_global_pool_in_either_layout() -> None:
    for layout, axes in (("NCHW", [1, 3]), ("NHWC", [1, 5])):
        x = relax.Var("x", relax.TensorType((1, 3, 4, 5), "float32"))
        builder = relax.BlockBuilder()
        with builder.function("main", [x]):
            with builder.dataflow():
                pooled = relax.op.nn.adaptive_avg_pool2d(x, (1, 1), layout=layout)
                out = builder.emit_output(builder.emit(pooled))
            builder.emit_func_output(out)
        graph = lower.graph_of(annotate()(builder.get()))
        (mean,) = (node for node in graph.nodes if node.op == "mean")
        assert list(graph.tensors[mean.name][:2]) == axes


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
