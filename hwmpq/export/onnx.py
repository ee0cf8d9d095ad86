"""The canonical graph as a float ONNX model: `onnx_model(graph)`; needs the package onnx.

Tensors keep the graph's names and shapes, weights the names of their layers. Source of every
operator's meaning: the ONNX operator reference, opset 20.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.graph import Graph, Node

OPSET = 20
#: Written into the file; older than what today's onnx writes, so that runtimes read it.
_IR_VERSION = 10


def onnx_model(graph: Graph) -> Any:
    """The graph as an onnx.ModelProto that has passed ONNX's own checker."""
    writer = Writer(graph)
    for node in graph.nodes:
        WRITERS[node.op](writer, node)
    return assembled(writer, OPSET)


def assembled(writer: Writer, opset: int) -> Any:
    """What was written as a checked onnx.ModelProto."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = writer.graph

    def described(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, graph.tensors[name])

    inner = {node.name for node in graph.nodes} - set(graph.outputs)
    body = helper.make_graph(
        [helper.make_node(op, i, [o], name=o, **a) for op, i, o, a in writer.nodes],
        "hwmpq",
        [described(name) for name in graph.inputs],
        [described(name) for name in graph.outputs],
        [numpy_helper.from_array(value, name) for name, value in writer.constants.items()],
        value_info=[described(o) for _, _, o, _ in writer.nodes if o in inner],
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=_IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


class Writer:
    """ONNX nodes (op, inputs, output, attributes) and initializers in the making.

    shapes: of every tensor that a writer may read."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.shapes = dict(graph.tensors)
        self.nodes: list[tuple[str, list[str], str, dict[str, Any]]] = []
        self.constants: dict[str, NDArray[Any]] = {}

    def emit(self, op: str, inputs: Sequence[str], output: str, **attrs: Any) -> str:
        self.nodes.append((op, list(inputs), output, attrs))
        return output

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        self.constants[name] = np.asarray(value, dtype=dtype, order="C")
        return name

    def param(self, node: Node, role: str) -> str:
        name = node.params[role]
        return self.constant(name, self.graph.constants[name])

    def value(self, node: Node, role: str) -> NDArray[Any]:
        return self.graph.constants[node.params[role]]

    def weight(self, node: Node, turned: bool = False) -> str:
        """A layer's weight in fp32; turned: its transpose."""
        if not turned:
            return self.param(node, "weight")
        return self.constant(f"{node.params['weight']}.T", self.value(node, "weight").T)

    def bias(self, node: Node) -> list[str]:
        """A layer's bias in fp32, if it has one."""
        return [self.param(node, "bias")] if "bias" in node.params else []

    def chain(self, steps: Sequence[tuple[str, list[str], dict[str, Any]]], start: str,
              end: str) -> None:  # fmt: skip
        """Operators one behind the other, each with further inputs; the last one writes `end`."""
        for i, (op, more, attrs) in enumerate(steps):
            output = end if i == len(steps) - 1 else f"{end}.{i}.{op}"
            start = self.emit(op, [start, *more], output, **attrs)
        if not steps:
            self.emit("Identity", [start], end)


Step = tuple[str, list[str], dict[str, Any]]


def _layer(w: Writer, node: Node) -> None:
    first, *steps = {"conv2d": _conv2d, "linear": _linear, "matmul": _matmul}[node.op](w, node)
    x = node.inputs[0]
    if node.residual:
        steps.append(("Add", [node.residual], {}))
    match node.attrs.get("act", ""):
        case "":
            pass
        case "relu":
            steps.append(("Relu", [], {}))
        case "clamp":
            steps.append(_clip(w, node.name, node.attrs["act_lo"], node.attrs["act_hi"]))
        case other:
            raise InputError("unknown activation", other, ["relu", "clamp"])
    w.chain([first, *steps], x, node.name)


def _conv2d(w: Writer, node: Node) -> list[Step]:
    a = node.attrs
    attrs = {"strides": list(a["stride"]), "pads": list(a["padding"]), "group": a["groups"],
             "dilations": list(a["dilation"])}  # fmt: skip
    return [("Conv", [w.weight(node), *w.bias(node)], attrs)]


def _linear(w: Writer, node: Node) -> list[Step]:
    if len(w.shapes[node.inputs[0]]) == 2:
        return [("Gemm", [w.weight(node), *w.bias(node)], {"transB": 1})]
    return [
        ("MatMul", [w.weight(node, turned=True)], {}),
        *[("Add", [b], {}) for b in w.bias(node)],
    ]


def _matmul(w: Writer, node: Node) -> list[Step]:
    b = node.inputs[1]
    if node.attrs["trans_b"]:
        axes = list(range(len(w.shapes[b])))
        axes[-2:] = reversed(axes[-2:])
        b = w.emit("Transpose", [b], f"{node.name}.b", perm=axes)
    scale = node.attrs["scale"]
    steps: list[Step] = [("MatMul", [b], {})]
    if scale != 1.0:
        steps.append(("Mul", [w.constant(f"{node.name}.scale", scale)], {}))
    return steps


def _clip(w: Writer, name: str, low: float, high: float) -> Step:
    return "Clip", [w.constant(f"{name}.low", low), w.constant(f"{name}.high", high)], {}


def _binary(op: str) -> Callable[[Writer, Node], None]:
    def write(w: Writer, node: Node) -> None:
        b = w.param(node, "b") if "b" in node.params else node.inputs[1]
        w.emit(op, [node.inputs[0], b], node.name)

    return write


def _unary(op: str, **attrs: Any) -> Callable[[Writer, Node], None]:
    return lambda w, node: _plain(w, node, op, **attrs)


def _plain(w: Writer, node: Node, op: str, **attrs: Any) -> None:
    w.emit(op, node.inputs, node.name, **attrs)


def _clamp(w: Writer, node: Node) -> None:
    w.chain([_clip(w, node.name, node.attrs["lo"], node.attrs["hi"])], node.inputs[0], node.name)


def _silu(w: Writer, node: Node) -> None:
    (x,) = node.inputs
    w.emit("Mul", [x, w.emit("Sigmoid", [x], f"{node.name}.sigmoid")], node.name)


def _layer_norm(w: Writer, node: Node) -> None:
    inputs = [*node.inputs, w.param(node, "weight"), w.param(node, "bias")]
    w.emit("LayerNormalization", inputs, node.name, epsilon=node.attrs["eps"], axis=-1)


def _batch_affine(w: Writer, node: Node) -> None:
    shape = (-1, *[1] * (len(w.shapes[node.name]) - 2))
    scale, shift = (
        w.constant(f"{node.params[role]}.column", w.value(node, role).reshape(shape))
        for role in ("scale", "shift")
    )
    w.chain([("Mul", [scale], {}), ("Add", [shift], {})], node.inputs[0], node.name)


def _pool(op: str) -> Callable[[Writer, Node], None]:
    def write(w: Writer, node: Node) -> None:
        a = node.attrs
        attrs: dict[str, Any] = {"kernel_shape": list(a["kernel"]), "strides": list(a["stride"]),
                                 "pads": list(a["padding"])}  # fmt: skip
        if op == "AveragePool":
            attrs["count_include_pad"] = int(a["count_include_pad"])
        w.emit(op, node.inputs, node.name, **attrs)

    return write


def _mean(w: Writer, node: Node) -> None:
    (x,), axes = node.inputs, sorted(node.attrs["axes"])
    if len(w.shapes[x]) == 4 and axes == [2, 3]:  # the form that runtimes have in int8
        rest: list[Step] = [] if node.attrs["keepdim"] else [("Flatten", [], {"axis": 1})]
        w.chain([("GlobalAveragePool", [], {}), *rest], x, node.name)
        return
    where = w.constant(f"{node.name}.axes", axes, np.int64)
    w.emit("ReduceMean", [x, where], node.name, keepdims=int(node.attrs["keepdim"]))


def _concat(w: Writer, node: Node) -> None:
    """Constants of batch 1 are repeated to the batch."""
    axis, shapes, inputs = node.attrs["axis"], w.shapes, []
    for i, x in enumerate(node.inputs):
        wanted = list(shapes[node.name])
        wanted[axis] = shapes[x][axis]
        if wanted != list(shapes[x]):
            shape = w.constant(f"{node.name}.{i}.shape", wanted, np.int64)
            x = w.emit("Expand", [x, shape], f"{node.name}.{i}")
        inputs.append(x)
    w.emit("Concat", inputs, node.name, axis=axis)


def _pad(w: Writer, node: Node) -> None:
    pads = [amount for side in (0, 1) for amount in (pair[side] for pair in node.attrs["pads"])]
    more = [w.constant(f"{node.name}.pads", pads, np.int64),
            w.constant(f"{node.name}.value", node.attrs["value"])]  # fmt: skip
    w.emit("Pad", [*node.inputs, *more], node.name)


def _rearrange(w: Writer, node: Node) -> None:
    steps: list[Step] = []
    for i, step in enumerate(node.attrs["steps"]):
        name = f"{node.name}.{i}"
        match step:
            case ["reshape", shape]:
                steps.append(("Reshape", [w.constant(f"{name}.shape", shape, np.int64)], {}))
            case ["permute", axes]:
                steps.append(("Transpose", [], {"perm": list(axes)}))
            case ["expand", shape]:
                steps.append(("Expand", [w.constant(f"{name}.shape", shape, np.int64)], {}))
            case ["slice", axis, start, stop, stride]:
                words = {"starts": start, "ends": stop, "axes": axis, "steps": stride}
                more = [w.constant(f"{name}.{k}", [v], np.int64) for k, v in words.items()]
                steps.append(("Slice", more, {}))
            case other:
                raise InputError("unknown step of a rearrange", other)
    w.chain(steps, node.inputs[0], node.name)


def _constant(w: Writer, node: Node) -> None:
    w.constant(node.name, w.value(node, "value"))


WRITERS: dict[str, Callable[[Writer, Node], None]] = {
    "conv2d": _layer,
    "linear": _layer,
    "matmul": _layer,
    "add": _binary("Add"),
    "mul": _binary("Mul"),
    "relu": _unary("Relu"),
    "clamp": _clamp,
    "gelu": lambda w, node: _plain(w, node, "Gelu", approximate=node.attrs["approximate"]),
    "silu": _silu,
    "hardswish": _unary("HardSwish"),
    "sigmoid": _unary("Sigmoid"),
    "hardsigmoid": _unary("HardSigmoid", alpha=1 / 6),
    "tanh": _unary("Tanh"),
    "softmax": lambda w, node: _plain(w, node, "Softmax", axis=node.attrs["axis"]),
    "layer_norm": _layer_norm,
    "batch_affine": _batch_affine,
    "max_pool2d": _pool("MaxPool"),
    "avg_pool2d": _pool("AveragePool"),
    "mean": _mean,
    "concat": _concat,
    "pad": _pad,
    "rearrange": _rearrange,
    "constant": _constant,
}
