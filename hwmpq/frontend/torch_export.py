"""From a torch module, or a saved exported program, to the canonical graph.

`torch.export` records the aten operators undecomposed; each is taken by one small converter
(`layers`, `glue`, `views`), what depends on parameters alone is computed at once, and `canonical`
then brings the draft into its one form. All operators that cannot be taken are reported together.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx.traceback import preserve_node_meta

from hwmpq.errors import InputError, UnsupportedModel
from hwmpq.frontend import glue, layers, views
from hwmpq.frontend.builder import (
    Builder,
    Call,
    Const,
    Converter,
    Pieces,
    Refusal,
    Value,
    same_view,
)
from hwmpq.frontend.canonical import canonicalize
from hwmpq.frontend.draft import Draft
from hwmpq.graph import Graph

CONVERTERS: dict[str, Converter] = {
    **layers.CONVERTERS,
    **glue.CONVERTERS,
    **views.CONVERTERS,
}
_TORCH = str(Path(torch.__file__).parent)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def trace(model: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> Graph:
    """Trace a module in eval mode; the module's own mode is restored.

    example: one tensor per argument of forward, float32, with the batch size to compile for.
    Raises: UnsupportedModel, InputError (see `from_exported`).
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _quiet(), preserve_node_meta():  # what nodes of an ONNX model are annotated with
            exported = torch.export.export(model, example, strict=False)
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedModel(
            "torch.export cannot trace the model",
            text[0],
            next="Remove control flow that depends on tensor values, and check the input shape.",
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return from_exported(exported)


def from_exported(exported: ExportedProgram) -> Graph:
    """The canonical graph of an exported program.

    Raises: UnsupportedModel naming every operator that cannot be taken, with its source line;
    InputError for symbolic sizes, NaN or Inf in a weight, types other than float32, and a model
    without any layer that takes a number format.
    """
    exported = _functional(exported)
    _check_static(exported)
    parameters = _parameters(exported)
    _check_finite(parameters)
    paths = {name.removesuffix(".weight") for name in parameters if name.endswith(".weight")}
    draft = _Reader(exported, Draft(paths), parameters).read()
    canonicalize(draft)
    graph = draft.finish()
    if not graph.layers:
        raise InputError(
            "the model has no layer that takes a number format",
            f"{len(graph.nodes)} operators",
            "conv2d, linear, matmul",
        )
    return graph


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns of its own deprecated calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


class _Tensor(str):
    """The name of a tensor of the draft, told apart from an operator's string arguments."""


class _Reader:
    """Walks the exported nodes once; env: fx node -> Value (or a plain Python value)."""

    def __init__(
        self, exported: ExportedProgram, draft: Draft, parameters: Mapping[str, torch.Tensor]
    ):
        self.exported = exported
        self.draft = draft
        self.builder = Builder(draft, parameters)
        self.env: dict[torch.fx.Node, Any] = {}
        self.refused: list[str] = []

    def read(self) -> Draft:
        self._read_inputs()
        for node in self.exported.graph.nodes:
            if node.op == "call_function" and node.users:  # some results are not asked for
                self.env[node] = self._read_call(node)
        self._read_outputs()
        if self.refused:
            raise UnsupportedModel(
                f"{len(self.refused)} operators cannot be taken",
                "\n  " + "\n  ".join(self.refused),
                next="Replace them, or cut the model before them.",
            )
        return self.draft

    def _read_inputs(self) -> None:
        nodes = {node.name: node for node in self.exported.graph.nodes if node.op == "placeholder"}
        for spec in self.exported.graph_signature.input_specs:
            node = nodes[spec.arg.name]
            if spec.kind == InputKind.USER_INPUT:
                self.env[node] = self._user_input(node, spec.arg)
            else:
                name = str(spec.target)
                self.env[node] = Const(self.builder.parameters[name], name, stored=True)

    def _user_input(self, node: torch.fx.Node, argument: object) -> Any:
        if isinstance(argument, ConstantArgument):
            return argument.value
        value = node.meta["val"]
        if value.dtype != torch.float32:
            raise InputError(f"type of input {node.name}", value.dtype, "torch.float32")
        return _Tensor(self.draft.add_input(node.name, tuple(value.shape)))

    def _read_outputs(self) -> None:
        (output,) = (node for node in self.exported.graph.nodes if node.op == "output")
        specs = self.exported.graph_signature.output_specs
        for spec, node in zip(specs, output.args[0], strict=True):
            if spec.kind != OutputKind.USER_OUTPUT:
                self.refused.append(f"{spec.kind.name.lower()} of {spec.target}: forward writes it")
            elif not isinstance(node, torch.fx.Node):
                raise InputError("an output of the model is no tensor", repr(node), "tensors")
            else:
                call = Call(node.name, "output", {}, (), "", "")
                self.draft.outputs.append(self.builder.operand(call, self.env[node]))

    def _read_call(self, node: torch.fx.Node) -> Any:
        op = "getitem" if node.target is operator.getitem else str(node.target)
        args = self._arguments(node)
        try:
            if not _touches_tensor(args):
                return self._constant(node)
            if op not in CONVERTERS:
                raise Refusal(layers.REASONS.get(op, "unsupported operator"))
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            path = stack[-1][0].split("@")[0] if stack else ""
            call = Call(node.name, op, args, _shape(node), path, source_line(node))
            value = CONVERTERS[op](self.builder, call)
            return _Tensor(value) if isinstance(value, str) else value
        except Refusal as refusal:
            where = source_line(node) or "unknown line"
            self.refused.append(f"{op} ({node.name}) at {where}: {refusal}")
            return self._stand_in(node)

    def _arguments(self, node: torch.fx.Node) -> dict[str, Any]:
        """Arguments by schema name (by position where there is no schema), defaults filled in."""
        mapped: tuple[Any, ...] = torch.fx.map_arg(node.args, self.env.__getitem__)
        named: dict[str, Any] = torch.fx.map_arg(node.kwargs, self.env.__getitem__)
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return {str(i): value for i, value in enumerate(mapped)} | dict(named)
        defaults = {item.name: item.default_value for item in schema.arguments}
        names = [item.name for item in schema.arguments]
        return {**defaults, **dict(zip(names, mapped, strict=False)), **named}

    def _constant(self, node: torch.fx.Node) -> Any:
        """Compute a call that reads no input of the model."""
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags or not callable(node.target):
            raise Refusal("random operator")

        def plain(item: torch.fx.Node) -> Any:
            return _plain(self.env[item])

        args = torch.fx.map_arg(node.args, plain)
        with torch.no_grad():
            result = node.target(*args, **torch.fx.map_arg(node.kwargs, plain))
        if isinstance(result, torch.Tensor):
            given = (self.env[item] for item in node.all_input_nodes)
            same = (
                item for item in given if isinstance(item, Const) and same_view(item.value, result)
            )
            return next(same, Const(result, node.name))
        if isinstance(result, (tuple, list)):
            return [
                Const(item, f"{node.name}_{i}") if isinstance(item, torch.Tensor) else item
                for i, item in enumerate(result)
            ]
        return result

    def _stand_in(self, node: torch.fx.Node) -> Value:
        """A tensor of the right shape, so that operators behind a refused one are checked too."""
        value = node.meta.get("val")
        shapes = [tuple(v.shape) for v in value] if isinstance(value, (tuple, list)) else []
        name = self.draft.glue_name(node.name)
        if shapes:
            source = self.draft.add_input(name, shapes[0])
            return Pieces(source, tuple([["reshape", list(shape)]] for shape in shapes))
        return _Tensor(self.draft.add_input(name, _shape(node)))


def _plain(value: Any) -> Any:
    if isinstance(value, Const):
        return value.value
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _touches_tensor(args: Mapping[str, Any]) -> bool:
    """Whether any operand depends on an input of the model."""

    def walk(value: Any, name: str) -> bool:
        if isinstance(value, (list, tuple)):
            return any(walk(item, name) for item in value)
        return isinstance(value, (_Tensor, Pieces))

    return any(walk(value, name) for name, value in args.items())


def _shape(node: torch.fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        value = value[0]
    return tuple(getattr(value, "shape", ()))


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """Without in-place operators and nested graphs, and with the composite operators that no
    converter knows taken apart (movedim becomes permute); unchanged where there are none."""
    targets = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    known = CONVERTERS.keys() | layers.REASONS.keys()
    composite = [
        target
        for target in targets
        if isinstance(target, torch._ops.OpOverload)
        and str(target) not in known
        and target._can_decompose()
    ]
    if not composite and not any(_rewrites(target) for target in targets):
        return exported
    functional: ExportedProgram
    with _quiet():
        try:
            functional = exported.run_decompositions(_decompositions(composite))
        except RecursionError:  # `decompose` of some is a call of itself: they are named later
            functional = exported.run_decompositions({})
    return functional


def _decompositions(composite: Collection[Any]) -> dict[Any, Callable[..., Any]]:
    """How to take operators apart: as torch's own table does it where that has them, since the
    `decompose` of some (einsum) would then call itself."""
    if not composite:
        return {}
    table = torch.export.default_decompositions()
    return {op: table[op] if op in table else op.decompose for op in composite}


def _rewrites(target: object) -> bool:
    """Whether an operator writes into an operand or calls a nested graph."""
    schema = getattr(target, "_schema", None)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    return bool(schema and schema.is_mutable and "detach_" not in str(target))


def source_line(node: torch.fx.Node) -> str:
    """The node of an ONNX model, else file:line of the innermost frame outside torch, or ''."""
    if "onnx" in node.meta.get("custom", {}):
        return f"node {node.meta['custom']['onnx']}"
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f"{file}:{line}" for file, line in frames if not file.startswith((_TORCH, "<"))]
    return own[-1] if own else ""


def _check_static(exported: ExportedProgram) -> None:
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        shape = getattr(value, "shape", ())
        if any(not isinstance(size, int) for size in shape):
            raise InputError(
                f"symbolic size in {node.name}",
                f"({', '.join(map(str, shape))})",
                "fixed sizes",
                "Export without dynamic_shapes, with the batch size to compile for.",
            )


def _parameters(exported: ExportedProgram) -> dict[str, torch.Tensor]:
    """Parameters, buffers and lifted constants by name."""
    found = {**exported.state_dict, **exported.constants}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _check_finite(parameters: Mapping[str, torch.Tensor]) -> None:
    wrong = {
        name: value.dtype
        for name, value in parameters.items()
        if value.is_floating_point() and value.dtype != torch.float32
    }
    if wrong:
        text = ", ".join(f"{name} ({kind})" for name, kind in wrong.items())
        raise InputError("weights of another type", text, "torch.float32", "Call model.float().")
    bad = [
        name
        for name, value in parameters.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise InputError("NaN or Inf in weights", ", ".join(bad), "finite numbers")
