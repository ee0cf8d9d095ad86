"""The canonical graph of small modules: same numbers, one form, names kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwmpq.errors import InputError, UnsupportedModel
from hwmpq.frontend.model import load_model
from hwmpq.frontend.torch_export import trace
from hwmpq.graph import Graph, network_of
from hwmpq.quantize.interpret import Constants, apply, evaluate

torch.set_num_threads(1)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorm with statistics and weights that are not the neutral ones."""
    torch.manual_seed(seed)
    for part in model.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean = torch.randn(part.num_features)
            part.running_var = torch.rand(part.num_features) + 0.5
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
    return model.eval()


def agree(model: nn.Module, *inputs: Tensor, batches: Sequence[int] = (1, 3)) -> Graph:
    """Trace with batch 1; the graph must compute what torch does for every batch size."""
    graph = trace(model, tuple(x[:1] for x in inputs))
    for batch in batches:
        given = [x[:batch] for x in inputs]
        with torch.no_grad():
            want = model(*given)
        want = (want,) if isinstance(want, Tensor) else tuple(want)
        found = evaluate(graph, dict(zip(graph.inputs, given, strict=True)))
        assert len(graph.outputs) == len(want)
        for name, value in zip(graph.outputs, want, strict=True):
            assert found[name].shape == value.shape
            value = value.detach()
            error = (found[name] - value).abs().max() / value.abs().max().clamp(min=1e-6)
            assert float(error) < 1e-5, name
    return graph


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


class Net(nn.Module):
    """A module whose forward is a plain function of (self, inputs...)."""

    def __init__(self, forward: object, **parts: object):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._function = forward

    def forward(self, *inputs: Tensor) -> object:
        return self._function(self, *inputs)  # type: ignore[operator]


def image(channels: int = 3, size: int = 8, batch: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def test_batch_norm_is_folded_exactly() -> None:
    model = randomized(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU())
    )
    graph = agree(model, image())
    (node,) = graph.nodes
    assert (node.name, node.op, node.attrs["act"]) == ("0", "conv2d", "relu")
    assert node.params == {"weight": "0.weight", "bias": "0.bias"}
    conv, norm = model[0], model[1]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = (conv.weight.double() * scale[:, None, None, None]).float()
    bias = ((conv.bias.double() - norm.running_mean) * scale + norm.bias.double()).float()
    assert np.array_equal(graph.constants["0.weight"], weight.detach().numpy())
    np.testing.assert_allclose(graph.constants["0.bias"], bias.detach().numpy(), rtol=1e-7)


def test_batch_norm_that_no_layer_can_take_stays() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        return torch.cat([F.relu(net.norm(y)), y], 1)

    model = randomized(Net(forward, conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4)))
    graph = agree(model, image())
    assert ops(graph) == ["conv2d", "batch_affine", "relu", "concat"]


def test_linear_with_batch_norm_and_inplace_activations() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.ReLU6(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5, bias=False),
        nn.BatchNorm1d(5),
        nn.ReLU(inplace=True),
    )
    graph = agree(randomized(model), image())
    assert ops(graph) == ["conv2d", "mean", "linear"]
    conv, mean, linear = graph.nodes
    assert (conv.attrs["act"], conv.attrs["act_lo"], conv.attrs["act_hi"]) == ("clamp", 0.0, 6.0)
    assert mean.attrs["keepdim"] is False
    assert linear.params["bias"] == "4.bias" and linear.attrs["act"] == "relu"


def attend(net: Net, x: Tensor) -> Tensor:
    b, n, d = x.shape
    q, k, v = net.qkv(x).reshape(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
    return net.proj(net.core(q, k, v).transpose(1, 2).reshape(b, n, d))


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def scaled_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def scaled_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1), 0.5, False) @ v


@pytest.mark.parametrize("core", [fused, scaled_after, scaled_before])
def test_attention_has_one_form(core: object) -> None:
    inner = Net(attend, qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8), core=core)
    model = Net(lambda net, x: net.attn(x), attn=inner).eval()
    graph = agree(model, torch.randn(3, 5, 8))
    assert [node.name for node in graph.layers] == [
        "attn.qkv", "attn.qk", "attn.av", "attn.proj",
    ]  # fmt: skip
    qk, av = graph.node("attn.qk"), graph.node("attn.av")
    assert (qk.attrs["trans_b"], av.attrs["trans_b"]) == (True, False)
    assert qk.attrs["scale"] == pytest.approx(0.5) and av.attrs["scale"] == 1.0
    assert ops(graph).count("rearrange") == 4 and ops(graph).count("softmax") == 1


def test_multihead_attention_module() -> None:
    mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.mha(x, x, x, need_weights=False)[0]
        return net.mha(x, x, x)[0]

    graph = agree(Net(forward, mha=mha).eval(), torch.randn(3, 5, 8))
    names = ["mha.in_proj", "mha.qk", "mha.av", "mha.out_proj"]
    assert [node.name for node in graph.layers] == names + [f"{name}@1" for name in names]


def test_matmuls_outside_attention_are_numbered() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.fc(x)
        return (y @ y.transpose(1, 2)) @ y

    graph = agree(Net(forward, fc=nn.Linear(8, 8)).eval(), torch.randn(3, 5, 8))
    assert [node.name for node in graph.layers] == ["fc", "matmul_0", "matmul_1"]
    assert graph.node("matmul_0").attrs["trans_b"] is True


def test_constant_matrices_become_linears() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = torch.addmm(net.shift, x, net.w.t()) @ net.w
        return torch.mm(y, net.v)

    w, v, shift = (nn.Parameter(torch.randn(s)) for s in ((4, 4), (4, 6), (4,)))
    graph = agree(Net(forward, w=w, v=v, shift=shift), torch.randn(3, 4))
    assert ops(graph) == ["linear", "linear", "linear"]
    first, second, third = graph.nodes
    assert first.params == {"weight": "w", "bias": "shift"}
    assert np.array_equal(graph.constants[second.params["weight"]], w.detach().numpy().T)
    assert third.params["weight"] == "v" and graph.constants["v"].shape == (6, 4)


def test_same_module_called_twice_is_tied() -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
    graph = agree(randomized(Net(lambda net, x: net.b(net.b(x)), b=block)), image())
    assert [node.name for node in graph.layers] == ["b.0", "b.0@1"]
    assert [node.params["weight"] for node in graph.layers] == ["b.0.weight"] * 2


def test_shared_weight_with_different_batch_norms_is_not_folded() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.two(net.conv(net.one(net.conv(x))))

    parts = {"conv": nn.Conv2d(3, 3, 1), "one": nn.BatchNorm2d(3), "two": nn.BatchNorm2d(3)}
    graph = agree(randomized(Net(forward, **parts)), image())
    assert ops(graph) == ["conv2d", "batch_affine", "conv2d", "batch_affine"]


def test_functional_layer_is_named_after_its_weight() -> None:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.randn(4, 3, 1, 1))
    graph = agree(Net(lambda net, x: F.conv2d(x, net.head.weight), head=holder), image())
    assert [node.name for node in graph.nodes] == ["head"]


def test_layers_keep_their_names_against_operators_and_inputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.add = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.add(F.gelu(self.x(x) + 1.0))

    graph = agree(Model().eval(), image())
    assert [node.name for node in graph.layers] == ["x", "add"]
    assert len(set(graph.tensors)) == 1 + len(graph.nodes)


def test_residual_goes_to_the_later_layer_and_stands_at_the_add() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        a, b = net.a(x), net.b(x)
        c = torch.tanh(net.c(x))
        return F.relu(a + b) * c

    convs = {name: nn.Conv2d(3, 3, 3, padding=1) for name in "abc"}
    graph = agree(Net(forward, **convs).eval(), image())
    assert [node.name for node in graph.nodes] == ["a", "c", "tanh", "b", "mul"]
    fused_node = graph.node("b")
    assert fused_node.residual == "a" and fused_node.attrs["act"] == "relu"
    edges = network_of(graph).edges
    assert ("a", "b", ()) in edges and len(network_of(graph).layers) == 3


def test_no_fusion_where_another_reader_or_a_broadcast_is() -> None:
    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        a, gate = net.a(x), net.b(x).mean((2, 3), keepdim=True)
        return F.relu(a) + a, net.c(gate) + x

    convs = {name: nn.Conv2d(3, 3, 1) for name in "abc"}
    graph = agree(Net(forward, **convs).eval(), image())
    assert not any(node.attrs.get("residual") or node.attrs.get("act") for node in graph.layers)


def test_residual_operand_computed_later_than_the_layer() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        return y + F.silu(F.hardswish(x) * 2.0 - 1.0)

    graph = agree(Net(forward, a=nn.Conv2d(3, 3, 1)).eval(), image())
    assert ops(graph) == ["hardswish", "mul", "add", "silu", "conv2d"]


def test_pad_moves_into_the_convolution_but_not_into_pooling() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.conv(F.pad(x, (0, 1, 2, 1)))
        y = F.pad(y, (1, 1, 1, 1))
        return F.max_pool2d(y, 2) + F.pad(F.avg_pool2d(y, 2, 2), (0, 0, 0, 0, -1, 1))

    graph = agree(Net(forward, conv=nn.Conv2d(3, 4, 3, padding=1)).eval(), image())
    assert graph.nodes[0].attrs["padding"] == (3, 1, 2, 2)
    assert ops(graph) == [
        "conv2d", "pad", "max_pool2d", "avg_pool2d", "rearrange", "pad", "add",
    ]  # fmt: skip


def test_many_glue_operators() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.max_pool2d(net.conv(x), 3, 2, ceil_mode=True)
        y = torch.stack([y.sigmoid(), F.hardsigmoid(y)], 1).flatten(1, 2)
        y = F.avg_pool2d(y, 3, 1, 1, count_include_pad=False).clamp(-0.5, 0.5)
        y = torch.cat([1.0 - y, -y, y / 3], 1).softmax(1)
        y = F.adaptive_avg_pool2d(F.pixel_shuffle(y, 2), 4)
        a, b = y.chunk(2, 2)
        return F.gelu(a.squeeze(1) - 2 * b.narrow(1, 0, 3), approximate="tanh")[..., -1]

    agree(Net(forward, conv=nn.Conv2d(3, 2, 1)).eval(), image(size=9))


MOVES = {
    "roll": lambda x: x.roll((-3, 1), (2, -1)),
    "whole roll": lambda x: x.roll((8, 3), (2, 3)),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "tile": lambda x: x.tile(3),
    "nearest": lambda x: F.interpolate(x, scale_factor=(2, 3)),
    "nearest exact": lambda x: F.interpolate(x, size=(16, 8), mode="nearest-exact"),
    "channel shuffle": lambda x: F.channel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
}


@pytest.mark.parametrize("move", MOVES)
def test_operators_that_only_move_elements(move: str) -> None:
    model = Net(lambda net, x: MOVES[move](net.conv(x)), conv=nn.Conv2d(3, 4, 1)).eval()
    graph = agree(model, image())
    assert set(ops(graph)) <= {"conv2d", "rearrange", "concat"}


def test_einsum_is_a_matmul() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bhic,bhjc->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,bhjc->bhic", weights, v)

    inner = Net(attend, qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8), core=core)
    graph = agree(Net(lambda net, x: net.attn(x), attn=inner).eval(), torch.randn(3, 5, 8))
    assert [node.name.split(".")[-1] for node in graph.layers] == ["qkv", "qk", "av", "proj"]


def test_adaptive_pooling() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return F.adaptive_max_pool2d(net.conv(x), (2, 4)) + F.adaptive_avg_pool2d(x, (2, 4))

    graph = agree(Net(forward, conv=nn.Conv2d(3, 3, 1)).eval(), image())
    assert ops(graph) == ["conv2d", "max_pool2d", "avg_pool2d", "add"]
    uneven = Net(lambda net, x: F.adaptive_max_pool2d(net.conv(x), 3), conv=nn.Conv2d(3, 3, 1))
    with pytest.raises(UnsupportedModel, match=r"adaptive_max_pool2d from \(8, 8\) to \(3, 3\)"):
        trace(uneven.eval(), (image(batch=1),))


def test_several_inputs_and_outputs() -> None:
    def forward(net: Net, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = net.fc(x) + y
        return z, x, z, net.table.expand(len(x), -1), net.fc(y)

    parts = {"fc": nn.Linear(4, 4), "table": nn.Parameter(torch.randn(1, 4))}
    model = Net(forward, **parts).eval()
    graph = agree(model, torch.randn(3, 4), torch.randn(3, 4), batches=[1])
    assert len(graph.inputs) == 2
    assert graph.outputs[1] == graph.inputs[0] and graph.outputs[0] == graph.outputs[2] == "fc"
    assert graph.node(graph.outputs[3]).op == "constant" and "table" in graph.constants


def test_source_is_the_users_line() -> None:
    graph = trace(Net(lambda net, x: net.fc(x), fc=nn.Linear(4, 4)), (torch.randn(1, 4),))
    file, line = graph.nodes[0].source.rsplit(":", 1)
    assert Path(file) == Path(__file__) and int(line) > 1


def test_trace_restores_the_training_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    trace(model, (image(batch=1),))
    assert model.training and model[1].training


def test_evaluate_observes_overrides_and_checks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    graph = trace(model, (torch.randn(1, 4),))
    x, seen = torch.randn(2, 4), []
    evaluate(graph, {graph.inputs[0]: x}, lambda name, value: seen.append((name, value.shape)))
    assert seen == [(graph.inputs[0], (2, 4)), ("0", (2, 4)), ("2", (2, 2))]
    twice = {"0": lambda node, args, param: 2 * apply(node, args, param)}
    found = evaluate(graph, {graph.inputs[0]: x}, overrides=twice, constants=Constants(graph))
    torch.testing.assert_close(found["2"], model[2](2 * F.relu(model[0](x))))
    with pytest.raises(InputError, match=r"shape of input .*\(2, 5\)"):
        evaluate(graph, {graph.inputs[0]: torch.randn(2, 5)})
    with pytest.raises(InputError, match="missing inputs"):
        evaluate(graph, {})


def test_a_model_that_mixes_samples_runs_with_the_traced_batch_only() -> None:
    model = Net(lambda net, x: net.fc(x).softmax(0), fc=nn.Linear(4, 4)).eval()
    graph = agree(model, torch.randn(1, 4), batches=[1])
    with pytest.raises(InputError, match="mixes the samples of a batch"):
        evaluate(graph, {graph.inputs[0]: torch.randn(3, 4)})


def test_saved_program_gives_the_same_graph(tmp_path: Path) -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    x = image()
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(model, (x[:1],)), path)
    loaded = load_model(str(path))
    graph = loaded.graph()
    assert [node.name for node in graph.nodes] == ["0"] and loaded.name == "net"
    found = evaluate(graph, {graph.inputs[0]: x})["0"]
    torch.testing.assert_close(found, model(x).detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"weights for a .pt2 file"):
        load_model(str(path), weights=path)
