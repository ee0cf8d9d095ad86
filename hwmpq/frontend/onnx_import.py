"""A `file.onnx` as a torch module of plain operators, which is then traced like any other.

Constants are computed at once, shapes are fixed. A layer is called after its weight (`conv1.weight`
belongs to layer `conv1`), else after its node (`/layer1/layer1.0/conv1/Conv`: `layer1.0.conv1`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.traceback import annotate

from hwmpq.errors import InputError, UnsafeFile, UnsupportedModel
from hwmpq.frontend.builder import Refusal
from hwmpq.frontend.onnx_ops import OPS
from hwmpq.frontend.onnx_patterns import Node, fuse

#: Reshape, Squeeze, Softmax and others had another form before.
OLDEST_OPSET = 13
#: The name of the i-th ONNX node that our export makes of one of the graph's.
_PART = re.compile(r"\.\d+\.[A-Z]\w*$")
_LAYERS = ("Conv", "Gemm", "MatMul")


def load_onnx(
    path: Path, shape: Sequence[int] | None = None
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model as a module in eval mode, and one zero tensor per input.

    shape: of the first input, where the file leaves sizes open.
    Raises: InputError without the package onnx, for a missing or broken file, open sizes and types
    other than float32; UnsafeFile for weights outside the model's folder; UnsupportedModel naming
    every node that cannot be taken.
    """
    model = _read(path)
    nodes, constants = _nodes(model), _initializers(model)
    shapes = _input_shapes(model, set(constants), shape)
    example = tuple(torch.zeros(size) for size in shapes.values())
    outputs = [item.name for item in model.graph.output]
    builder = _Builder(constants, dict(zip(shapes, example, strict=True)), outputs)
    return builder.build(fuse(nodes, constants, outputs)), example


def _read(path: Path) -> Any:
    """The file with its weights. Raises as `load_onnx`."""
    try:
        import onnx
    except ImportError:
        raise InputError(
            "ONNX models need the package onnx", next="Run: pip install 'hwmpq[onnx]'"
        ) from None
    if not path.is_file():
        raise InputError("no such model file", path, "an ONNX file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's, which has no types
        raise _broken(path, error) from error
    _check_external(model, path)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(model)
    except (ValueError, OSError, onnx.checker.ValidationError) as error:
        raise _broken(path, error) from error
    version = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if version < OLDEST_OPSET:
        raise InputError(
            f"opset of {path}", version, f"{OLDEST_OPSET} or later",
            "Export it again, or use onnx.version_converter.",
        )  # fmt: skip
    return model


def _broken(path: Path, error: Exception) -> InputError:
    text = str(error).strip().splitlines() or [type(error).__name__]
    return InputError("broken ONNX file", f"{path} ({text[0]})", "an ONNX file")


def _check_external(model: Any, path: Path) -> None:
    """Raises UnsafeFile for weights in files that are not below the model's own folder."""
    from onnx import TensorProto
    from onnx.external_data_helper import _get_all_tensors

    folder = path.parent.resolve()
    for tensor in _get_all_tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location = {item.key: item.value for item in tensor.external_data}.get("location", "")
        if not (folder / location).resolve().is_relative_to(folder):
            raise UnsafeFile(
                f"{path}: weights of {tensor.name} outside the folder", location, "files beside it"
            )


def _nodes(model: Any) -> list[Node]:
    """Every node, named: by itself, else after its first output."""
    from onnx import helper, numpy_helper

    def value(attribute: Any) -> Any:
        found = helper.get_attribute_value(attribute)
        is_tensor = attribute.HasField("t")
        return _tensor(numpy_helper.to_array(found)) if is_tensor else found

    nodes = []
    for item in model.graph.node:
        attrs = {a.name: value(a) for a in item.attribute}
        if item.op_type == "Constant" and "value" not in attrs:
            kind = torch.int64 if "value_int" in str(list(attrs)) else torch.float32
            attrs["value"] = torch.tensor(next(iter(attrs.values())), dtype=kind)
        attrs["outputs"] = len(item.output)
        op = item.op_type if item.domain in ("", "ai.onnx") else f"{item.domain}.{item.op_type}"
        nodes.append(
            Node(item.name or item.output[0], op, tuple(item.input), tuple(item.output), attrs)
        )
    return nodes


def _initializers(model: Any) -> dict[str, Tensor]:
    from onnx import numpy_helper

    if model.graph.sparse_initializer:
        raise InputError("sparse weights", len(model.graph.sparse_initializer), "dense ones")
    return {item.name: _tensor(numpy_helper.to_array(item)) for item in model.graph.initializer}


def _tensor(array: Any) -> Tensor:
    try:
        return torch.from_numpy(np.array(array))
    except TypeError:
        raise InputError("type of a constant", array.dtype, "float32, integers") from None


def _input_shapes(
    model: Any, constants: set[str], given: Sequence[int] | None
) -> dict[str, tuple[int, ...]]:
    """Name -> sizes of every input. given: those of the first one; a size that has a name there has
    it everywhere."""
    from onnx import TensorProto

    bound: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for item in (i for i in model.graph.input if i.name not in constants):
        kind = item.type.tensor_type
        if kind.elem_type != TensorProto.FLOAT:
            name = TensorProto.DataType.Name(kind.elem_type)
            raise InputError(f"type of input {item.name}", name.lower(), "float32")
        sizes: list[Any] = [d.dim_value or d.dim_param or "?" for d in kind.shape.dim]
        if given is not None and not shapes:
            agree = [s == g for s, g in zip(sizes, given, strict=False) if isinstance(s, int)]
            if len(given) != len(sizes) or not all(agree):
                raise InputError("input shape", tuple(given), f"({', '.join(map(str, sizes))})")
            bound = {s: g for s, g in zip(sizes, given, strict=True) if isinstance(s, str)}
            sizes = list(given)
        sizes = [bound.get(s, s) if s != "?" else s for s in sizes]
        if not sizes or any(isinstance(size, str) for size in sizes):
            raise InputError(
                f"open sizes of input {item.name}", f"({', '.join(map(str, sizes))})",
                "fixed sizes", "Give --input-shape, such as 1,3,224,224.",
            )  # fmt: skip
        shapes[item.name] = tuple(sizes)
    return shapes


class Scope(nn.Module):
    """A place in the tree of names: what is run in it is traced as a call of that module."""

    def forward(self, function: Callable[..., Any], *inputs: Any) -> Any:
        return function(*inputs)


@dataclass(frozen=True, eq=False)
class Step:
    """One node to run. inputs: a tensor's name; scope and name where a constant is registered; or a
    plain value, in a list of one. done: tensors that nothing reads later."""

    node: Node
    scope: Scope
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    done: tuple[str, ...] = ()


class OnnxModule(Scope):
    """Runs the steps in order. inputs, outputs: names of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[Step] = []
        self.inputs: tuple[str, ...] = ()
        self.outputs: tuple[str, ...] = ()

    def forward(self, *inputs: Tensor) -> Any:  # type: ignore[override]
        values: dict[str, Tensor] = dict(zip(self.inputs, inputs, strict=True))
        for step in self.order:
            values.update(run(step, values))
            for name in step.done:
                values.pop(name, None)
        found = tuple(values[name] for name in self.outputs)
        return found if len(found) > 1 else found[0]


def run(step: Step, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The node's outputs by name."""
    args = []
    for item in step.inputs:
        if isinstance(item, str):
            args.append(values[item])
        elif isinstance(item, tuple):
            scope, name = item
            args.append(getattr(scope, name))
        else:
            args.extend(item)
    with annotate({"onnx": step.node.name}):
        if isinstance(step.scope, OnnxModule):
            found = step.function(*args)
        else:
            found = step.scope(step.function, *args)
    results = found if isinstance(found, tuple) else (found,)
    return dict(zip(step.node.outputs, results, strict=False))


@dataclass(eq=False)
class _Builder:
    """Fills a module. known: constants by name; values: every tensor for the example inputs."""

    known: dict[str, Tensor]
    values: dict[str, Tensor]
    outputs: Sequence[str]
    module: OnnxModule = field(default_factory=OnnxModule)
    refused: list[str] = field(default_factory=list)
    places: dict[tuple[str, bool], tuple[Scope, str]] = field(default_factory=dict)

    def build(self, nodes: Sequence[Node]) -> OnnxModule:
        """Raises UnsupportedModel naming every node that cannot be taken."""
        self.module.inputs, self.module.outputs = tuple(self.values), tuple(self.outputs)
        for node in nodes:
            try:
                self._take(node)
            except (Refusal, RuntimeError, IndexError, TypeError, KeyError) as error:
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                self.refused.append(f"{node.op} (node {node.name}): {text}")
        self.refused += [
            f"output {name}: it does not depend on an input"
            for name in self.outputs if name in self.known
        ]  # fmt: skip
        if self.refused:
            raise UnsupportedModel(
                f"{len(self.refused)} nodes of the ONNX model cannot be taken",
                "\n  " + "\n  ".join(self.refused),
                next="Replace them, or cut the model before them.",
            )
        self._free()
        return self.module.eval()

    def _take(self, node: Node) -> None:
        """Compute a constant, or append a step. What stands behind a refused node is not judged,
        but for operators that are unknown."""
        if node.op == "Shape":
            self._shape(node)
            return
        op = OPS.get(node.op)
        if op is None:
            raise Refusal("unsupported operator")
        if any(n and n not in self.known and n not in self.values for n in node.inputs):
            return
        args: list[Any] = []
        for i, name in enumerate(node.inputs):
            if i in op.static and name and name not in self.known:
                raise Refusal(f"input {i} is computed: only constants are supported")
            args.append([self.known[name].tolist()] if i in op.static and name else name or [None])
        if not any(isinstance(item, str) and item not in self.known for item in args):
            self._fold(node, args)
            return
        if op.constant_only:
            raise Refusal(
                "of a computed tensor; a layer norm in parts is taken from opset 17 on, in one node"
            )
        step = self._step(node, args)
        with torch.no_grad():
            self.values |= run(step, self.values)
        self.module.order.append(step)

    def _shape(self, node: Node) -> None:
        name = node.inputs[0]
        value = self.known.get(name, self.values.get(name))
        if value is not None:
            ends = node.attrs.get("start", 0), node.attrs.get("end")
            self.known[node.outputs[0]] = torch.tensor(value.shape[slice(*ends)])

    def _fold(self, node: Node, args: Sequence[Any]) -> None:
        plain = [part for a in args for part in ([self.known[a]] if isinstance(a, str) else a)]
        if node.op == "Gather" and isinstance(plain[1], list):  # any order, for a constant
            found = plain[0].index_select(node.attrs.get("axis", 0), torch.tensor(plain[1]))
        else:
            found = OPS[node.op].function(node.attrs, *plain)
        results = found if isinstance(found, tuple) else (found,)
        self.known |= dict(zip(node.outputs, results, strict=False))

    def _step(self, node: Node, args: Sequence[Any]) -> Step:
        """Constants that it reads are registered in the module; a layer has its own scope."""
        weight = node.inputs[1] if len(node.inputs) > 1 else ""
        layer = node.op in _LAYERS and weight in self.known
        attrs, turned = node.attrs, False
        function = OPS[node.op].function
        if layer and node.op != "Conv" and self.known[weight].ndim == 2:
            turned = not attrs.get("transB", 0)
            attrs, function = {**attrs, "transB": 1}, OPS["Gemm"].function
        path = _layer_path(node, weight) if layer else _scope_path(node.name)
        scope = self._scope(path)
        inputs = []
        for i, item in enumerate(args):
            if not isinstance(item, str) or item not in self.known:
                inputs.append(item)
                continue
            role = {1: "weight", 2: "bias"}.get(i) if layer else None
            place = self._register(item, scope if role else None, role, turned and i == 1)
            scope = place[0] if role == "weight" else scope
            inputs.append(place)
        return Step(node, scope, _bound(function, attrs), tuple(inputs))

    def _register(
        self, constant: str, scope: Scope | None, role: str | None, turned: bool
    ) -> tuple[Scope, str]:
        """Where a constant stands in the module; each but once. role: its wished name in `scope`,
        else its own name says where. turned: its transpose."""
        if (constant, turned) in self.places:
            return self.places[constant, turned]
        if scope is None or role is None:
            path, _, role = constant.replace("/", ".").strip(".").rpartition(".")
            scope = self._scope(path)
        name = role
        while not name or hasattr(scope, name):
            name += "_"
        value = self.known[constant]
        scope.register_buffer(name, value.T.contiguous() if turned else value)
        self.places[constant, turned] = (scope, name)
        return scope, name

    def _scope(self, path: str) -> Scope:
        """The scope at a path; made where it is missing."""
        scope: Scope = self.module
        for part in path.split(".") if path else ():
            name = part
            while not isinstance(getattr(scope, name, None), Scope):
                if name and not hasattr(scope, name):
                    scope.add_module(name, Scope())
                else:
                    name += "_"
            scope = getattr(scope, name)
        return scope

    def _free(self) -> None:
        """Note in each step what nothing reads later."""
        later = set(self.outputs)
        order = self.module.order
        for i, step in reversed(list(enumerate(order))):
            read = {name for name in step.inputs if isinstance(name, str)}
            done = tuple((read | set(step.node.outputs)) - later)
            order[i] = Step(step.node, step.scope, step.function, step.inputs, done)
            later |= read


def _bound(function: Callable[..., Any], attrs: Mapping[str, Any]) -> Callable[..., Any]:
    return lambda *inputs: function(attrs, *inputs)


def _layer_path(node: Node, weight: str) -> str:
    """The layer's name."""
    held = weight.removesuffix(".T")
    if held.endswith((".weight", "_weight")):
        return held.removesuffix("weight").replace("/", ".").strip("._")
    return _scope_path(node.name) or node.name.replace("/", ".").strip(".")


def _scope_path(name: str) -> str:
    """'/layer1/layer1.0/conv1/Conv' -> 'layer1.0.conv1'; 'attn.qk' and 'attn.qk.0.MatMul', as our
    own export writes them, -> 'attn'."""
    if "/" not in name:
        return _PART.sub("", name).rpartition(".")[0]
    path: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        if path and part.startswith(f"{path[-1]}."):
            path.pop()
        path.append(part)
    return ".".join(part for item in path for part in item.split(".") if part)
