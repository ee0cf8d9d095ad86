"""Pass 0: anybody's Relax module, of TVM's torch, ONNX or TFLite front end or hand-written, becomes
the annotated module that `hwmpq.lower` works on: `annotate`.

Operators that the canonical graph knows are taken into it, brought into its one form (`canonical`:
BatchNorm and bias folded, residual and activation fused into their layer) and written as annotated
calls. Every other binding stays the call that it was, on the tensors that it read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.frontend.canonical import canonicalize
from hwmpq.frontend.draft import Draft
from hwmpq.frontend.relax_module import relax_module
from hwmpq.frontend.relax_ops import FOLDED, OPS
from hwmpq.frontend.relax_reader import Pieces, Reader, Value, contents
from hwmpq.graph import Node
from hwmpq.lower.annotations import on, variables_of
from hwmpq.lower.moved import constant_array, is_constant, keep_errors


def annotate(weights: Mapping[str, NDArray[Any]] | None = None) -> Any:
    """TVM module pass.

    weights: name -> array, such as a state dict or the initializers of an ONNX file; a layer is
    called after the one that it holds ('conv1.weight', or its transpose: layer 'conv1'), else after
    its operator. Pre: `main` is dataflow of constant shapes; weights are constants (bind them with
    `relax.transform.BindParams`). Post: `lower.annotations.read` gives the canonical graph; inputs
    and outputs are as before.
    Raises InputError when `main` is missing, and naming a tensor without a constant shape.
    """
    import tvm

    keep_errors()

    @tvm.transform.module_pass(opt_level=0, name="hwmpq.Annotate")  # type: ignore[untyped-decorator,unused-ignore]
    def run(module: Any, _context: Any) -> Any:
        return annotated(module, weights or {})

    return run


def annotated(module: Any, weights: Mapping[str, NDArray[Any]]) -> Any:
    """What the pass does."""
    names = [variable.name_hint for variable in module.get_global_vars()]
    if "main" not in names:
        raise InputError("Relax module without a function 'main'", ", ".join(names))
    found = _Importer(module, weights).run()
    canonicalize(found.draft)
    main = module["main"]
    graph = found.draft.finish()
    result = relax_module(graph, found.emit, _is_tuple(main.ret_ty))
    taken = {variable.name_hint for variable in result.get_global_vars()}
    for variable, function in module.functions.items():
        if variable.name_hint != "main":
            if variable.name_hint in taken:
                raise InputError("name of a function is taken", variable.name_hint, "another name")
            result[variable] = function
    return result


#: Rank of a weight -> the orders of axes, beside its own, in which a module may hold it: a matrix
#: transposed, of TFLite files the convolutions OHWI and 1HWO.
_TURNED: dict[int, list[tuple[int, ...]]] = {2: [(1, 0)], 4: [(0, 3, 1, 2), (3, 0, 1, 2)]}


def _by_content(weights: Mapping[str, NDArray[Any]]) -> dict[tuple[Any, ...], str]:
    """Contents, as they are and turned -> name."""
    found = {
        contents(value.transpose(axes)): name
        for name, value in weights.items()
        for axes in _TURNED.get(value.ndim, ())
    }
    return found | {contents(value): name for name, value in weights.items()}


def _is_tuple(kind: Any) -> bool:
    from tvm import relax

    return isinstance(kind, relax.TupleType)


class _Importer:
    """Walks main's bindings. values: Relax variable -> what it stands for; opaque: node -> the
    binding that it is."""

    def __init__(self, module: Any, weights: Mapping[str, NDArray[Any]]):
        self.module = module
        self.draft = Draft(reserved=())
        self.reader = Reader(self.draft, module, _by_content(weights))
        self.values: dict[Any, Value] = {}
        self.opaque: dict[str, Any] = {}

    def run(self) -> _Importer:
        main = self.module["main"]
        for variable in main.params:
            self.values[variable] = self.draft.add_input(variable.name, _shape(variable))
        for block in main.body.blocks:
            for binding in block.bindings:
                self.values[binding.var] = self._value(binding)
        result = self._operand(main.body.body)
        outputs = list(result) if isinstance(result, Pieces) else [result]
        if not all(isinstance(name, str) for name in outputs):
            raise InputError("output of the Relax module", "a constant", "a computed tensor")
        self.draft.outputs = [str(name) for name in outputs]
        return self

    def _value(self, binding: Any) -> Value:
        from tvm import relax

        call = binding.value
        if not isinstance(call, relax.Call):
            return self._operand(call)
        operator = getattr(call.op, "name", "")
        known = operator in OPS or operator in FOLDED
        args = [self._operand(arg) for arg in call.args] if known else []
        if operator in FOLDED and args and all(isinstance(a, np.ndarray | tuple) for a in args):
            return FOLDED[operator](call, args)
        name = self.draft.glue_name(binding.var.name)
        taken = OPS[operator](self.reader, call, args, name) if operator in OPS else None
        return self._opaque(binding, name) if taken is None else taken

    def _opaque(self, binding: Any, name: str) -> str:
        reads = [v for v in dict.fromkeys(variables_of(binding.value)) if v in self.values]
        tensors = [self.values[v] for v in reads]
        computed = tuple(t for t in tensors if isinstance(t, str))
        if any(isinstance(t, Pieces) for t in tensors):
            raise InputError(f"operand of {name!r} in the Relax module", "a tuple", "tensors")
        self.opaque[name] = (binding.value, reads, dict(zip(reads, tensors, strict=True)))
        return self.draft.add(Node(name, "opaque", computed), _shape(binding.var))

    def emit(self, node: Node, args: Sequence[Any]) -> Any:
        """An opaque node's call on the tensors that it reads now."""
        from tvm import relax

        call, reads, stood_for = self.opaque[node.name]
        computed = iter(args)
        now = {
            variable: next(computed)
            if isinstance(stood_for[variable], str)
            else relax.const(stood_for[variable])
            for variable in reads
        }
        return on(call, now)

    def _operand(self, expr: Any) -> Value:
        from tvm import relax

        if isinstance(expr, relax.Var):
            return self.values[expr]
        if isinstance(expr, relax.Tuple):
            return Pieces(self._operand(field) for field in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            found = self._operand(expr.tuple_value)
            return found[expr.index] if isinstance(found, Pieces) else found
        if is_constant(expr):
            return constant_array(expr)
        if isinstance(expr, relax.ShapeExpr):
            return tuple(int(extent) for extent in expr.values)
        return expr


def _shape(variable: Any) -> tuple[int, ...]:
    try:
        return tuple(int(extent) for extent in variable.ty.shape.values)
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"tensor {variable.name!r} of the Relax module", variable.ty,
            "a tensor of constant shape",
        ) from error  # fmt: skip
