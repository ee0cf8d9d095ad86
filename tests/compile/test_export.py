"""Hand-over: every form computes what the exact simulator computes, in the other program."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import nn

import hwmpq.cli
from hwmpq.cli.jobs import read_assignment
from hwmpq.errors import InputError, UnknownName
from hwmpq.export import assignment as handed_over
from hwmpq.export.onnx_qdq import qdq_model
from hwmpq.frontend.torch_export import trace
from hwmpq.graph import Graph
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.decomposed import exported
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers
from hwmpq.side_jobs.export import FORMS, export_model
from hwmpq.stages.job import Options

Outputs = NDArray[np.float32]
#: What runs a form's file, beside the packages that write it.
RUNTIMES = {"onnx-qdq": ("onnxruntime",)}
#: Formats that the layers take in turn: every kind of type that a form has to spell.
MIXES = (
    ("w8a8",), ("w4a8", "bf16", "w6a8"), ("w2a8", "w3a5", "w4a4", "w5a2"),
    ("w4.bf16.g16", "e4m3.fp16", "fp16"), ("e4m3", "e5m2.bf16", "fp32", "e4m3.bf16.g8"),
)  # fmt: skip


class Mixed(nn.Module):
    """Strides, groups, a residual, a concat, pools and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.point, self.side = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1, bias=False)
        self.qkv, self.head = nn.Linear(13, 24), nn.Linear(8, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.stem(x))
        y = torch.relu(self.point(torch.relu(self.deep(x))) + x)
        y = nn.functional.max_pool2d(torch.cat([y, self.side(x)], 1), 2).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(y).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        z = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head(nn.functional.gelu(z.reshape(len(x), -1, 8)).mean(1))


@cache
def case() -> tuple[Graph, torch.Tensor, Quantizers]:
    """The network, images of its batch size, and numbers for all formats of MIXES."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 11, 13)
    graph = trace(Mixed().eval(), (x,))
    menu = sorted({fmt for mix in MIXES for fmt in mix} | {"e2m1"})
    return graph, x, calibrate(graph, [x], menu, steps=["bias"])


def turns(graph: Graph, mix: tuple[str, ...]) -> dict[str, str]:
    """Layers in the formats in turn; matmuls in w8a8 or fp32, as kernels have them."""
    return {
        node.name: ("w8a8" if mix[0].startswith("w8") else "fp32")
        if node.op == "matmul"
        else mix[i % len(mix)]
        for i, node in enumerate(graph.layers)
    }


def distance(found: Outputs, want: Outputs) -> float:
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def in_onnxruntime(
    graph: Graph, assignment: dict[str, str], numbers: Quantizers, x: torch.Tensor
) -> Outputs:
    runtime = pytest.importorskip("onnxruntime", reason="the extra `bench` is not installed")
    model = qdq_model(graph, assignment, numbers).SerializeToString()
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found: Outputs = session.run(None, {graph.inputs[0]: x.numpy()})[0]
    return found


def in_torch(
    graph: Graph, assignment: dict[str, str], numbers: Quantizers, x: torch.Tensor
) -> Outputs:
    found: Outputs = exported(graph, assignment, numbers).module()(x).detach().numpy()
    return found


@pytest.mark.parametrize("run", [in_onnxruntime, in_torch])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix[0])
def test_a_form_is_the_simulator(
    run: Callable[[Graph, dict[str, str], Quantizers, torch.Tensor], Outputs], mix: tuple[str, ...]
) -> None:
    graph, x, numbers = case()
    assignment = turns(graph, mix)
    want = Simulator(graph, assignment, numbers)(x)[0].numpy()
    # a code next to the middle of two may fall on the other one, and what follows with it
    assert distance(run(graph, assignment, numbers, x), want) < 0.02


def test_biases_are_those_of_the_quantizers() -> None:
    graph, x, numbers = case()
    assignment = turns(graph, ("w8a8", "bf16"))
    biases = {key: bias + np.float32(0.5) for key, bias in numbers.biases.items()}
    shifted = replace(numbers, biases=biases)
    want = Simulator(graph, assignment, shifted)(x)[0].numpy()
    assert distance(Simulator(graph, assignment, numbers)(x)[0].numpy(), want) > 0.2
    for run in (in_onnxruntime, in_torch):
        assert distance(run(graph, assignment, shifted, x), want) < 0.02


def test_what_other_programs_have_no_type_for() -> None:
    graph, _, numbers = case()
    assignment = turns(graph, ("fp32",)) | {"head": "e2m1"}
    with pytest.raises(InputError, match=r"ONNX cannot round .*: got mean in e2m1; allowed: integ"):
        qdq_model(graph, assignment, numbers)
    with pytest.raises(InputError, match=r"torch has no type for tensor 'mean': got e2m1"):
        exported(graph, assignment, numbers)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """digits_cnn: an assignment, and its numbers."""
    from hwmpq import data
    from hwmpq.frontend.model import load_model

    folder = tmp_path_factory.mktemp("numbers")
    model = load_model("zoo:digits_cnn")
    graph = model.graph()
    assignment = turns(graph, ("w8a8", "w4a8", "bf16"))
    images = data.load("digits#train", model.normalization, (1, 1, 16, 16)).batch(range(32))
    calibrate(graph, [torch.from_numpy(images)], sorted(set(assignment.values()))).save(
        folder / "q.safetensors"
    )
    (folder / "a.json").write_text(json.dumps(assignment))
    return folder / "a.json", folder / "q.safetensors"


@pytest.mark.parametrize("form", FORMS)
def test_the_command(
    form: str, quantizers: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for package in (*FORMS[form].packages, *RUNTIMES.get(form, ())):
        pytest.importorskip(package, reason="the extra `bench` is not installed")
    out = tmp_path / f"m{FORMS[form].suffix}"
    words = ["export", "zoo:digits_cnn", "--input-shape", "64,1,16,16", "--to", form, "--json"]
    files = ["--assignment", quantizers[0], "--quantizers", quantizers[1], "--out", out]
    assert hwmpq.cli.main([*words, *map(str, files)]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["form"], told["nbytes"]) == (form, out.stat().st_size)
    if form == "assignment":
        TypeAdapter(handed_over.Handover).validate_json(out.read_text(), strict=True)
        assert read_assignment(out) == told["assignment"] == read_assignment(quantizers[0])
    else:
        accuracies = accuracy_of(form, out), accuracy_of("simulator", quantizers[1], told)
        assert abs(accuracies[0] - accuracies[1]) <= 100 / 64 and accuracies[0] > 95


def accuracy_of(form: str, file: Path, told: dict[str, dict[str, str]] | None = None) -> float:
    """Of the first 64 test images, in %."""
    from hwmpq import data
    from hwmpq.frontend.model import load_model

    model = load_model("zoo:digits_cnn")
    images = data.load("digits#test", model.normalization, (1, 1, 16, 16))
    x, labels = images.batch(range(64)), images.labels
    assert labels is not None
    if form == "simulator":
        assert told is not None
        simulator = Simulator(model.graph(), told["assignment"], Quantizers.load(file))
        y = simulator(torch.from_numpy(x))[0].numpy()
    elif form == "pt2e":
        y = torch.export.load(file).module()(torch.from_numpy(x)).detach().numpy()
    elif form == "openvino":
        import openvino

        y = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        y = session.run(None, {session.get_inputs()[0].name: x})[0]
    return float(100 * (y.argmax(1) == labels[:64]).mean())


def test_the_schema_is_that_of_the_file() -> None:
    assert json.loads(handed_over.SCHEMA.read_text()) == handed_over.schema()


def test_what_the_command_refuses(tmp_path: Path) -> None:
    options = Options("zoo:digits_cnn")
    with pytest.raises(UnknownName, match=r"form of export: got 'onnx-qd'.*Nearest: onnx-q"):
        export_model(options, {}, "onnx-qd", tmp_path / "a.onnx")
    with pytest.raises(InputError, match=r"file for onnx-qdq: got a.xml; allowed: NAME.onnx"):
        export_model(options, {}, "onnx-qdq", Path("a.xml"))
    with pytest.raises(InputError, match="the assignment lacks 6 of 6 layers"):
        export_model(options, {}, "onnx-qdq", tmp_path / "a.onnx")
