"""The judge of accuracy: paired drops, metrics, and a trained network at eight bits."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from hwmpq.errors import InputError, UnknownName
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.judge import judge, predict
from hwmpq.quantize.scores import Batch
from hwmpq.quantize.simulate import Simulator


def label_two(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """A user's metric: labels 2 that are found."""
    return 100.0 * ((outputs.argmax(1) == 2) & (batch.labels == 2))


def test_the_paired_drop() -> None:
    labels = torch.arange(100) % 4
    reference = torch.nn.functional.one_hot(labels, 4).float()
    simulated = reference.clone()
    simulated[:6] = simulated[:6].roll(1, 1)
    found = judge(reference, simulated, labels)
    assert (found.metric, found.n, found.float) == ("top1", 100, 100.0)
    assert found.drop == pytest.approx(6) and found.agreement == pytest.approx(94)
    assert 0 < found.drop_interval[0] < 6 < found.drop_interval[1] < 15
    same = judge(reference, reference, labels)
    assert same.drop == 0 and same.drop_interval[0] < 0 < same.drop_interval[1]
    noisy = judge(reference, reference * 1.1, metric="sqnr")
    assert noisy.simulated == pytest.approx(20, abs=1e-3) and noisy.float == 120
    assert judge(reference, simulated).metric == "agreement"
    own = judge(reference, simulated, labels, f"{__name__}:label_two")
    assert own.metric == f"{__name__}:label_two" and (own.float, own.simulated) == (25, 24)
    with pytest.raises(UnknownName, match="unknown metric: got 'top2'"):
        judge(reference, simulated, labels, "top2")
    with pytest.raises(InputError, match="metric top1 without labels"):
        judge(reference, simulated, metric="top1")
    with pytest.raises(InputError, match="outputs and labels differ in size"):
        judge(reference, simulated[:3])


def cifar(shared_data: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of the packed CIFAR-10 test set, and their labels."""
    image = pytest.importorskip("PIL.Image")
    path = shared_data / "cifar10_test.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with np.load(path) as packed:
        ends, jpeg, labels = packed["offsets"], packed["jpeg"], packed["labels"]
    opened = (image.open(io.BytesIO(jpeg[ends[i] : ends[i + 1]].tobytes())) for i in range(count))
    return np.stack([np.asarray(one.convert("RGB")) for one in opened]), labels[:count]


def test_resnet20_loses_less_than_a_point_at_eight_bits(shared_data: Path) -> None:
    from hwmpq import zoo
    from hwmpq.data import DataSet
    from hwmpq.frontend.torch_export import trace

    weights = shared_data / "weights" / "resnet20_cifar10_jpeg.safetensors"
    if not weights.is_file():
        pytest.skip(f"no {weights}")
    model = zoo.build("resnet20_cifar", weights)
    pixels, labels = cifar(shared_data, 628)
    data = DataSet(pixels, labels.astype(np.int64), model.mean, model.std, "cifar10", "")
    graph = trace(model.module, (torch.zeros(model.input_shape),))
    calib = torch.from_numpy(data.batch(range(500, 628)))
    quantizers = calibrate(graph, [calib], ["w8a8"])
    judged = data.subset(range(500))
    simulator = Simulator(graph, dict.fromkeys((n.name for n in graph.layers), "w8a8"), quantizers)
    outputs = [predict(one, judged) for one in (model.module, simulator)]
    assert judged.labels is not None
    found = judge(*outputs, torch.from_numpy(judged.labels))
    assert found.float > 80 and found.drop < 1 and found.agreement > 98, found
