"""The canonical graph as an annotated Relax module: what the compiler's passes work on.

Every node becomes a call of a private Relax function whose body says in ordinary operators what it
means in fp32 (so the module compiles and runs as it is), and whose attributes carry the name:
  hwmpq.name, hwmpq.op, hwmpq.attrs (JSON), hwmpq.params (JSON: role -> constant name),
  hwmpq.source
Private functions survive other passes; a pass that knows nothing of the names keeps them.
`lower.graph_of` reads a module back; `relax_import.annotate` makes one of anybody's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from hwmpq.graph import Graph, Node

Expr = Any


def relax_module(
    graph: Graph, opaque: Callable[[Node, list[Expr]], Expr] | None = None, as_tuple: bool = False
) -> Any:
    """tvm.IRModule with `main` (fp32, torch's shapes) and one private function per node.

    opaque: what a node of that operator is, on these inputs. as_tuple: does main give a tuple, even
    of one output?
    """
    from tvm import relax

    builder = relax.BlockBuilder()
    functions = {
        node.name: builder.add_func(_function(node, graph), f"node{i}")
        for i, node in enumerate(graph.nodes)
        if node.op != "opaque"
    }
    inputs = {name: _var(name, graph.tensors[name]) for name in graph.inputs}
    with builder.function("main", list(inputs.values())):
        with builder.dataflow():
            values: dict[str, Expr] = dict(inputs)
            for node in graph.nodes:
                constants = [relax.const(graph.constants[c]) for c in node.params.values()]
                args = [values[t] for t in node.inputs] + constants
                if opaque is not None and node.op == "opaque":
                    call = opaque(node, args)
                else:
                    call = relax.Call(functions[node.name], args)
                values[node.name] = builder.emit(call, name_hint=_identifier(node.name))
            results = [values[name] for name in graph.outputs]
            several = as_tuple or len(results) > 1
            out = builder.emit_output(relax.Tuple(results) if several else results[0])
        builder.emit_func_output(out)
    module = builder.get()
    return module.with_attr("hwmpq.inputs", json.dumps(list(graph.inputs)))


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _var(name: str, shape: tuple[int, ...]) -> Expr:
    from tvm import relax

    return relax.Var(_identifier(name), relax.TensorType(shape, "float32"))


def _function(node: Node, graph: Graph) -> Expr:
    from tvm import relax

    args = [_var(f"x{i}", graph.tensors[t]) for i, t in enumerate(node.inputs)]
    params = {role: _var(role, graph.constants[c].shape) for role, c in node.params.items()}
    builder = relax.BlockBuilder()
    with builder.function("node", [*args, *params.values()]):
        with builder.dataflow():
            result = BODIES[node.op](node, args, params, graph.tensors[node.name])
            out = builder.emit_output(_fused(node, args, result))
        builder.emit_func_output(out)
    attributes = {
        "hwmpq.name": node.name,
        "hwmpq.op": node.op,
        "hwmpq.attrs": json.dumps(dict(node.attrs)),
        "hwmpq.params": json.dumps(dict(node.params)),
        "hwmpq.source": node.source,
    }
    function = builder.get()["node"].without_attr("global_symbol")
    return function.with_attrs(attributes)


def _fused(node: Node, args: list[Expr], value: Expr) -> Expr:
    """The epilogue of a layer: residual, then activation."""
    from tvm.relax import op

    if node.attrs.get("residual"):
        value = op.add(value, args[-1])
    if node.attrs.get("act") == "relu":
        value = op.nn.relu(value)
    elif node.attrs.get("act") == "clamp":
        value = op.clip(value, node.attrs["act_lo"], node.attrs["act_hi"])
    return value


Params = Mapping[str, Expr]
Shape = tuple[int, ...]


def _conv2d(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm.relax import op

    a = node.attrs
    value = op.nn.conv2d(
        args[0], params["weight"], strides=list(a["stride"]), padding=list(a["padding"]),
        dilation=list(a["dilation"]), groups=a["groups"],
    )  # fmt: skip
    if "bias" in params:
        value = op.add(value, op.reshape(params["bias"], (1, -1, 1, 1)))
    return value


def _linear(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm.relax import op

    value = op.matmul(args[0], op.permute_dims(params["weight"]))
    return op.add(value, params["bias"]) if "bias" in params else value


def _matmul(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm import relax
    from tvm.relax import op

    b = args[1]
    if node.attrs["trans_b"]:
        axes = list(range(len(shape)))
        b = op.permute_dims(b, [*axes[:-2], axes[-1], axes[-2]])
    value = op.matmul(args[0], b)
    scale = float(node.attrs.get("scale", 1.0))
    return value if scale == 1.0 else op.multiply(value, relax.const(scale, "float32"))


def _binary(name: str) -> Callable[..., Expr]:
    def body(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
        from tvm.relax import op

        other = args[1] if len(args) > 1 else params["b"]
        return getattr(op, name)(args[0], other)

    return body


def _unary(path: str) -> Callable[..., Expr]:
    def body(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
        from tvm.relax import op

        function: Any = op
        for part in path.split("."):
            function = getattr(function, part)
        return function(args[0])

    return body


def _clamp(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm.relax import op

    return op.clip(args[0], node.attrs["lo"], node.attrs["hi"])


def _gelu(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm.relax import op

    tanh = node.attrs.get("approximate", "none") == "tanh"
    return op.nn.gelu_tanh(args[0]) if tanh else op.nn.gelu(args[0])


def _hardsigmoid(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm import relax
    from tvm.relax import op

    three, six = relax.const(3.0, "float32"), relax.const(6.0, "float32")
    return op.divide(op.clip(op.add(args[0], three), 0.0, 6.0), six)


def _hardswish(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm.relax import op

    return op.multiply(args[0], _hardsigmoid(node, args, params, shape))


def _softmax(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm.relax import op

    return op.nn.softmax(args[0], axis=-1)


def _layer_norm(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm.relax import op

    return op.nn.layer_norm(
        args[0], params["weight"], params["bias"], axes=[-1], epsilon=node.attrs["eps"]
    )


def _batch_affine(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm.relax import op

    per_channel = (1, -1, *[1] * (len(shape) - 2))
    scale, shift = (op.reshape(params[r], per_channel) for r in ("scale", "shift"))
    return op.add(op.multiply(args[0], scale), shift)


def _max_pool2d(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm.relax import op

    a = node.attrs
    return op.nn.max_pool2d(args[0], list(a["kernel"]), list(a["stride"]), list(a["padding"]))


def _avg_pool2d(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm.relax import op

    a = node.attrs
    return op.nn.avg_pool2d(
        args[0], list(a["kernel"]), list(a["stride"]), list(a["padding"]),
        count_include_pad=bool(a.get("count_include_pad", True)),
    )  # fmt: skip


def _mean(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm.relax import op

    return op.mean(args[0], list(node.attrs["axes"]), bool(node.attrs["keepdim"]))


def _concat(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm.relax import op

    return op.concat(list(args), axis=node.attrs["axis"])


def _pad(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm.relax import op

    flat = [n for pair in node.attrs["pads"] for n in pair]
    return op.nn.pad(args[0], flat, pad_value=0.0)


def _rearrange(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    from tvm.relax import op

    value = args[0]
    for step in node.attrs["steps"]:
        if step[0] == "reshape":
            value = op.reshape(value, tuple(step[1]))
        elif step[0] == "permute":
            value = op.permute_dims(value, list(step[1]))
        elif step[0] == "expand":
            value = op.broadcast_to(value, tuple(step[1]))
        else:
            _, axis, start, stop, stride = step
            value = op.strided_slice(value, [axis], [start], [stop], [stride])
    return value


def _constant(node: Node, args: list[Expr], params: Params, shape: Shape) -> Expr:
    return params["value"]


BODIES: dict[str, Callable[..., Expr]] = {
    "conv2d": _conv2d, "linear": _linear, "matmul": _matmul,
    "add": _binary("add"), "mul": _binary("multiply"),
    "relu": _unary("nn.relu"), "silu": _unary("nn.silu"), "sigmoid": _unary("sigmoid"),
    "tanh": _unary("tanh"), "clamp": _clamp, "gelu": _gelu, "hardswish": _hardswish,
    "hardsigmoid": _hardsigmoid, "softmax": _softmax, "layer_norm": _layer_norm,
    "batch_affine": _batch_affine, "max_pool2d": _max_pool2d, "avg_pool2d": _avg_pool2d,
    "mean": _mean, "concat": _concat, "pad": _pad, "rearrange": _rearrange,
    "constant": _constant,
}  # fmt: skip
