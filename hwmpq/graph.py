"""The one canonical graph: what the frontend makes, the simulator interprets, lowering compiles.

Plain Python and numpy. Shapes are torch's (images NCHW). Every node has exactly one output, which
carries the node's name: `Graph.tensors[node.name]`. A layer's name is its module path.

Layer operators (they take a number format; `Node.is_layer`):
  conv2d   inputs (x[, residual]); params weight[, bias]
           attrs stride (2), padding (top, left, bottom, right), dilation (2), groups
  linear   inputs (x[, residual]); params weight [n, k][, bias]; x is [..., k]
  matmul   inputs (a, b); attrs trans_b: b is [..., n, k] instead of [..., k, n]; scale: float
           (the factor on the product, e.g. 1/sqrt(d))
  Each also carries the fused epilogue: attrs `residual` (bool: the last input is added before the
  activation) and `act`: '' or 'relu' | 'clamp' (attrs act_lo, act_hi; relu6 = clamp 0..6).

Glue operators (carried; they run in the encodings the storage rule gives their tensors):
  add, mul          (a, b) elementwise with broadcasting; a constant operand is a params entry 'b'
  relu, clamp (attrs lo, hi), gelu (attrs approximate: 'none'|'tanh'), silu, hardswish, sigmoid,
  hardsigmoid, tanh elementwise on (x,)
  softmax           attrs axis (the last one)
  layer_norm        params weight, bias; attrs eps; over the last axis
  batch_affine      params scale, shift (per channel): a BatchNorm no layer could take in
  max_pool2d, avg_pool2d   attrs kernel (2), stride (2), padding (4), ceil=False;
                    avg_pool2d also count_include_pad
  mean              attrs axes, keepdim
  concat            attrs axis
  pad               attrs pads ((before, after) per axis), value (always 0.0)
  rearrange         attrs steps: a list of view operations on the logical shape, applied in order:
                    ["reshape", [shape]] ["permute", [axes]] ["slice", axis, start, stop, step]
                    ["expand", [shape]];  it only moves elements
  constant          no inputs; params value (cls tokens, position tables used as operands)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import UnknownName
from hwmpq.types import Layer, Network, Workload

LAYER_NODE_OPS = ("conv2d", "linear", "matmul")
GLUE_OPS = (
    "add", "mul", "relu", "clamp", "gelu", "silu", "hardswish", "sigmoid", "hardsigmoid", "tanh",
    "softmax", "layer_norm", "batch_affine", "max_pool2d", "avg_pool2d", "mean", "concat", "pad",
    "rearrange", "constant",
)  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One operator. inputs: tensor names; params: role -> name in Graph.constants."""

    name: str
    op: str
    inputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    @property
    def is_layer(self) -> bool:
        return self.op in LAYER_NODE_OPS

    @property
    def residual(self) -> str | None:
        """Name of the tensor added in the epilogue, if any."""
        return self.inputs[-1] if self.attrs.get("residual") else None


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in execution order; tensors: name -> shape (all fp32 logically)."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    tensors: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, NDArray[Any]]

    def node(self, name: str) -> Node:
        for item in self.nodes:
            if item.name == name:
                return item
        raise KeyError(name)

    def readers(self) -> dict[str, list[tuple[Node, int]]]:
        """tensor -> [(node, operand index)] in execution order."""
        found: dict[str, list[tuple[Node, int]]] = {name: [] for name in self.tensors}
        for item in self.nodes:
            for index, tensor in enumerate(item.inputs):
                found[tensor].append((item, index))
        return found

    @property
    def layers(self) -> tuple[Node, ...]:
        return tuple(item for item in self.nodes if item.is_layer)


def cut(graph: Graph, outputs: Sequence[str]) -> Graph:
    """The part of the graph that the named nodes need, with them as its outputs.

    Raises UnknownName.
    """
    known = [node.name for node in graph.nodes]
    needed = set(outputs)
    for name in outputs:
        if name not in known:
            raise UnknownName("node of the model", name, known)
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed |= set(node.inputs)
    nodes = tuple(node for node in graph.nodes if node.name in needed)
    constants = {name for node in nodes for name in node.params.values()}
    return Graph(
        inputs=tuple(name for name in graph.inputs if name in needed),
        outputs=tuple(dict.fromkeys(outputs)),
        nodes=nodes,
        tensors={name: shape for name, shape in graph.tensors.items() if name in needed},
        constants={name: graph.constants[name] for name in graph.constants if name in constants},
    )


def workload_of(node: Node, graph: Graph) -> Workload:
    """What the hardware sees of a layer node."""
    words = []
    if "bias" in node.params:
        words.append("bias")
    if node.attrs.get("residual"):
        words.append("add")
    if node.attrs.get("act"):
        words.append(str(node.attrs["act"]))
    epilogue = "+".join(words)
    x = graph.tensors[node.inputs[0]]
    out = graph.tensors[node.name]
    if node.op == "conv2d":
        n, cin, h, w = x
        weight = graph.constants[node.params["weight"]].shape
        cout, _, kh, kw = weight
        (sh, sw), (dh, dw) = node.attrs["stride"], node.attrs["dilation"]
        pt, pl, pb, pr = node.attrs["padding"]
        groups = node.attrs["groups"]
        op = "depthwise" if groups == cin == cout and groups > 1 else "conv2d"
        return Workload.make(
            op, epilogue, n=n, h=h, w=w, cin=cin, cout=cout, kh=kh, kw=kw, sh=sh, sw=sw,
            pt=pt, pl=pl, pb=pb, pr=pr, dh=dh, dw=dw, groups=groups,
        )  # fmt: skip
    if node.op == "linear":
        return Workload.make("linear", epilogue, m=int(np.prod(x[:-1])), k=x[-1], n=out[-1])
    if node.op == "matmul":
        batch = int(np.prod(x[:-2]))
        return Workload.make(
            "matmul", epilogue, b=batch, m=x[-2], k=x[-1], n=out[-1],
            trans_b=int(node.attrs["trans_b"]),
        )  # fmt: skip
    raise ValueError(f"{node.name} ({node.op}) is not a layer")


def network_of(graph: Graph) -> Network:
    """The layers, and the paths of glue between them (residual operands included)."""
    layers = []
    for node in graph.layers:
        count = {r: int(graph.constants[c].size) for r, c in node.params.items()}
        layers.append(
            Layer(
                node.name,
                workload_of(node, graph),
                parameters=count.get("weight", 0),
                bias=count.get("bias", 0),
            )
        )
    reach: dict[str, set[tuple[str, tuple[str, ...]]]] = {name: set() for name in graph.inputs}
    edges: list[tuple[str, str, tuple[str, ...]]] = []
    for node in graph.nodes:
        if node.is_layer:
            for tensor in node.inputs:
                edges += [(p, node.name, glue) for p, glue in sorted(reach[tensor])]
            reach[node.name] = {(node.name, ())}
        else:
            reach[node.name] = {
                (p, (*glue, node.name)) for t in node.inputs for p, glue in reach[t]
            }
    return Network(tuple(layers), tuple(dict.fromkeys(edges)))
