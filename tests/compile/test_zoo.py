"""Every zoo model: its graph computes what torch does; names, weights, accuracy as stated."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hwmpq import data, zoo
from hwmpq.errors import InputError, UnknownName
from hwmpq.frontend.torch_export import trace
from hwmpq.graph import network_of
from hwmpq.quantize.interpret import evaluate
from hwmpq.zoo.digits_train import accuracy

torch.set_num_threads(1)

#: MMACs and number of layers of each model
SIZES = {
    "digits_cnn": (6, 6), "resnet20_cifar": (41, 20), "resnet56_cifar": (125, 56),
    "resnet18": (1814, 21), "resnet50": (4089, 54), "mobilenet_v2": (301, 53),
    "mobilenet_v2_tf": (301, 53), "squeezenet1_1": (349, 26), "vit_tiny": (1254, 74),
}  # fmt: skip


@pytest.mark.parametrize("name", zoo.names())
def test_graph_equals_torch(name: str) -> None:
    model = zoo.build(name)
    x = torch.randn(3, *model.input_shape[1:], generator=torch.Generator().manual_seed(0))
    graph = trace(model.module, (x[:1],))
    for batch in (1, 3):
        with torch.no_grad():
            want = model.module(x[:batch])
        found = evaluate(graph, {graph.inputs[0]: x[:batch]})[graph.outputs[0]]
        assert float((found - want).abs().max() / want.abs().max()) < 1e-5
    layers = network_of(graph).layers
    macs = sum(layer.workload.macs for layer in layers)
    assert (round(macs / 1e6), len(layers)) == SIZES[name]
    modules = dict(model.module.named_modules())
    assert all(layer.name in modules for layer in layers if layer.workload.has_weight)


def test_random_weights_are_seeded() -> None:
    one, two = (zoo.build("mobilenet_v2").module.state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_names_of_torchvision_and_timm() -> None:
    assert "features.1.conv.0.0.weight" in zoo.build("mobilenet_v2").module.state_dict()
    assert "layer2.0.downsample.1.running_var" in zoo.build("resnet50").module.state_dict()
    vit = zoo.build("vit_tiny").module.state_dict()
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.11.attn.qkv.bias",
            "blocks.0.attn.proj.weight", "blocks.0.mlp.fc1.weight", "norm.weight",
            "head.weight"} <= set(vit)  # fmt: skip


def test_digits_weights_are_good() -> None:
    model, test = zoo.build("digits_cnn"), data.load("digits")
    assert (model.mean, model.std) == (test.mean, test.std) == data.DIGITS
    assert test.shape == model.input_shape[1:] and len(test) == 540
    images = torch.from_numpy(test.batch(range(len(test))))
    labels = torch.from_numpy(np.asarray(test.labels))
    assert accuracy(model.module.state_dict(), images, labels) >= 98.0


def test_unknown_name() -> None:
    with pytest.raises(UnknownName, match="unknown zoo model: got 'vit'"):
        zoo.build("vit")


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = zoo.build("digits_cnn").module.state_dict()
    state["fc.wieght"] = state.pop("fc.weight")
    state["stem.weight"] = torch.zeros(32, 1, 5, 5)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError) as caught:
        zoo.build("digits_cnn", tmp_path / "w.safetensors")
    text = str(caught.value)
    assert "3 differences" in text
    assert "missing fc.weight (nearest: fc.wieght)" in text
    assert "unexpected fc.wieght (nearest: fc.weight)" in text
    assert "stem.weight has shape (32, 1, 5, 5), the model wants (32, 1, 3, 3)" in text


def test_tensors_only_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    model = zoo.build("digits_cnn").module
    torch.save(model.state_dict(), path)
    found = zoo.build("digits_cnn", path).module.state_dict()
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    with pytest.raises(InputError, match="no such weights file"):
        zoo.build("digits_cnn", tmp_path / "missing.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match="broken weights file"):
        zoo.build("digits_cnn", tmp_path / "junk.safetensors")


def decoded(source: Path, count: int, target: Path) -> str:
    """The first images of a packed set (JPEG bytes end to end) as a data spec."""
    packed = np.load(source)
    ends = packed["offsets"]
    files = (packed["jpeg"][ends[i] : ends[i + 1]].tobytes() for i in range(count))
    images = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    if images.shape[1] == 227:
        images = images[:, 1:225, 1:225]
    np.savez(target, images=images, labels=packed["labels"][:count])
    return f"npz:{target}"


def test_resnet20_with_real_weights(shared_data: Path, tmp_path: Path) -> None:
    model = zoo.build("resnet20_cifar", shared_data / "weights/resnet20_cifar10_jpeg.safetensors")
    spec = decoded(shared_data / "cifar10_test.npz", 500, tmp_path / "test.npz")
    test = data.load(spec, (model.mean, model.std), model.input_shape, model.classes)
    images = torch.from_numpy(test.batch(range(500)))
    graph = trace(model.module, (images[:1],))
    found = evaluate(graph, {graph.inputs[0]: images})[graph.outputs[0]]
    with torch.no_grad():
        want = model.module(images)
    assert torch.equal(found.argmax(1), want.argmax(1))
    top1 = float((found.argmax(1) == torch.from_numpy(np.asarray(test.labels))).float().mean())
    assert 0.85 < top1 < 0.93


@pytest.mark.parametrize(
    ("name", "file", "least"),
    [
        ("vit_tiny", "deit_tiny", 14),
        ("mobilenet_v2_tf", "mobilenet_v2_tf", 14),
        ("squeezenet1_1", "squeezenet1_1", 11),
    ],
)
def test_imagenet_models_with_real_weights(
    name: str, file: str, least: int, shared_data: Path, tmp_path: Path
) -> None:
    model = zoo.build(name, shared_data / "weights" / f"{file}.safetensors")
    spec = decoded(shared_data / "imagenet_val1300.npz", 20, tmp_path / "test.npz")
    test = data.load(spec, (model.mean, model.std), model.input_shape, model.classes)
    with torch.no_grad():
        found = model.module(torch.from_numpy(test.batch(range(20)))).argmax(1).numpy()
    assert int((found == test.labels).sum()) >= least
