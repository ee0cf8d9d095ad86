"""The canonical graph while it is being built and rewritten: a mutable twin of `hwmpq.graph.Graph`.

Besides the Graph's own parts a draft knows each node's module path (`paths`), and admits one
operator that a finished graph does not: `batch_norm` (params mean, var[, weight][, bias]; eps).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.graph import Graph, Node


class Draft:
    """Nodes in execution order under construction.

    reserved: names that only layers may take (their module paths).
    """

    def __init__(self, reserved: Iterable[str] = ()):
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.nodes: dict[str, Node] = {}
        self.tensors: dict[str, tuple[int, ...]] = {}
        self.constants: dict[str, NDArray[Any]] = {}
        self.paths: dict[str, str] = {}
        self._reserved = frozenset(reserved)

    def glue_name(self, wish: str) -> str:
        """`wish`, or `wish_1`, `wish_2`, ... when it is taken or reserved for a layer."""
        name, i = wish, 0
        while name in self.tensors or name in self._reserved:
            i += 1
            name = f"{wish}_{i}"
        return name

    def layer_name(self, wish: str) -> str:
        """`wish`, or `wish@1`, `wish@2`, ... for the second, third call of one module."""
        name, i = wish, 0
        while name in self.tensors:
            i += 1
            name = f"{wish}@{i}"
        return name

    def add_input(self, wish: str, shape: tuple[int, ...]) -> str:
        name = self.glue_name(wish)
        self.inputs.append(name)
        self.tensors[name] = shape
        return name

    def add(self, node: Node, shape: tuple[int, ...], path: str = "") -> str:
        """Append a node; returns its name."""
        self.nodes[node.name] = node
        self.tensors[node.name] = shape
        self.paths[node.name] = path
        return node.name

    def constant(self, wish: str, value: NDArray[Any]) -> str:
        """Store a constant; an equal one of that name is reused, another gets `wish_1`, ..."""
        name, i = wish, 0
        while name in self.constants and not np.array_equal(self.constants[name], value):
            i += 1
            name = f"{wish}_{i}"
        self.constants.setdefault(name, value)
        return name

    def uses(self, tensor: str) -> int:
        """How often a tensor is read; being a graph output counts."""
        count = sum(node.inputs.count(tensor) for node in self.nodes.values())
        return count + self.outputs.count(tensor)

    def readers(self, tensor: str) -> list[Node]:
        return [node for node in self.nodes.values() if tensor in node.inputs]

    def param_readers(self, constant: str) -> list[Node]:
        return [node for node in self.nodes.values() if constant in node.params.values()]

    def change(self, name: str, **fields: Any) -> Node:
        """Replace fields of the node in its place; `attrs` are merged into the old ones."""
        old = self.nodes[name]
        attrs: Mapping[str, Any] = {**old.attrs, **fields.pop("attrs", {})}
        self.nodes[name] = replace(old, attrs=attrs, **fields)
        return self.nodes[name]

    def bypass(self, name: str, tensor: str) -> None:
        """Remove node `name`; its readers read `tensor` instead."""
        del self.nodes[name], self.tensors[name]
        self._redirect(name, tensor)

    def take_place(self, name: str, node: Node) -> None:
        """Move `node` to where node `name` stands, which goes; readers of either read `node`."""
        shape = self.tensors.pop(name)
        kept = ((k, v) for k, v in self.nodes.items() if k != node.name)
        self.nodes = dict((node.name, node) if k == name else (k, v) for k, v in kept)
        self.tensors[node.name] = shape
        self._redirect(name, node.name)

    def rename(self, old: str, new: str) -> None:
        self.nodes = {
            (new if k == old else k): (replace(v, name=new) if k == old else v)
            for k, v in self.nodes.items()
        }
        self.tensors[new] = self.tensors.pop(old)
        self.paths[new] = self.paths.pop(old, "")
        self._redirect(old, new)

    def _redirect(self, old: str, new: str) -> None:
        for name, node in self.nodes.items():
            if old in node.inputs:
                inputs = tuple(new if item == old else item for item in node.inputs)
                self.nodes[name] = replace(node, inputs=inputs)
        self.outputs = [new if item == old else item for item in self.outputs]

    def drop_dead(self) -> None:
        """Remove every node that no output depends on."""
        live = set(self.outputs)
        for node in reversed(list(self.nodes.values())):
            if node.name in live:
                live.update(node.inputs)
            else:
                del self.nodes[node.name], self.tensors[node.name]

    def finish(self) -> Graph:
        """The frozen graph, with the constants that are still read."""
        used = {name for node in self.nodes.values() for name in node.params.values()}
        order = [*self.inputs, *self.nodes]
        return Graph(
            tuple(self.inputs),
            tuple(self.outputs),
            tuple(self.nodes.values()),
            {name: self.tensors[name] for name in order},
            {name: value for name, value in self.constants.items() if name in used},
        )
