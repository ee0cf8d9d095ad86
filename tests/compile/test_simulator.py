"""The simulator against slow integer references, and the storage rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from hwmpq.errors import InputError
from hwmpq.formats import encoding_named
from hwmpq.graph import Graph, Node
from hwmpq.quantize.accumulate import Weight, accumulate
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.interpret import evaluate
from hwmpq.quantize.judge import judge
from hwmpq.quantize.simulate import Simulator
from hwmpq.requantize import Quantizer
from hwmpq.resolve import resolve

CONV = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}


def conv(name: str, *inputs: str, act: str = "", **attrs: Any) -> Node:
    more = {"act": act, "act_lo": 0.0, "act_hi": 6.0, "residual": len(inputs) > 1}
    params = {"weight": f"{name}.weight", "bias": f"{name}.bias"}
    return Node(name, "conv2d", inputs, {**CONV, **more, **attrs}, params)


def parameters(rng: np.random.Generator, **shapes: tuple[int, ...]) -> dict[str, Any]:
    found = {}
    for name, shape in shapes.items():
        fan = np.prod(shape[1:])
        found[f"{name}.weight"] = rng.normal(0, 1.4 / np.sqrt(fan), shape).astype(np.float32)
        found[f"{name}.bias"] = rng.normal(0, 0.1, shape[0]).astype(np.float32)
    return found


def residual_net() -> Graph:
    """Convolutions with a fused and an unfused residual, a pool, a depthwise, a mean, a linear."""
    same = (1, 1, 1, 1)
    pool = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 1, 1), "ceil": False}
    nodes = (
        conv("c1", "x", padding=same, act="relu"),
        conv("c2", "c1", "c1", padding=same, act="relu"),
        Node("pool", "max_pool2d", ("c2",), pool),
        conv("c3", "pool", padding=same, groups=6),
        Node("sum", "add", ("pool", "c3")),
        conv("c4", "sum", padding=(0, 1, 1, 0), act="clamp", stride=(2, 1)),
        Node("mean", "mean", ("c4",), {"axes": (2, 3), "keepdim": False}),
        Node("fc", "linear", ("mean",), {}, {"weight": "fc.weight", "bias": "fc.bias"}),
    )
    shapes = {
        "x": (1, 3, 7, 9), "c1": (1, 6, 7, 9), "c2": (1, 6, 7, 9), "pool": (1, 6, 4, 5),
        "c3": (1, 6, 4, 5), "sum": (1, 6, 4, 5), "c4": (1, 8, 2, 5), "mean": (1, 8), "fc": (1, 5),
    }  # fmt: skip
    constants = parameters(
        np.random.default_rng(0),
        c1=(6, 3, 3, 3), c2=(6, 6, 3, 3), c3=(6, 1, 3, 3), c4=(8, 6, 2, 2), fc=(5, 8),
    )  # fmt: skip
    return Graph(("x",), ("fc",), nodes, shapes, constants)


def images(graph: Graph, count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *graph.tensors["x"][1:], generator=generator) + 0.3


def uniform(graph: Graph, fmt: str) -> dict[str, str]:
    return {node.name: fmt for node in graph.layers}


def slow_conv(x: np.ndarray, w: np.ndarray, pad_value: int, **attrs: Any) -> np.ndarray:
    """int64 convolution; the padding holds pad_value."""
    top, left, bottom, right = attrs["padding"]
    (sh, sw), (dh, dw), groups = attrs["stride"], attrs["dilation"], attrs["groups"]
    pads = ((0, 0), (0, 0), (top, bottom), (left, right))
    x = np.pad(x.astype(np.int64), pads, constant_values=pad_value)
    size = ((w.shape[2] - 1) * dh + 1, (w.shape[3] - 1) * dw + 1)
    view = sliding_window_view(x, size, (2, 3))[:, :, ::sh, ::sw, ::dh, ::dw]
    view = view.reshape(len(x), groups, -1, *view.shape[2:])
    w = w.astype(np.int64).reshape(groups, -1, *w.shape[1:])
    y = np.einsum("bgchwij,gocij->bgohw", view, w)
    return y.reshape(len(x), -1, *y.shape[3:])


# -- accumulators ---------------------------------------------------------------------------------

CASES = {
    "plain": ((7, 5, 3, 3), {}),
    "padded": ((7, 5, 3, 3), {"padding": (1, 2, 0, 1)}),
    "stride": ((7, 5, 3, 3), {"stride": (2, 1), "padding": (1, 1, 1, 1)}),
    "dilation": ((7, 5, 3, 3), {"dilation": (2, 3), "padding": (2, 3, 2, 3)}),
    "grouped": ((8, 3, 3, 3), {"groups": 2}),
    "depthwise": ((6, 1, 3, 3), {"groups": 6, "padding": (1, 1, 1, 1)}),
    "split in halves": ((4, 300, 3, 3), {"padding": (1, 1, 1, 1)}),
    "fp64": ((2, 1200, 3, 3), {}),
}


def one_conv(shape: tuple[int, ...], attrs: dict[str, Any], w: np.ndarray) -> Graph:
    cin = shape[1] * attrs.get("groups", 1)
    node = conv("c", "x", **attrs)
    x, a = (1, cin, 9, 8), node.attrs
    sizes = [
        (n + p + q - d * (k - 1) - 1) // s + 1
        for n, p, q, d, k, s in zip(
            x[2:], a["padding"][:2], a["padding"][2:], a["dilation"], shape[2:], a["stride"],
            strict=True,
        )
    ]  # fmt: skip
    bias = np.linspace(-1, 1, shape[0], dtype=np.float32)
    tensors = {"x": x, "c": (1, shape[0], *sizes)}
    return Graph(("x",), ("c",), (node,), tensors, {"c.weight": w, "c.bias": bias})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("zero", [0, 93])
def test_integer_accumulators_are_exact(case: str, zero: int) -> None:
    shape, attrs = CASES[case]
    rng = np.random.default_rng(3)
    large = shape[1] >= 300  # all weights alike: the largest sums there are
    w = np.full(shape, 0.5) if large else rng.normal(size=shape)
    graph = one_conv(shape, attrs, w.astype(np.float32))
    quantizers = calibrate(graph, [images(graph, 2)], ["w8a8"])
    quantizers.activations["x", "u8"] = Quantizer(0.02, zero)  # type: ignore[index]
    layer = resolve(graph, {"c": "w8a8"}, quantizers).layers["c"]
    assert layer.weight is not None
    x = rng.integers(200 if large else 0, 256, (2, *graph.tensors["x"][1:]))
    acc = accumulate(layer, torch.from_numpy(x).float(), Weight.of(layer))
    expected = slow_conv(x, layer.weight.codes, zero, **graph.node("c").attrs)
    assert np.array_equal(acc.numpy().astype(np.int64), expected)
    assert (np.abs(expected).max() >= 2**24) == large
    assert not large or acc.dtype == torch.int32


# -- whole networks -------------------------------------------------------------------------------


def slow_residual_net(graph: Graph, quantizers: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    """Codes of the all-w8a8 residual net, from the formulas of the design alone (numpy)."""
    f32 = np.float32

    def q_of(tensor: str) -> tuple[Any, int]:
        q = quantizers.activation("c2" if tensor == "pool" else tensor, "u8")
        return f32(q.scale), q.zero

    def quantized(value: np.ndarray, tensor: str) -> np.ndarray:
        s, z = q_of(tensor)
        return np.clip(np.rint(value.astype(f32) * (f32(1) / s)) + f32(z), 0, 255)

    def product(name: str, source: str) -> Any:
        weight = quantizers.weight(name, "w8a8")
        scale = np.float64(q_of(source)[0]) * weight.scale.astype(np.float64)
        bias = np.rint(graph.constants[f"{name}.bias"].astype(np.float64) / scale)
        return weight.codes, scale, bias.astype(np.int64)

    def layer(name: str, source: str, residual: str = "", to_code: bool = True) -> np.ndarray:
        codes, scale, bias = product(name, source)
        z_in = q_of(source)[1]
        acc = slow_conv(held[source], codes, z_in, **graph.node(name).attrs)
        ones = np.full_like(held[source], z_in)
        acc -= slow_conv(ones, codes, z_in, **graph.node(name).attrs)
        acc += bias[:, None, None]
        if not to_code:
            return np.clip(acc.astype(f32) * scale.astype(f32)[:, None, None], f32(0), f32(6))
        s, z = q_of(name)
        m = (scale / np.float64(s)).astype(f32)[:, None, None]
        y = np.rint(acc.astype(f32) * m)
        if residual:
            s_r, z_r = q_of(residual)
            y += np.rint((held[residual] - f32(z_r)) * f32(np.float64(s_r) / np.float64(s)))
        low = z if graph.node(name).attrs["act"] else 0
        return np.clip(y + f32(z), low, 255)

    held = {"x": quantized(x, "x")}
    held["c1"] = layer("c1", "x")
    held["c2"] = layer("c2", "c1", "c1")
    padded = np.pad(held["c2"], ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=-np.inf)
    held["pool"] = sliding_window_view(padded, (2, 2), (2, 3))[:, :, ::2, ::2].max((-2, -1))
    held["c3"] = layer("c3", "pool")
    s, z = q_of("sum")
    total = f32(z)
    for part in ("pool", "c3"):
        s_p, z_p = q_of(part)
        total = total + np.rint((held[part] - f32(z_p)) * f32(np.float64(s_p) / np.float64(s)))
    held["sum"] = np.clip(total, 0, 255)
    held["c4"] = layer("c4", "sum", to_code=False)
    return held


def test_an_integer_network_has_the_codes_of_a_slow_reference() -> None:
    graph = residual_net()
    quantizers = calibrate(graph, [images(graph, 32)], ["w8a8"])
    x = images(graph, 5, seed=9)
    found: dict[str, torch.Tensor] = {}
    (out,) = Simulator(graph, uniform(graph, "w8a8"), quantizers)(x, found.__setitem__)
    expected = slow_residual_net(graph, quantizers, x.numpy())
    for name, value in expected.items():
        assert np.array_equal(found[name].numpy(), value), name
    q = quantizers.activation("mean", "u8")
    mean = found["c4"].mean((2, 3)).numpy()
    codes = encoding_named("u8").quantize(mean, q.scale, q.zero)
    assert np.array_equal(found["mean"].numpy(), codes.astype(np.float32))
    weight = quantizers.weight("fc", "w8a8")
    acc = (codes.astype(np.int64) - q.zero) @ weight.codes.T.astype(np.int64)
    assert weight.scale is not None
    scale = np.float64(q.scale) * weight.scale.astype(np.float64)
    acc += np.rint(graph.constants["fc.bias"] / scale).astype(np.int64)
    assert np.array_equal(out.numpy(), acc.astype(np.float32) * scale.astype(np.float32))


def test_fp32_everywhere_is_the_interpreter() -> None:
    """But for the order of a mean's sum, which follows the kernels."""
    graph = residual_net()
    quantizers = calibrate(graph, [images(graph, 4)], [])
    x = images(graph, 3)
    (found,) = Simulator(graph, uniform(graph, "fp32"), quantizers)(x)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, evaluate(graph, {"x": last})["fc"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("fmt", "least_db"),
    [("w8a8", 30), ("w4a4", 8), ("bf16", 60), ("fp16", 80), ("w4.bf16.g8", 60), ("w4a8.g8", 30),
     ("e4m3", 40), ("w4a8", 25)],
)  # fmt: skip
def test_fast_stays_near_exact(fmt: str, least_db: float) -> None:
    graph = residual_net()
    quantizers = calibrate(graph, [images(graph, 32)], [fmt])
    x = images(graph, 16, seed=5)
    exact, fast = (
        Simulator(graph, uniform(graph, fmt), quantizers, mode)(x)[0] for mode in ("exact", "fast")
    )
    near = judge(exact, fast, metric="sqnr").simulated
    assert near > least_db, near


def test_fast_gradients_reach_weights_and_stop_at_clipped_activations() -> None:
    graph = residual_net()
    quantizers = calibrate(graph, [images(graph, 32)], ["w4a4"])
    learned = {k: torch.from_numpy(v).requires_grad_() for k, v in graph.constants.items()}
    simulator = Simulator(graph, uniform(graph, "w4a4"), quantizers, "fast", learned)
    x = images(graph, 4).requires_grad_()
    outside = torch.full_like(x, 100.0).requires_grad_()
    simulator(x)[0].square().sum().backward()
    simulator(outside)[0].sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in learned.values())
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)
    assert outside.grad is not None and not bool(outside.grad.any())


def glue_net(*middle: Node, **shapes: tuple[int, ...]) -> Graph:
    """conv a, the given glue, conv b."""
    shapes = {"x": (1, 3, 6, 6), "a": (1, 4, 6, 6), **shapes}
    last = middle[-1].name
    n, c, h, w = shapes[last]
    nodes = (conv("a", "x"), *middle, conv("b", last))
    constants = parameters(np.random.default_rng(4), a=(4, 3, 1, 1), b=(2, c, 1, 1))
    return Graph(("x",), ("b",), nodes, {**shapes, "b": (n, 2, h, w)}, constants)


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        (Node("g", "relu", ("a",)), (1, 4, 6, 6)),
        (Node("g", "clamp", ("a",), {"lo": -0.5, "hi": 0.7}), (1, 4, 6, 6)),
        (Node("g", "pad", ("a",), {"pads": ((0, 0), (0, 0), (1, 0), (2, 1)), "value": 0.0}),
         (1, 4, 7, 9)),
        (Node("g", "rearrange", ("a",), {"steps": [["slice", 1, 1, 4, 1]]}), (1, 3, 6, 6)),
        (Node("g", "concat", ("a", "a"), {"axis": 1}), (1, 8, 6, 6)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fmt", ["w8a8", "w8a4"])
def test_glue_on_codes_is_glue_on_values(node: Node, shape: tuple[int, ...], fmt: str) -> None:
    graph = glue_net(node, g=shape)
    quantizers = calibrate(graph, [images(graph, 16)], [fmt])
    found: dict[str, torch.Tensor] = {}
    simulator = Simulator(graph, uniform(graph, fmt), quantizers)
    simulator(images(graph, 3), found.__setitem__)
    encoding = simulator.resolved.plan.stored["g"]
    assert encoding == simulator.resolved.plan.stored["a"] == f"u{fmt[-1]}"
    q = simulator.resolved.quantizer("g", encoding)
    kind = encoding_named(encoding)
    values = evaluate_node(node, kind.dequantize(found["a"], q.scale, q.zero))
    assert torch.equal(found["g"], kind.quantize(values, q.scale, q.zero).float())
    assert q.zero > 0


def evaluate_node(node: Node, value: torch.Tensor) -> torch.Tensor:
    from hwmpq.quantize.interpret import apply

    return apply(node, [value] * len(node.inputs), lambda name: value)


def test_mixed_formats_around_a_residual() -> None:
    """c1 is read as codes and as bf16: stored as bf16, the integer reader re-encodes it."""
    graph = residual_net()
    quantizers = calibrate(graph, [images(graph, 16)], ["w8a8", "w4a4", "bf16"])
    mixed = {"c1": "w4a4", "c2": "bf16", "c3": "w8a8", "c4": "w4a4", "fc": "fp32"}
    simulator = Simulator(graph, mixed, quantizers)
    stored = simulator.resolved.plan.stored
    assert (stored["x"], stored["c1"], stored["pool"], stored["sum"]) == ("u4", "bf16", "u8", "u4")
    found: dict[str, torch.Tensor] = {}
    (out,) = simulator(images(graph, 4), found.__setitem__)
    assert out.dtype == torch.float32
    assert torch.equal(found["c1"], encoding_named("bf16").fake(found["c1"]))
    assert float(found["sum"].max()) <= 15 and torch.equal(found["sum"], found["sum"].round())


def test_int_storage_is_reencoded_for_a_narrower_reader() -> None:
    nodes = (conv("a", "x"), conv("b", "a"), conv("c", "a"), Node("s", "concat", ("b", "c"),
             {"axis": 1}))  # fmt: skip
    shapes = {
        "x": (1, 3, 6, 6), "a": (1, 4, 6, 6), "b": (1, 2, 6, 6), "c": (1, 2, 6, 6),
        "s": (1, 4, 6, 6),
    }  # fmt: skip
    constants = parameters(np.random.default_rng(4), a=(4, 3, 1, 1), b=(2, 4, 1, 1), c=(2, 4, 1, 1))
    graph = Graph(("x",), ("s",), nodes, shapes, constants)
    quantizers = calibrate(graph, [images(graph, 16)], ["w8a8", "w8a4"])
    found: dict[str, torch.Tensor] = {}
    Simulator(graph, {"a": "w8a8", "b": "w8a8", "c": "w8a4"}, quantizers)(
        images(graph, 3), found.__setitem__
    )
    wide, narrow = (quantizers.activation("a", e) for e in ("u8", "u4"))
    value = (found["a"].numpy() - np.float32(wide.zero)) * np.float32(wide.scale)
    codes = encoding_named("u4").quantize(value, narrow.scale, narrow.zero).astype(np.int64)
    weight = quantizers.weight("c", "w8a4")
    assert weight.scale is not None
    acc = slow_conv(codes - narrow.zero, weight.codes, 0, **CONV)
    scale = np.float64(narrow.scale) * weight.scale.astype(np.float64)
    acc += np.rint(constants["c.bias"] / scale).astype(np.int64)[:, None, None]
    expected = acc.astype(np.float32) * scale.astype(np.float32)[:, None, None]
    assert np.array_equal(found["c"].numpy(), expected)


def test_attention_in_integers() -> None:
    """q kᵀ, softmax, times v: B symmetric, softmax u8 with scale 1/255, against int64."""
    heads = {"trans_b": True, "scale": 0.25, "residual": False, "act": ""}
    move = [["reshape", [1, 6, 3, 16]], ["permute", [2, 0, 1, 3]]]
    names = ("q", "k", "v")
    nodes = (
        Node("qkv", "linear", ("x",), {}, {"weight": "w"}),
        *(
            Node(n, "rearrange", ("qkv",),
                 {"steps": [*move, ["slice", 0, i, i + 1, 1], ["reshape", [1, 6, 16]]]})
            for i, n in enumerate(names)
        ),
        Node("qk", "matmul", ("q", "k"), heads),
        Node("soft", "softmax", ("qk",), {"axis": 2}),
        Node("av", "matmul", ("soft", "v"), {**heads, "trans_b": False, "scale": 1.0}),
    )  # fmt: skip
    shapes = {
        "x": (1, 6, 8), "qkv": (1, 6, 48), "qk": (1, 6, 6), "soft": (1, 6, 6), "av": (1, 6, 16),
        **dict.fromkeys(names, (1, 6, 16)),
    }  # fmt: skip
    w = np.random.default_rng(2).normal(size=(48, 8)).astype(np.float32)
    graph = Graph(("x",), ("av",), nodes, shapes, {"w": w})
    quantizers = calibrate(graph, [images(graph, 32)], ["w8a8"])
    found: dict[str, torch.Tensor] = {}
    simulator = Simulator(graph, uniform(graph, "w8a8"), quantizers)
    simulator(images(graph, 4), found.__setitem__)
    stored = simulator.resolved.plan.stored
    assert [stored[n] for n in (*names, "soft")] == ["u8", "s8", "s8", "u8"]
    codes = {n: found[n].numpy().astype(np.int64) for n in (*names, "soft")}
    q, k, v = (quantizers.activation(n, e) for n, e in zip(names, ("u8", "s8", "s8"), strict=True))
    assert (quantizers.activation("soft", "u8"), k.zero, v.zero) == (
        Quantizer(float(np.float32(1 / 255)), 0), 0, 0,
    )  # fmt: skip
    acc = (codes["q"] - q.zero) @ codes["k"].transpose(0, 2, 1)
    expected = acc.astype(np.float32) * np.float32(np.float64(q.scale) * k.scale * 0.25)
    assert np.array_equal(found["qk"].numpy(), expected)
    acc = codes["soft"] @ codes["v"]
    expected = acc.astype(np.float32) * np.float32(np.float64(np.float32(1 / 255)) * v.scale)
    assert np.array_equal(found["av"].numpy(), expected)


def test_a_run_can_be_stopped_copied_and_continued() -> None:
    graph = residual_net()
    quantizers = calibrate(graph, [images(graph, 4)], ["w8a8"])
    simulator = Simulator(graph, uniform(graph, "w8a8"), quantizers)
    x = images(graph, 2)
    state = simulator.begin(x)
    simulator.advance(state, 3)
    assert set(state.held) == {"pool"}
    for one in (state.copy(), state):
        simulator.advance(one)
        assert torch.equal(simulator.outputs(one)[0], simulator(x)[0])


def test_what_is_refused() -> None:
    graph = residual_net()
    quantizers = calibrate(graph, [images(graph, 2)], ["w8a8"])
    with pytest.raises(InputError, match="mode of the simulator: got quick; allowed: exact, fast"):
        Simulator(graph, uniform(graph, "w8a8"), quantizers, "quick")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="parameters in mode exact"):
        Simulator(graph, uniform(graph, "w8a8"), quantizers, parameters={"a": torch.ones(1)})
    simulator = Simulator(graph, uniform(graph, "w8a8"), quantizers)
    with pytest.raises(InputError, match="names of the inputs: got y; allowed: x"):
        simulator({"y": images(graph, 1)})
    with pytest.raises(InputError, match=r"element type of an input: got torch\.float64"):
        simulator(images(graph, 1).double())


def test_low_precision_products_are_refused() -> None:
    graph = residual_net()
    quantizers = calibrate(graph, [images(graph, 2)], ["w8a8"])
    simulator = Simulator(graph, uniform(graph, "w8a8"), quantizers)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(InputError, match="lower precision: got bf16; allowed: ieee"):
            simulator(images(graph, 1))
    finally:
        torch.set_float32_matmul_precision("highest")
