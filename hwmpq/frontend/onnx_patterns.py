"""Activations that exporters write in several ONNX nodes, put together again: SiLU and GELU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Node:
    """An ONNX node. inputs: '' for one left out; attrs: as ONNX has them, and 'outputs', their
    number."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]


def fuse(
    nodes: Sequence[Node], constants: Mapping[str, Tensor], outputs: Sequence[str]
) -> list[Node]:
    """x · sigmoid(x) as Silu, x/2 · (1 + erf(x/√2)) as Gelu; where nothing else reads the parts."""
    found = _Patterns(nodes, constants, outputs)
    for node in nodes:
        if node.op == "Sigmoid":
            found.silu(node)
        elif node.op == "Erf":
            found.gelu(node)
    return [found.made.get(node.name, node) for node in nodes if node.name not in found.gone]


class _Patterns:
    """made: by the name of the node whose place it takes; gone: names of nodes."""

    def __init__(
        self, nodes: Sequence[Node], constants: Mapping[str, Tensor], outputs: Sequence[str]
    ):
        self.made: dict[str, Node] = {}
        self.gone: set[str] = set()
        self.outputs = outputs
        self.producer = {name: node for node in nodes for name in node.outputs}
        self.readers: dict[str, list[Node]] = {}
        for node in nodes:
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)
        self.constants = dict(constants) | {
            node.outputs[0]: node.attrs["value"] for node in nodes if node.op == "Constant"
        }

    def silu(self, sigmoid: Node) -> None:
        product = self._only_reader(sigmoid, "Mul")
        if product and sorted(product.inputs) == sorted((*sigmoid.inputs, *sigmoid.outputs)):
            self._replace("Silu", sigmoid.inputs[0], [sigmoid], product)

    def gelu(self, erf: Node) -> None:
        """Both orders: (x · (1 + erf)) · ½, and (x · ½) · (1 + erf)."""
        inner = self.producer.get(erf.inputs[0])
        plus = self._only_reader(erf, "Add")
        if inner is None or plus is None or self._number(plus) != 1:
            return
        wanted = {"Div": sqrt(2), "Mul": sqrt(0.5)}.get(inner.op, 0.0)
        product = self._only_reader(plus, "Mul")
        if product is None or abs((self._number(inner) or 0.0) - wanted) > 1e-6:
            return
        x = self._variable(inner)
        (other,) = (name for name in product.inputs if name not in plus.outputs)
        half = self._only_reader(product, "Mul")
        before = self.producer.get(other)
        if other == x and half and self._number(half) == 0.5:
            self._replace("Gelu", x, [inner, erf, plus, product], half)
        elif before and before.op == "Mul" and (self._number(before), self._variable(before)) == (
            0.5, x,
        ) and self._only_reader(before, "Mul"):  # fmt: skip
            self._replace("Gelu", x, [inner, erf, plus, before], product)

    def _replace(self, op: str, x: str, parts: Sequence[Node], last: Node) -> None:
        self.gone |= {part.name for part in parts}
        self.made[last.name] = Node(last.name, op, (x,), last.outputs, {"outputs": 1})

    def _only_reader(self, node: Node, op: str) -> Node | None:
        readers = self.readers.get(node.outputs[0], [])
        alone = len(readers) == 1 and node.outputs[0] not in self.outputs
        return readers[0] if alone and readers[0].op == op else None

    def _number(self, node: Node) -> float | None:
        """The constant operand of a node, where it is a single number."""
        values = [self.constants[name] for name in node.inputs if name in self.constants]
        return float(values[0]) if len(values) == 1 and values[0].numel() == 1 else None

    def _variable(self, node: Node) -> str:
        return next((name for name in node.inputs if name not in self.constants), "")
