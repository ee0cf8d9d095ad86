"""Other runtimes beside ours: the ONNX hand-over, the int8 file, the worker's programs, peaks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwmpq import peers, targets
from hwmpq.errors import InputError, UnknownName
from hwmpq.formats import format_named
from hwmpq.frontend.torch_export import trace
from hwmpq.graph import GLUE_OPS, LAYER_NODE_OPS
from hwmpq.kernels.micro import micros
from hwmpq.measure import Cell, Protocol, time_block
from hwmpq.peers.rival import Rival, write_files

SHAPE = (1, 3, 12, 12)


class Tiny(nn.Module):
    """Convolutions with a residual, attention, and every glue operator that files must carry."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)
        self.token = nn.Parameter(torch.linspace(-1, 1, 8).reshape(1, 1, 8))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = F.relu(self.deep(x) + x)
        x = torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(F.hardswish(x), 2)], 2)
        pooled = F.silu(x).mean((2, 3))
        tokens = torch.cat([self.token, x.flatten(2).transpose(1, 2)], 1)
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, -1)
        seen = F.scaled_dot_product_attention(q, k, v)
        seen = F.gelu(seen) + torch.tanh(seen) * torch.sigmoid(seen) + F.hardsigmoid(seen)
        return self.head(torch.cat([pooled, seen[:, 0]], 1))


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("onnx", reason="the extra `bench` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `bench` is not installed")
    images = np.random.default_rng(1).standard_normal((16, *SHAPE[1:])).astype(np.float32)
    graph = trace(tiny(), (torch.zeros(SHAPE),))
    return write_files(graph, tmp_path_factory.mktemp("onnx"), images)


def outputs(file: Path, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def test_files_compute_what_torch_computes(files: dict[str, Path]) -> None:
    x = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
    with torch.inference_mode():
        right = tiny()(torch.from_numpy(x)).numpy()
    assert np.abs(outputs(files["fp32"], x) - right).max() < 1e-5
    error = np.abs(outputs(files["int8"], x) - right).max()
    assert 1e-6 < error < 0.2 * np.abs(right).max()


def test_the_int8_file_is_quantized(files: dict[str, Path]) -> None:
    import onnx

    model = onnx.load(str(files["int8"]))
    stored = {item.name: item.data_type for item in model.graph.initializer}
    weights = [
        node.input[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0].endswith("weight_quantized")
    ]
    assert len(weights) >= 3
    assert {stored[name] for name in weights} == {onnx.TensorProto.INT8}


def test_every_operator_can_be_written() -> None:
    from hwmpq.export.onnx import WRITERS

    assert set(WRITERS) == {*LAYER_NODE_OPS, *GLUE_OPS}


@pytest.mark.parametrize(
    ("runtime", "precision"),
    [("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"), ("openvino", "int8"),
     ("torch", "fp32")],
)  # fmt: skip
def test_programs_run(
    files: dict[str, Path], runtime: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(runtime, reason="the extra `bench` is not installed")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    rival = Rival("test_peers:tiny", None, SHAPE, files)
    function, settings = rival.program(runtime, precision)
    load: Callable[..., Any] = __import__(f"hwmpq.peers.{runtime}", fromlist=["load"]).load
    assert function == f"hwmpq.peers.{runtime}:load"
    threads = torch.get_num_threads()
    try:
        call, description = load(settings)
        result = call()
    finally:
        torch.set_num_threads(threads)
    assert description["precision"] == precision and description["version"]
    assert result is not None


def test_programs_are_timed_in_one_block(files: dict[str, Path]) -> None:
    rival = Rival("unused", files=files)
    cells = []
    for precision in ("fp32", "int8"):
        function, settings = rival.program("onnxruntime", precision)
        cells.append(Cell(precision, "program", function=function, settings=settings))
    wrong = {**cells[0].settings, "precision": "e4m3"}
    cells.append(Cell("wrong", "program", function=cells[0].function, settings=wrong))
    cells.append(Cell("foreign", "program", function="os:system", settings={}))
    protocol = Protocol(rounds=2, epoch_s=0.001, pin=False, settle=True)
    good, other, wrong_one, foreign = time_block(cells, protocol)
    for timing in (good, other):
        assert not timing.error and timing.latency_s > 0
    assert good.quality["description"]["precision"] == "fp32"
    assert "precision of onnxruntime: got e4m3" in wrong_one.error
    assert "not a callable function: got os:system" in foreign.error


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"not installed: no_such_package.*hwmpq\[bench\]"):
        peers.need("numpy", "no_such_package")
    with pytest.raises(UnknownName, match="unknown runtime: got 'tensorrt'"):
        Rival("zoo:digits_cnn").program("tensorrt")
    monkeypatch.setattr("hwmpq.peers.rival.need", lambda *_: None)
    with pytest.raises(InputError, match="no int8 file of zoo:digits_cnn"):
        Rival("zoo:digits_cnn", files={"fp32": Path("x")}).program("openvino", "int8")


def test_peaks_lie_below_what_the_core_can_do() -> None:
    """At most 64 products of 16 bit, 128 of 8 bit per cycle (AVX-512), at most 6.5 GHz."""
    from hwmpq.measure.peaks import peak_macs_per_s

    target = targets.native()
    widest = {"float32": 32, "int16": 64, "int8": 256}
    able = [m for m in micros() if m.requires <= target.features]
    assert able
    for micro in able:
        fmt = next(f for f in map(format_named, ("fp32", "w8a8", "w4a8")) if not micro.why_not(f))
        rate = peak_macs_per_s(micro, fmt, target)
        assert 1e8 < rate < widest[micro.w_dtype] * 6.5e9, micro.name


def test_bandwidths_fall_from_level_to_level() -> None:
    from hwmpq.measure.peaks import read_bandwidths

    levels = read_bandwidths(targets.native())
    assert [level.nbytes for level in levels] == sorted(level.nbytes for level in levels)
    assert levels[-1].name == "memory"
    assert levels[0].bytes_per_s > levels[-1].bytes_per_s > 1e8
