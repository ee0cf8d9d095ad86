"""The canonical graph itself, and running it with another batch size; graphs made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hwmpq.errors import InputError, UnknownName
from hwmpq.graph import GLUE_OPS, LAYER_NODE_OPS, Graph, Node, cut, network_of, workload_of
from hwmpq.quantize.interpret import OPS, evaluate, rebatch
from hwmpq.types import Workload

CONV = {
    "stride": (2, 2), "padding": (0, 0, 1, 1), "dilation": (1, 1), "groups": 1,
    "residual": False, "act": "clamp", "act_lo": 0.0, "act_hi": 6.0,
}  # fmt: skip


def graph(
    inputs: dict[str, tuple[int, ...]],
    nodes: dict[Node, tuple[int, ...]] | list[tuple[Node, tuple[int, ...]]],
    constants: dict[str, Any] | None = None,
) -> Graph:
    """The last node is the output."""
    pairs = list(nodes)
    return Graph(
        tuple(inputs),
        (pairs[-1][0].name,),
        tuple(node for node, _ in pairs),
        {**inputs, **{node.name: shape for node, shape in pairs}},
        {name: np.asarray(value, np.float32) for name, value in (constants or {}).items()},
    )


def views(shape: tuple[int, ...], *steps: tuple[list[list[Any]], tuple[int, ...]]) -> Graph:
    """A chain of rearranges behind a relu."""
    nodes = [(Node("r", "relu", ("x",)), shape)]
    for i, (moves, after) in enumerate(steps):
        nodes.append((Node(f"v{i}", "rearrange", (nodes[-1][0].name,), {"steps": moves}), after))
    return graph({"x": shape}, nodes)


def small() -> Graph:
    rng = np.random.default_rng(0)
    conv = Node("c", "conv2d", ("x",), CONV, {"weight": "c.weight", "bias": "c.bias"})
    deep = Node(
        "d", "conv2d", ("c", "c"),
        {**CONV, "stride": (1, 1), "padding": (1, 1, 1, 1), "groups": 4, "residual": True,
         "act": "relu"}, {"weight": "d.weight"},
    )  # fmt: skip
    mean = Node("m", "mean", ("d",), {"axes": (2, 3), "keepdim": False})
    head = Node("h", "linear", ("m",), {"residual": False, "act": ""}, {"weight": "h.weight"})
    return graph(
        {"x": (1, 3, 8, 8)},
        [(conv, (1, 4, 4, 4)), (deep, (1, 4, 4, 4)), (mean, (1, 4)), (head, (1, 5))],
        {
            "c.weight": rng.normal(size=(4, 3, 3, 3)), "c.bias": rng.normal(size=4),
            "d.weight": rng.normal(size=(4, 1, 3, 3)), "h.weight": rng.normal(size=(5, 4)),
        },
    )  # fmt: skip


def test_workloads_and_network() -> None:
    net = network_of(small())
    conv, deep, head = (layer.workload for layer in net.layers)
    assert conv.epilogue == "bias+clamp" and conv.out_hw == (4, 4) and conv["pb"] == 1
    assert (deep.op, deep.epilogue, deep.macs) == ("depthwise", "add+relu", 4 * 16 * 9)
    assert head == Workload.make("linear", m=1, k=4, n=5)
    assert net.edges == (("c", "d", ()), ("d", "h", ("m",)))
    assert (net.layer("c").parameters, net.layer("c").bias) == (108, 4)


def test_cut() -> None:
    whole = small()
    part = cut(whole, ["d"])
    assert [node.name for node in part.nodes] == ["c", "d"] and part.outputs == ("d",)
    assert {*part.tensors} == {"x", "c", "d"}
    assert {*part.constants} == {"c.weight", "c.bias", "d.weight"}
    assert network_of(part).edges == (("c", "d", ()),)
    x = {"x": torch.ones(1, 3, 8, 8)}
    both = evaluate(cut(whole, ["d", "h"]), x)
    assert torch.equal(evaluate(part, x)["d"], both["d"])
    assert torch.equal(evaluate(whole, x)["h"], both["h"])
    assert cut(whole, ["h", "c", "h"]).outputs == ("h", "c")
    with pytest.raises(UnknownName, match=r"unknown node of the model: got 'dd'.*Nearest: d"):
        cut(whole, ["c", "dd"])


def test_matmul_workload() -> None:
    attrs = {"trans_b": True, "scale": 0.5, "residual": False, "act": ""}
    made = graph(
        {"a": (1, 2, 5, 4), "b": (1, 2, 7, 4)},
        [(Node("p.qk", "matmul", ("a", "b"), attrs), (1, 2, 5, 7))],
    )
    work = workload_of(made.nodes[0], made)
    assert work == Workload.make("matmul", b=2, m=5, k=4, n=7, trans_b=1)
    a, b = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 7, 4)
    found = evaluate(made, {"a": a, "b": b})["p.qk"]
    torch.testing.assert_close(found, 0.5 * a @ b.mT)


def test_every_operator_can_be_run() -> None:
    assert set(OPS) == {*LAYER_NODE_OPS, *GLUE_OPS}


def test_fused_epilogue_and_asymmetric_padding() -> None:
    made = small()
    x = torch.randn(2, 3, 8, 8)
    p = {name: torch.from_numpy(value) for name, value in made.constants.items()}
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1))
    c = torch.nn.functional.conv2d(padded, p["c.weight"], p["c.bias"], 2).clamp(0, 6)
    d = (torch.nn.functional.conv2d(c, p["d.weight"], padding=1, groups=4) + c).relu()
    want = d.mean((2, 3)) @ p["h.weight"].T
    torch.testing.assert_close(evaluate(made, {"x": x})["h"], want)


def test_rebatch_keeps_the_traced_graph_and_scales_shapes() -> None:
    made = small()
    assert rebatch(made, 1) is made
    assert rebatch(made, 7).tensors == {
        "x": (7, 3, 8, 8), "c": (7, 4, 4, 4), "d": (7, 4, 4, 4), "m": (7, 4), "h": (7, 5),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "steps", "move"),
    [
        # heads: the batch stays in front
        ((1, 6, 8), [([["reshape", [1, 6, 2, 4]], ["permute", [0, 2, 1, 3]]], (1, 2, 6, 4))],
         lambda x: x.reshape(-1, 6, 2, 4).permute(0, 2, 1, 3)),
        # the batch moves to the second axis and is merged with the heads, then taken apart
        ((1, 6, 8), [([["permute", [1, 0, 2]], ["reshape", [6, 2, 4]], ["permute", [1, 0, 2]]],
                      (2, 6, 4)), ([["reshape", [1, 2, 6, 4]]], (1, 2, 6, 4))],
         lambda x: x.reshape(-1, 6, 2, 4).permute(0, 2, 1, 3)),
        # a dimension of size 1 beside the batch
        ((1, 1, 4, 4), [([["reshape", [1, 16]], ["slice", 1, 0, 16, 2]], (1, 8))],
         lambda x: x.reshape(-1, 16)[:, ::2]),
        ((1, 4), [([["reshape", [1, 4, 1]], ["expand", [1, 4, 3]]], (1, 4, 3))],
         lambda x: x[:, :, None].expand(-1, -1, 3)),
    ],
)  # fmt: skip
def test_the_batch_is_followed_through_views(shape: Any, steps: Any, move: Any) -> None:
    made = views(shape, *steps)
    x = torch.rand(3, *shape[1:])
    torch.testing.assert_close(evaluate(made, {"x": x})[made.outputs[0]], move(x))


def test_a_traced_batch_above_one() -> None:
    made = views((4, 6), ([["reshape", [2, 2, 6]], ["reshape", [4, 6]]], (4, 6)))
    with pytest.raises(InputError, match="mixes the samples of a batch at v0"):
        rebatch(made, 3)
    flat = views((4, 6), ([["reshape", [24]], ["reshape", [4, 2, 3]]], (4, 2, 3)))
    assert rebatch(flat, 5).tensors["v0"] == (5, 2, 3)


@pytest.mark.parametrize(
    ("node", "shape", "why"),
    [
        (Node("y", "mean", ("x",), {"axes": (0,), "keepdim": True}), (1, 4, 4), "batch axis"),
        (Node("y", "softmax", ("x",), {"axis": 0}), (1, 4, 4), "along the batch axis"),
        (Node("y", "concat", ("x", "x"), {"axis": 0}), (2, 4, 4), "along the batch axis"),
        (Node("y", "add", ("x", "t")), (1, 4, 4), "different places"),
    ],
)
def test_mixing_samples_is_refused(node: Node, shape: tuple[int, ...], why: str) -> None:
    turn = Node("t", "rearrange", ("x",), {"steps": [["permute", [1, 0, 2]]]})
    wide = Node("w", "rearrange", ("t",), {"steps": [["expand", [4, 4, 4]]]})
    made = graph({"x": (1, 4, 4)}, [(turn, (4, 1, 4)), (wide, (4, 4, 4)), (node, shape)])
    with pytest.raises(InputError, match="mixes the samples of a batch"):
        rebatch(made, 2)
    alone = graph({"x": (1, 4, 4)}, [(turn, (4, 1, 4)), (node, shape)])
    with pytest.raises(InputError, match=why):
        rebatch(alone, 2)


def test_constants_of_concat_are_broadcast() -> None:
    made = graph(
        {"x": (1, 2, 3)},
        [
            (Node("cls", "constant", (), {}, {"value": "cls"}), (1, 1, 3)),
            (Node("cat", "concat", ("cls", "x"), {"axis": 1}), (1, 3, 3)),
        ],
        {"cls": [[[1, 2, 3]]]},
    )
    found = evaluate(made, {"x": torch.zeros(4, 2, 3)})["cat"]
    assert found.shape == (4, 3, 3) and torch.equal(found[3, 0], torch.tensor([1.0, 2, 3]))
