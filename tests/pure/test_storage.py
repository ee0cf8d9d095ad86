"""The storage rule, case by case: what each reader demands, and what is stored."""

from __future__ import annotations

from typing import Any

import pytest

from hwmpq.graph import Graph, Node
from hwmpq.storage import StoragePlan, bits, is_integer, keeps_encoding, plan, widest

U8, U4, BF16, FP16, FP32 = ("u8", "s8"), ("u4", "s4"), ("bf16",) * 2, ("fp16",) * 2, ("fp32",) * 2


def linear(name: str, *inputs: str, **attrs: Any) -> Node:
    return Node(name, "linear", inputs, {"residual": len(inputs) > 1, **attrs})


def matmul(name: str, a: str, b: str) -> Node:
    return Node(name, "matmul", (a, b), {"trans_b": False, "scale": 1.0})


def graph(*nodes: Node, inputs: tuple[str, ...] = ("x",), outputs: tuple[str, ...] = ()) -> Graph:
    """Shapes do not matter to the rule; the last node is the output by default."""
    names = [*inputs, *(node.name for node in nodes)]
    return Graph(inputs, outputs or (nodes[-1].name,), nodes, dict.fromkeys(names, (1, 8)), {})


def planned(made: Graph, **reads: tuple[str, str]) -> StoragePlan:
    return plan(made, reads)


def test_words() -> None:
    assert is_integer("u8") and is_integer("s4") and not any(map(is_integer, ("fp32", "e4m3")))
    assert [bits(e) for e in ("u4", "s8", "e4m3", "bf16", "fp32")] == [4, 8, 8, 16, 32]


@pytest.mark.parametrize(
    ("wishes", "stored"),
    [
        (["u8"], "u8"), (["u4", "u8"], "u8"), (["u2", "u4"], "u4"), (["u8", "bf16"], "bf16"),
        (["bf16", "fp32", "u8"], "fp32"), (["bf16", "fp16"], "fp32"), (["u8", "s8"], "fp32"),
        (["u8", "e4m3"], "fp32"), (["u8", "s8", "fp16"], "fp16"), (["e4m3", "e5m2"], "fp32"),
    ],
)  # fmt: skip
def test_the_widest(wishes: list[str], stored: str) -> None:
    assert widest(wishes) == widest(reversed(wishes)) == stored


def test_a_chain_is_stored_as_its_reader_wants() -> None:
    made = graph(linear("a", "x"), linear("b", "a"), linear("c", "b"))
    found = planned(made, a=U8, b=BF16, c=U4)
    assert found.stored == {"x": "u8", "a": "bf16", "b": "u4", "c": "fp32"}
    assert found.demand == {("a", 0): "u8", ("b", 0): "bf16", ("c", 0): "u4"}


@pytest.mark.parametrize(
    ("left", "right", "stored", "again"),
    [
        (U8, U8, "u8", ()), (U8, U4, "u8", ("r",)), (U4, BF16, "bf16", ("l",)),
        (BF16, FP16, "fp32", ("l", "r")), (FP32, U8, "fp32", ("r",)),
    ],
)  # fmt: skip
def test_two_readers(
    left: tuple[str, str], right: tuple[str, str], stored: str, again: tuple[str, ...]
) -> None:
    made = graph(linear("a", "x"), linear("l", "a"), linear("r", "a"), outputs=("l", "r"))
    found = planned(made, a=U8, l=left, r=right)
    assert found.stored["a"] == stored
    reencoded = tuple(n.name for n in made.nodes[1:] if found.reencodes(n, 0))
    assert reencoded == again


def test_an_output_that_is_read_on_is_fp32() -> None:
    made = graph(linear("a", "x"), linear("b", "a"), outputs=("a", "b"))
    found = planned(made, a=U8, b=U8)
    assert found.stored["a"] == "fp32" and found.reencodes(made.nodes[1], 0)


def test_a_tensor_that_nobody_reads_is_fp32() -> None:
    made = graph(linear("dead", "x"), linear("b", "x"), inputs=("x", "unused"))
    found = planned(made, dead=U8, b=U8)
    assert (found.stored["dead"], found.stored["unused"], found.stored["x"]) == (
        "fp32", "fp32", "u8",
    )  # fmt: skip


# a: stem; b: layer on the branch; c: adds a in its epilogue; d: reads c, e: reads a too


@pytest.mark.parametrize(
    ("b", "c", "residual", "stored"),
    [
        (U8, U8, "u8", "u8"),  # all readers are integer
        (U4, U8, "u8", "u8"),  # eight bits even when the only direct reader is narrower
        (BF16, U8, "bf16", "bf16"),  # the widest float among them
        (BF16, FP16, "fp32", "fp32"),  # a tie
        (U8, FP32, "fp32", "fp32"),  # the layer that adds it counts as a reader
    ],
)
def test_residuals(b: tuple[str, str], c: tuple[str, str], residual: str, stored: str) -> None:
    made = graph(linear("a", "x"), linear("b", "a"), linear("c", "b", "a"), linear("d", "c"))
    found = planned(made, a=U8, b=b, c=c, d=U8)
    assert found.demand["c", 1] == residual
    assert found.stored["a"] == stored


def test_four_bit_readers_of_a_residual_read_eight() -> None:
    """The residual is 8-bit even if every layer is narrower; the layers re-encode it."""
    made = graph(linear("a", "x"), linear("b", "a"), linear("c", "b", "a"), linear("d", "c"))
    found = planned(made, a=U4, b=U4, c=U4, d=U4)
    assert found.demand["c", 1] == "u8" and found.stored["a"] == "u8"
    assert found.reencodes(made.nodes[1], 0) and not found.reencodes(made.nodes[2], 1)


def test_operands_of_an_add() -> None:
    made = graph(
        linear("a", "x"), linear("b", "x"), Node("s", "add", ("a", "b")), linear("c", "s"),
        linear("d", "a"), outputs=("c", "d"),
    )  # fmt: skip
    found = planned(made, a=U8, b=U8, c=BF16, d=U8)
    assert found.demand["s", 0] == "u8"  # a has a layer reader, an integer one
    assert found.demand["s", 1] == "bf16"  # b has none: it follows the sum
    assert (found.stored["a"], found.stored["b"], found.stored["s"]) == ("u8", "bf16", "bf16")
    constant = graph(linear("a", "x"), Node("s", "add", ("a",)), linear("c", "s"))
    assert planned(constant, a=U8, c=U8).demand["s", 0] == "fp32"


def test_layer_readers_are_found_through_glue_that_keeps_the_encoding() -> None:
    made = graph(
        linear("a", "x"), Node("pool", "max_pool2d", ("a",)), linear("b", "pool"),
        Node("s", "add", ("a", "b")), linear("c", "s"),
    )  # fmt: skip
    found = planned(made, a=U8, b=BF16, c=U8)
    assert found.demand["s", 0] == "bf16"


@pytest.mark.parametrize("op", ["max_pool2d", "pad", "relu", "clamp", "rearrange"])
def test_operators_that_keep_the_encoding(op: str) -> None:
    made = graph(linear("a", "x"), Node("k", op, ("a",)), linear("b", "k"))
    found = planned(made, a=U8, b=U4)
    assert found.stored["a"] == found.stored["k"] == found.demand["k", 0] == "u4"
    assert found.root["k"] == found.root["a"]
    wide = planned(made, a=U8, b=FP16)
    assert wide.stored["a"] == "fp16"


@pytest.mark.parametrize("op", ["gelu", "softmax", "layer_norm", "mean", "avg_pool2d", "mul"])
def test_unfused_float_operators_read_fp32(op: str) -> None:
    made = graph(linear("a", "x"), Node("k", op, ("a",)), linear("b", "k"))
    found = planned(made, a=U8, b=U8)
    assert (found.stored["a"], found.stored["k"]) == ("fp32", "u8")
    assert found.root["k"] == "k"


def test_a_pool_between_readers_of_two_widths() -> None:
    made = graph(
        linear("a", "x"), Node("p", "max_pool2d", ("a",)), linear("b", "p"), linear("c", "a"),
        outputs=("b", "c"),
    )  # fmt: skip
    found = planned(made, a=U8, b=U4, c=U8)
    assert (found.stored["a"], found.stored["p"]) == ("u8", "u4")
    assert found.reencodes(made.node("p"), 0)


def test_concat_and_its_parts_share_a_quantizer() -> None:
    made = graph(
        linear("a", "x"), linear("b", "x"), Node("cat", "concat", ("a", "b"), {"axis": 1}),
        linear("c", "cat"), linear("d", "a"), outputs=("c", "d"),
    )  # fmt: skip
    found = planned(made, a=U8, b=U8, c=U8, d=BF16)
    assert len({found.root[t] for t in ("a", "b", "cat")}) == 1
    assert (found.stored["cat"], found.stored["b"], found.stored["a"]) == ("u8", "u8", "bf16")
    assert found.reencodes(made.node("cat"), 0) and not found.reencodes(made.node("cat"), 1)


def attention() -> Graph:
    """qkv → slices → qk → softmax → av → proj, the residual stream around it."""

    def part(name: str, start: int) -> Node:
        return Node(name, "rearrange", ("qkv",), {"steps": [["slice", 1, start, start + 2, 1]]})

    return graph(
        linear("stem", "x"), linear("qkv", "stem"), part("q", 0), part("k", 2), part("v", 4),
        matmul("qk", "q", "k"), Node("soft", "softmax", ("qk",)), matmul("av", "soft", "v"),
        Node("joined", "rearrange", ("av",), {"steps": [["reshape", [1, 8]]]}),
        linear("proj", "joined", "stem"), linear("head", "proj"),
    )  # fmt: skip


def test_slices_of_qkv_have_quantizers_of_their_own() -> None:
    made = attention()
    assert keeps_encoding(made) == {"joined"}
    found = planned(made, stem=U8, qkv=U8, qk=U8, av=U8, proj=U8, head=U8)
    assert {t: found.root[t] for t in ("q", "k", "v", "qkv")} == {
        t: t for t in ("q", "k", "v", "qkv")
    }
    assert {t: found.stored[t] for t in ("q", "k", "v", "qkv", "qk", "soft", "av", "stem")} == {
        "q": "u8", "k": "s8", "v": "s8", "qkv": "fp32", "qk": "fp32", "soft": "u8", "av": "u8",
        "stem": "u8",
    }  # fmt: skip
    assert found.root["joined"] == found.root["av"]


def test_float_matmuls_keep_their_slices_narrow() -> None:
    found = planned(attention(), stem=U8, qkv=U8, qk=BF16, av=FP16, proj=U8, head=U8)
    assert {t: found.stored[t] for t in ("q", "k", "v", "soft")} == {
        "q": "bf16", "k": "bf16", "v": "fp16", "soft": "fp16",
    }  # fmt: skip
    assert found.stored["qkv"] == "fp32"  # bf16 and fp16 readers: a tie


def test_an_opaque_operator_is_a_float_reader() -> None:
    made = graph(linear("a", "x"), Node("e", "opaque", ("a",)), linear("b", "e"))
    found = planned(made, a=U8, b=U8)
    assert (found.demand["e", 0], found.stored["a"], found.stored["e"]) == ("fp32", "fp32", "u8")
