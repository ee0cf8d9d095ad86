"""Reading the annotations of a Relax module: the canonical graph that it stands for.

Contract (made by `frontend.relax_module`, or by hand): `main` is one dataflow block; a call of a
private function with the attribute `hwmpq.name` is a node of the graph; its arguments are the
node's inputs and then the constants of `hwmpq.params`. Any other binding is an *opaque* node: it
reads and writes fp32 in the shapes it has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hwmpq.errors import InputError
from hwmpq.graph import Graph, Node
from hwmpq.lower.moved import constant_array


@dataclass(frozen=True, eq=False)
class Annotated:
    """The graph of a module, and what is needed to rewrite it.

    bindings: node name -> the Relax binding; variables: Relax variable -> tensor name.
    """

    graph: Graph
    bindings: dict[str, Any]
    variables: dict[Any, str]
    attributes: dict[str, dict[str, str]]


def read(module: Any) -> Annotated:
    """Raises InputError when `main` is missing or its shapes are not constant."""
    from tvm import relax

    names = [gv.name_hint for gv in module.get_global_vars()]
    if "main" not in names:
        raise InputError("Relax module without a function 'main'", ", ".join(names))
    main = module["main"]
    tensors: dict[str, tuple[int, ...]] = {}
    variables: dict[Any, str] = {}
    inputs = []
    given = json.loads(str(module.attrs["hwmpq.inputs"])) if _has(module, "hwmpq.inputs") else None
    for i, var in enumerate(main.params):
        name = given[i] if given else var.name
        variables[var] = name
        tensors[name] = _shape(var)
        inputs.append(name)
    nodes: list[Node] = []
    bindings: dict[str, Any] = {}
    attributes: dict[str, dict[str, str]] = {}
    constants: dict[str, Any] = {}
    outputs: list[str] = []
    for block in main.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Var | relax.Tuple) and not _opaque_tuple(value, variables):
                items = [value] if isinstance(value, relax.Var) else list(value.fields)
                found = [variables[v] for v in items]
                outputs = found
                if isinstance(value, relax.Var):
                    variables[binding.var] = found[0]
                continue
            node, attrs = _node(module, binding, variables, constants)
            nodes.append(node)
            bindings[node.name] = binding
            attributes[node.name] = attrs
            variables[binding.var] = node.name
            tensors[node.name] = _shape(binding.var)
    result = main.body.body
    if isinstance(result, relax.Tuple):
        outputs = [variables[v] for v in result.fields]
    elif result in variables:
        outputs = [variables[result]]
    graph = Graph(tuple(inputs), tuple(outputs), tuple(nodes), tensors, constants)
    return Annotated(graph, bindings, variables, attributes)


def _has(module: Any, key: str) -> bool:
    return module.attrs is not None and key in module.attrs


def _opaque_tuple(value: Any, variables: dict[Any, str]) -> bool:
    from tvm import relax

    return isinstance(value, relax.Tuple) and any(v not in variables for v in value.fields)


def _shape(var: Any) -> tuple[int, ...]:
    try:
        return tuple(int(extent) for extent in var.ty.shape.values)
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"tensor {var.name!r} of the Relax module", var.ty, "a tensor of constant shape"
        ) from error


def _node(
    module: Any, binding: Any, variables: dict[Any, str], constants: dict[str, Any]
) -> tuple[Node, dict[str, str]]:
    from tvm import relax

    value = binding.value
    function = None
    if isinstance(value, relax.Call) and isinstance(value.op, relax.GlobalVar):
        function = module[value.op]
    if function is None or function.attrs is None or "hwmpq.name" not in function.attrs:
        unknown = [v for v in variables_of(value) if v not in variables]
        if unknown:
            raise InputError(
                f"variable {unknown[0].name!r} that {binding.var.name!r} of the Relax module reads",
                unknown[0].ty,
                "a tensor; a tuple is written where it is read",
            )
        reads = tuple(variables[v] for v in variables_of(value))
        return Node(binding.var.name, "opaque", reads), {}
    attrs = {k: str(v) for k, v in function.attrs.items() if str(k).startswith("hwmpq.")}
    params = json.loads(attrs["hwmpq.params"])
    count = len(value.args) - len(params)
    for arg, constant in zip(value.args[count:], params.values(), strict=True):
        constants[constant] = constant_array(arg)
    node = Node(
        attrs["hwmpq.name"],
        attrs["hwmpq.op"],
        tuple(variables[a] for a in value.args[:count]),
        json.loads(attrs["hwmpq.attrs"]),
        params,
        attrs.get("hwmpq.source", ""),
    )
    return node, attrs


def variables_of(value: Any) -> list[Any]:
    """Variables read by an expression in A-normal form."""
    from tvm import relax

    if isinstance(value, relax.Var):
        return [value]
    if isinstance(value, relax.Tuple):
        return [v for field in value.fields for v in variables_of(field)]
    if isinstance(value, relax.TupleGetItem):
        return variables_of(value.tuple_value)
    if isinstance(value, relax.Call):
        return [v for arg in value.args for v in variables_of(arg)]
    return []


def on(call: Any, values: Mapping[Any, Any]) -> Any:
    """The same Relax call, on other values for its variables."""
    from tvm import relax

    def replaced(expr: Any) -> Any:
        if isinstance(expr, relax.Var):
            return values.get(expr, expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([replaced(field) for field in expr.fields])
        return expr

    return relax.Call(call.op, [replaced(a) for a in call.args], call.attrs, call.ty_args)
