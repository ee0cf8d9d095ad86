"""Which tensors lie channels-last in memory, and what layout each operator reads."""

from __future__ import annotations

from collections.abc import Mapping

from hwmpq.graph import Graph, Node

NHWC, PLAIN = "nhwc", "plain"
_IMAGE_OPS = ("conv2d", "max_pool2d", "avg_pool2d", "batch_affine")
_ANY_LAYOUT = ("mean", "rearrange")
_FOLLOWS = (
    "add", "mul", "relu", "clamp", "gelu", "silu", "hardswish", "sigmoid", "hardsigmoid", "tanh",
    "concat", "pad",
)  # fmt: skip


def layouts(graph: Graph) -> dict[str, str]:
    """tensor -> 'nhwc' (images, channels-last) or 'plain' (row-major in torch's order).

    Images stay channels-last from the first convolution to the last reader; an image that arrives
    from outside is turned when it is stored.
    """
    readers = graph.readers()
    found = {
        name: NHWC if any(r.op in _IMAGE_OPS for r, _ in readers[name]) else PLAIN
        for name in graph.inputs
    }
    for node in graph.nodes:
        found[node.name] = PLAIN
        if len(graph.tensors[node.name]) != 4:
            continue
        if node.op in _IMAGE_OPS:
            found[node.name] = NHWC
        elif node.op in _FOLLOWS:
            if any(found[t] == NHWC for t in node.inputs):
                found[node.name] = NHWC
        elif node.op in ("rearrange", "mean"):
            to_image = any(r.op in _IMAGE_OPS for r, _ in readers[node.name])
            slices = node.op == "rearrange" and all(s[0] == "slice" for s in node.attrs["steps"])
            kept = node.op == "mean" and node.attrs["keepdim"]
            if to_image or ((slices or kept) and found[node.inputs[0]] == NHWC):
                found[node.name] = NHWC
    return found


def required(node: Node, index: int, found: Mapping[str, str], graph: Graph) -> str | None:
    """The layout in which a node reads an operand; None = any."""
    if len(graph.tensors[node.inputs[index]]) != 4:
        return PLAIN
    if node.op in _ANY_LAYOUT:
        return None
    if node.op in _IMAGE_OPS:
        return NHWC
    if node.op in _FOLLOWS:
        return found[node.name]
    return PLAIN
