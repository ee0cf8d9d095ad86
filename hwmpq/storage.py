"""The storage rule: in which encoding every tensor lies in memory, and who re-encodes it.

A format fixes the encoding of a layer's weights and of what the layer *reads*; nobody chooses what
it writes. Every reader states a demand:

  layer input           its format's activation encoding (operand b of a matmul: the weight one)
  residual, add operand 8-bit if all layer readers of the tensor are integer, else the widest float
                        among them. Layer readers are looked for through operators that keep the
                        encoding; a layer that takes the tensor as its residual counts as one; a
                        tensor without any follows the result of the add
  max-pool, pad, clamp, reshape, concat: what their own result is stored in
  any other float operator, and the network's output: fp32

Equal demands: the tensor is stored so. Otherwise once in the widest (fp32 > 16 > 8 > 4 > 2 bit, a
tie goes to fp32), and each other reader re-encodes the stored value.

A rearranged tensor that a matmul reads (q, k, v) has a quantizer of its own; other operators that
keep the encoding share their input's, concat and its operands share one. `StoragePlan.root` names
the tensor whose quantizer a tensor uses.

The simulator, the lowering and the transition costs all call `plan`; there is no second copy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hwmpq.graph import Graph, Node

#: Operators whose result has the encoding and the quantizer of their input.
KEEPS = ("max_pool2d", "pad", "relu", "clamp", "rearrange")
_FLOAT_BITS = {
    "fp32": 32, "bf16": 16, "fp16": 16, "e4m3": 8, "e5m2": 8, "e3m2": 6, "e2m3": 6, "e2m1": 4,
}  # fmt: skip


def is_integer(encoding: str) -> bool:
    """True for 'u8', 's4' and the like."""
    return re.fullmatch(r"[us]\d+", encoding) is not None


def bits(encoding: str) -> int:
    """Bits of one element in the encoding."""
    return int(encoding[1:]) if is_integer(encoding) else _FLOAT_BITS[encoding]


def widest(encodings: Iterable[str]) -> str:
    """The encoding that holds all of them: the widest; fp32 when two of that width differ."""
    distinct = set(encodings)
    top = max(bits(e) for e in distinct)
    best = {e for e in distinct if bits(e) == top}
    return best.pop() if len(best) == 1 else "fp32"


@dataclass(frozen=True)
class StoragePlan:
    """stored: tensor -> encoding in memory; demand: (node, operand index) -> encoding read;
    root: tensor -> the tensor whose quantizer it uses."""

    stored: Mapping[str, str]
    demand: Mapping[tuple[str, int], str]
    root: Mapping[str, str]

    def reencodes(self, node: Node, index: int) -> bool:
        """True when this operand is read in another encoding than it is stored in."""
        return self.demand[node.name, index] != self.stored[node.inputs[index]]


def keeps_encoding(graph: Graph) -> frozenset[str]:
    """Names of the glue nodes that pass their input's encoding and quantizer on."""
    readers = graph.readers()
    feeds_matmul: dict[str, bool] = {}
    for node in reversed(graph.nodes):
        feeds_matmul[node.name] = any(
            r.op == "matmul" or (r.op in KEEPS and feeds_matmul[r.name])
            for r, _ in readers[node.name]
        )
    return frozenset(
        n.name
        for n in graph.nodes
        if n.op in KEEPS and not (n.op == "rearrange" and feeds_matmul[n.name])
    )


def quantizer_roots(graph: Graph) -> dict[str, str]:
    """tensor -> tensor whose quantizer it uses (itself unless shared)."""
    parent = {name: name for name in graph.tensors}

    def find(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    keeps = keeps_encoding(graph)
    for node in graph.nodes:
        if node.name in keeps or node.op == "concat":
            for tensor in node.inputs:
                parent[find(node.name)] = find(tensor)
    return {name: find(name) for name in graph.tensors}


def plan(graph: Graph, reads: Mapping[str, tuple[str, str]]) -> StoragePlan:
    """Apply the storage rule.

    reads: layer name -> (activation encoding, weight encoding) of its format.
    """
    keeps = keeps_encoding(graph)
    readers = graph.readers()
    layer_readers = _layer_readers(graph, reads, keeps)
    stored: dict[str, str] = {}
    demand: dict[tuple[str, int], str] = {}

    def settle(tensor: str) -> None:
        wishes = [demand[r.name, i] for r, i in readers[tensor]]
        if tensor in graph.outputs or not wishes:
            wishes.append("fp32")
        stored[tensor] = widest(wishes)

    for node in reversed(graph.nodes):
        settle(node.name)
        for index, tensor in enumerate(node.inputs):
            demand[node.name, index] = _demand(
                node, index, stored[node.name], reads, keeps, layer_readers[tensor]
            )
    for name in graph.inputs:
        settle(name)
    return StoragePlan(stored, demand, quantizer_roots(graph))


def _demand(
    node: Node,
    index: int,
    result: str,
    reads: Mapping[str, tuple[str, str]],
    keeps: frozenset[str],
    layer_readers: frozenset[str],
) -> str:
    if node.is_layer:
        if node.op == "matmul":
            return reads[node.name][index]
        if index == 0:
            return reads[node.name][0]
        return _follow(layer_readers, reads[node.name][0])
    if node.name in keeps or node.op == "concat":
        return result
    if node.op == "rearrange":  # its result has a quantizer of its own: re-encoded from a float
        return "fp32" if is_integer(result) else result
    if node.op == "add" and len(node.inputs) == 2:
        return _follow(layer_readers, result)
    return "fp32"


def _follow(layer_readers: frozenset[str], otherwise: str) -> str:
    if not layer_readers:
        return otherwise
    floats = [e for e in layer_readers if not is_integer(e)]
    return widest(floats) if floats else "u8"


def _layer_readers(
    graph: Graph, reads: Mapping[str, tuple[str, str]], keeps: frozenset[str]
) -> dict[str, frozenset[str]]:
    """tensor -> activation encodings of the layers that read it, through encoding-keeping glue."""
    readers = graph.readers()
    found: dict[str, frozenset[str]] = {}

    def of(tensor: str) -> frozenset[str]:
        encodings: set[str] = set()
        for node, index in readers[tensor]:
            if node.is_layer:
                is_b = node.op == "matmul" and index == 1
                encodings.add(reads[node.name][1 if is_b else 0])
            elif node.name in keeps or node.op == "concat":
                encodings |= found[node.name]
        return frozenset(encodings)

    for node in reversed(graph.nodes):
        found[node.name] = of(node.name)
    for name in graph.inputs:
        found[name] = of(name)
    return found
