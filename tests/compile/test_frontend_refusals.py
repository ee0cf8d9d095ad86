"""What is taken as a model, and what is refused and why."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_frontend import Net, image
from torch import Tensor, nn

from hwmpq.errors import InputError, UnknownName, UnsupportedModel
from hwmpq.frontend.model import load_model
from hwmpq.frontend.torch_export import from_exported, trace


def test_all_unsupported_operators_are_listed_with_their_lines() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.fc = nn.ConvTranspose2d(3, 3, 2, 2), nn.Linear(16, 4)
            self.one = nn.Conv1d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            y = torch.cumsum(y, 2)
            y = F.pad(y, (1, 1, 0, 0), mode="reflect")[..., 1:-1]
            y = self.one(y.flatten(2)).reshape(y.shape)
            values, _ = y.topk(16, -1)
            y = self.fc(values)
            y = y + F.interpolate(y, size=y.shape[2:], mode="bilinear")
            y = y + F.interpolate(y[..., 1:], size=(16, 4))
            return y.roll(1)

    with pytest.raises(UnsupportedModel) as caught:
        trace(Model().eval(), (image(batch=1),))
    text = str(caught.value)
    for op, why in (
        ("aten.conv_transpose2d.input", "transposed convolution"),
        ("aten.cumsum.default", "unsupported operator"),
        ("aten.pad.default", "padding other than with zeros"),
        ("aten.conv1d.default", "1d convolution"),
        ("aten.topk.default", "sorting and searching are not supported"),
        ("aten.upsample_bilinear2d.vec", "interpolating resize"),
        ("aten.upsample_nearest2d.vec", "nearest resize from 16x3 to 16x4"),
        ("aten.roll.default", "roll of the flattened tensor"),
    ):
        lines = [line for line in text.splitlines() if op in line]
        assert len(lines) == 1 and why in lines[0] and f"{Path(__file__).name}:" in lines[0]
    assert text.startswith("8 operators cannot be taken:\n  aten.")
    assert text.splitlines()[-1].startswith("Replace them, or cut the model")


def test_control_flow_on_values_is_refused() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.fc(x) if x.sum() > 0 else x

    with pytest.raises(UnsupportedModel, match=r"torch.export cannot trace the model"):
        trace(Net(forward, fc=nn.Linear(4, 4)), (torch.randn(1, 4),))


def test_bad_models_are_refused() -> None:
    broken = nn.Linear(4, 4)
    broken.weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match=r"NaN or Inf in weights: got fc.weight"):
        trace(Net(lambda net, x: net.fc(x), fc=broken), (torch.randn(1, 4),))
    with pytest.raises(InputError, match="no layer that takes a number format"):
        trace(nn.ReLU(), (torch.randn(1, 4),))
    with pytest.raises(InputError, match=r"weights of another type: got weight \(torch.float64\)"):
        trace(nn.Linear(4, 4, bias=False).double(), (torch.randn(1, 4).double(),))
    dynamic = torch.export.export(
        nn.Linear(4, 4), (torch.randn(2, 4),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    with pytest.raises(InputError, match="symbolic size in input"):
        from_exported(dynamic)


def test_load_model_forms(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="Nearest: resnet18"):
        load_model("zoo:resnet-18")
    with pytest.raises(InputError, match=r"cannot be read: got net.ckpt; allowed: zoo:NAME"):
        load_model("net.ckpt")
    with pytest.raises(InputError, match="unknown form of model"):
        load_model("resnet18")
    with pytest.raises(InputError, match=r"no input shape: got torch.nn:Identity"):
        load_model("torch.nn:Identity")
    with pytest.raises(InputError, match="result of collections:OrderedDict: got OrderedDict"):
        load_model("collections:OrderedDict")
    with pytest.raises(InputError, match=r"cannot find torch.nn:Nothing"):
        load_model("torch.nn:Nothing")
    found = load_model("hwmpq.zoo.digits:DigitsCnn", input_shape=(1, 1, 16, 16))
    assert found.normalization is None and len(found.graph().layers) == 6
