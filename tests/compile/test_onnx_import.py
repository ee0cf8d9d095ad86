"""ONNX files as models: what our export wrote comes back as it was; all else is refused by name."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import models_beyond
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hwmpq.errors import InputError, UnsafeFile, UnsupportedModel
from hwmpq.export.onnx import onnx_model
from hwmpq.frontend.model import LoadedModel, load_model
from hwmpq.frontend.torch_export import trace
from hwmpq.quantize.interpret import evaluate
from hwmpq.stages.job import Options, check_options

ZOO = ("digits_cnn", "resnet20_cifar", "mobilenet_v2_tf", "vit_tiny")
BEYOND = ("mobilenet_v3", "shufflenet", "convnext", "two_streams")


def first_output(found: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found[0]


@pytest.mark.parametrize("name", [*ZOO, *BEYOND])
def test_round_trip(name: str, tmp_path: Path) -> None:
    if name in ZOO:
        first = load_model(f"zoo:{name}")
    else:
        shapes = models_beyond.MODELS[name].shapes
        example = tuple(torch.zeros(1, *shape) for shape in shapes)
        first = LoadedModel(models_beyond.build(name), example, name)
    graph = first.graph()
    path = tmp_path / "net.onnx"
    onnx.save(onnx_model(graph), str(path))
    again = load_model(str(path))
    found = again.graph()
    assert [n.name for n in found.layers] == [n.name for n in graph.layers]
    assert [(n.op, n.attrs["residual"]) for n in found.layers] == [
        (n.op, n.attrs["residual"]) for n in graph.layers
    ]
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(e.shape, generator=generator) for e in first.example]
    with torch.no_grad():
        wanted = first_output(first.module(*x))
        ours = evaluate(found, dict(zip(found.inputs, x, strict=True)))[found.outputs[0]]
        both = (first_output(again.program(*x)), ours)  # type: ignore[operator]
    for y in both:
        assert float((y - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def write(path: Path, nodes: list[Any], constants: dict[str, Any], shape: list[Any]) -> str:
    """An ONNX file of x -> y."""
    body = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(body, opset_imports=opset, ir_version=10), str(path))
    return str(path)


WEIGHT = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)


def net(path: Path, shape: list[Any], *nodes: Any, **constants: Any) -> str:
    """A convolution, then the nodes, from 'c' to 'y'."""
    conv = helper.make_node("Conv", ["x", "w"], ["c"], name="/stem/stem.0/Conv")
    return write(path, [conv, *nodes], {"w": WEIGHT, **constants}, shape)


def test_operators_that_exporters_write_in_parts(tmp_path: Path) -> None:
    """Open sizes, GELU and SiLU in parts, uneven padding; the layer is called after its node."""
    node = helper.make_node
    nodes = [
        node("Div", ["c", "root"], ["d"]), node("Erf", ["d"], ["e"]),
        node("Add", ["e", "one"], ["f"]),
        node("Mul", ["c", "f"], ["g"]), node("Mul", ["g", "half"], ["h"]),
        node("Sigmoid", ["h"], ["i"]), node("Mul", ["h", "i"], ["j"]),
        node("AveragePool", ["j"], ["k"], kernel_shape=[2, 2], pads=[0, 0, 1, 1], strides=[2, 2],
             count_include_pad=1),
        node("Shape", ["k"], ["s"]), node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Concat", ["n", "rest"], ["t"], axis=0), node("Reshape", ["k", "t"], ["y"]),
    ]  # fmt: skip
    path = net(
        tmp_path / "a.onnx", ["batch", 3, 6, 6], *nodes, root=np.float32(2**0.5),
        one=np.float32(1), half=np.float32(0.5), zero=np.array([0]), rest=np.array([-1]),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"open sizes of input x: got \(batch, 3, 6, 6\).*--input"):
        load_model(path)
    with pytest.raises(InputError, match=r"input shape: got \(2, 4, 6, 6\); allowed: \(batch, 3"):
        load_model(path, None, (2, 4, 6, 6))
    loaded = load_model(path, None, (2, 3, 6, 6))
    graph = loaded.graph()
    assert [n.name for n in graph.layers] == ["stem.0"]
    assert {"gelu", "silu"} <= {n.op for n in graph.nodes}
    x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    y = torch.nn.functional.gelu(torch.conv2d(x, torch.from_numpy(WEIGHT)))
    y = torch.nn.functional.pad(torch.nn.functional.silu(y), (0, 1, 0, 1))
    wanted = torch.nn.functional.avg_pool2d(y, 2).flatten(1)
    with torch.no_grad():  # five samples on a model of batches of two
        assert torch.allclose(loaded.module(x), wanted, atol=1e-6)
    (found,) = evaluate(graph, {graph.inputs[0]: x[:2]}).keys() & set(graph.outputs)
    assert torch.allclose(evaluate(graph, {graph.inputs[0]: x[:2]})[found], wanted[:2], atol=1e-6)


def test_everything_unsupported_is_named_at_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Softsign", ["c"], ["a"], name="odd"),
        helper.make_node("LSTM", ["a", "w", "w"], ["b"], name="old"),
        helper.make_node("HardSigmoid", ["c"], ["y"], name="steep", alpha=0.3),
    ]
    path = net(tmp_path / "a.onnx", [1, 3, 6, 6], *nodes)
    with pytest.raises(UnsupportedModel, match="3 nodes") as told:
        load_model(path)
    for text in ("Softsign (node odd)", "LSTM (node old)", "HardSigmoid (node steep): alpha 0.3"):
        assert text in str(told.value)


def test_what_tracing_refuses_names_the_onnx_node(tmp_path: Path) -> None:
    path = net(
        tmp_path / "a.onnx", [1, 3, 6, 6], helper.make_node("Div", ["c", "c"], ["y"], "ratio")
    )
    with pytest.raises(UnsupportedModel, match=r"at node ratio: division by a computed tensor"):
        load_model(path).graph()


def test_external_weights_stay_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    folder.mkdir()
    path = Path(net(folder / "a.onnx", [1, 3, 6, 6], helper.make_node("Relu", ["c"], ["y"])))
    plain = load_model(str(path)).graph()
    onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, size_threshold=0,
              location="w.bin")  # fmt: skip
    assert np.array_equal(load_model(str(path)).graph().constants["stem.0.weight"],
                          plain.constants["stem.0.weight"])  # fmt: skip
    model = onnx.load(str(path), load_external_data=False)
    (folder / "w.bin").rename(tmp_path / "w.bin")
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    for location in ("../w.bin", str(tmp_path / "w.bin"), "link.bin"):
        (entry,) = (e for e in model.graph.initializer[0].external_data if e.key == "location")
        entry.value = location
        path.write_bytes(model.SerializeToString())
        with pytest.raises(UnsafeFile, match=r"weights of w outside the folder"):
            load_model(str(path))


def test_broken_and_old_files(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    with pytest.raises(InputError, match="no such model file"):
        load_model(str(path))
    path.write_bytes(b"\xff\xff no model")
    with pytest.raises(InputError, match="broken ONNX file"):
        load_model(str(path))
    net(path, [1, 3, 6, 6], helper.make_node("Relu", ["c"], ["y"]))
    model = onnx.load(str(path))
    model.opset_import[0].version = 11
    onnx.save(model, str(path))
    with pytest.raises(InputError, match=r"got 11; allowed: 13 or later"):
        load_model(str(path))
    with pytest.raises(InputError, match=r"weights for a .onnx file"):
        load_model(str(path), tmp_path / "w.safetensors")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *more: Any, **words: Any) -> Any:
        if name == "onnx":
            raise ImportError(name)
        return real(name, *more, **words)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match=r"the package onnx. Run: pip install 'hwmpq\[onnx\]'"):
        load_model(str(tmp_path / "a.onnx"))


@pytest.mark.parametrize("estimator", ["fisher", "hessian-trace"])
def test_estimators_by_gradients_are_refused(estimator: str) -> None:
    with pytest.raises(InputError, match=rf"by gradients for an ONNX model: got {estimator}; all"):
        check_options(Options("net.onnx", sensitivity=estimator))
    check_options(Options("net.onnx", sensitivity="measured"))


def test_a_bias_behind_a_matmul() -> None:
    """The canonical passes are torch's own: a bias added behind a matmul is the layer's."""

    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.offset = torch.nn.Parameter(torch.ones(4, 3)), torch.ones(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + self.offset

    graph = trace(Product(), (torch.zeros(2, 4),))
    (layer,) = graph.nodes
    assert layer.op == "linear" and np.array_equal(graph.constants[layer.params["bias"]], [1, 1, 1])
