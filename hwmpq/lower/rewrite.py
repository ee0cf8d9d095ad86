"""Pass 3: annotated calls -> calls of emitted kernels on flat tensors in their stored encodings.

Pre: `assign_formats` ran. Post: no annotated function is left; `main` keeps its inputs and outputs
(fp32, torch's shapes) and calls one PrimFunc per distinct kernel; packed parameters are constants,
named in the module attribute `hwmpq.parameters` (JSON: binding -> names,
in argument order). Bindings without annotation are kept as they are, reading and writing fp32 in
their own shapes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from hwmpq.artifact.relax_vm import KERNEL_PREFIX
from hwmpq.errors import InputError
from hwmpq.formats import encoding_named, format_named
from hwmpq.graph import Node
from hwmpq.kernels import Call, Kernel, Schedule, best, glue, kernel_named, why_not
from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.glue import GlueCall
from hwmpq.lower.annotations import Annotated, on, read, variables_of
from hwmpq.lower.layout import NHWC, PLAIN
from hwmpq.lower.moved import keep_errors
from hwmpq.lower.steps import Ref, Step, steps
from hwmpq.quantizers import Quantizers
from hwmpq.resolve import resolve
from hwmpq.storage import is_integer
from hwmpq.targets import Target


def lower_annotated(quantizers: Quantizers, target: Target, threads: int = 1) -> Any:
    """TVM module pass; see the file's docstring for its pre- and postconditions.

    Raises InputError naming the layer and the reasons when no kernel of the target runs a format.
    """
    import tvm

    keep_errors()

    @tvm.transform.module_pass(opt_level=0, name="hwmpq.LowerAnnotated")  # type: ignore[untyped-decorator,unused-ignore]
    def run(module: Any, _context: Any) -> Any:
        return lowered(module, quantizers, target, threads)

    return run


def lowered(module: Any, quantizers: Quantizers, target: Target, threads: int = 1) -> Any:
    """What the pass does."""
    return _Rewriter(module, read(module), quantizers, target, threads).run()


def chosen_kernel(node: Node, call: Call, target: Target, name: str | None = None) -> Kernel:
    """The kernel of a layer: by name, or the default. Raises InputError with every reason."""
    if name:
        return kernel_named(name, call.workload, call.format, target.features)
    kernel = best(call.workload, call.format, target.features)
    if kernel is None:
        reason = why_not(call.workload, call.format, target.features)
        raise InputError(
            f"layer {node.name!r} cannot run in {call.format.name} on {target.name}", reason,
            None, "Choose another format for it; `hwmpq inspect` lists the legal ones.",
        )  # fmt: skip
    return kernel


class _Rewriter:
    """Emits the steps; values: tensor in an encoding and layout -> flat Relax variable."""

    def __init__(
        self, module: Any, found: Annotated, quantizers: Quantizers, target: Target, threads: int
    ):
        from tvm import relax

        self.module, self.found, self.target, self.threads = module, found, target, threads
        self.graph = quantizers.graph(found.graph)
        assignment = {n.name: found.attributes[n.name]["hwmpq.format"] for n in self.graph.layers}
        self.resolved = resolve(self.graph, assignment, quantizers)
        formats = {name: format_named(fmt) for name, fmt in assignment.items()}
        self.schedule = steps(self.graph, formats, target, threads)
        self.builder = relax.BlockBuilder()
        self.values: dict[Ref, Any] = {}
        self.functions: dict[str, Any] = {}
        self.parameters: dict[str, list[str]] = {}
        self.pending: list[str] = []
        self.calls: list[str] = []

    def run(self) -> Any:
        from tvm import relax

        main = self.module["main"]
        params = [relax.Var(v.name, v.ty) for v in main.params]
        with self.builder.function("main", params):
            with self.builder.dataflow():
                for name, var in zip(self.graph.inputs, params, strict=True):
                    self._arrived(name, var)
                for step in self.schedule.steps:
                    self._step(step)
                results = [self._shaped(ref) for ref in self.schedule.outputs]
                several = isinstance(main.ret_ty, relax.TupleType)
                out = self.builder.emit_output(relax.Tuple(results) if several else results[0])
            self.builder.emit_func_output(out)
        result = self.builder.get()
        for variable, function in self.module.functions.items():
            attrs = getattr(function, "attrs", None)
            annotated = attrs is not None and "hwmpq.name" in attrs
            if variable.name_hint != "main" and not annotated:
                result[variable] = function
        return result.with_attrs(
            {
                "hwmpq.parameters": json.dumps(self.parameters),
                "hwmpq.calls": json.dumps(self.calls),
            }
        )

    def _step(self, step: Step) -> None:
        if step.node.op == "opaque" and step.call is None:
            self._opaque(step)
        elif step.call is None:
            self._constant(step)
        elif isinstance(step.call, GlueCall):
            self._glue(step, step.call)
        else:
            self._layer(step, step.call)

    def _layer(self, step: Step, call: Call) -> None:
        node = step.node
        layer = self.resolved.layers[node.name]
        named = self.found.attributes[node.name].get("hwmpq.kernel")
        kernel = chosen_kernel(node, call, self.target, named)
        if schedule := self.found.attributes[node.name].get("hwmpq.schedule"):
            kernel = kernel.scheduled(Schedule.parse(schedule), call)
        args = [self.values[ref] for ref in step.reads]
        codes = scales = None
        if layer.weight is not None:
            codes = layer.weight.codes
            scales = layer.weight.scale if layer.format.group is not None else None
        packed = kernel.parameters(call, codes, layer.epilogue, scales)
        constants = [self._parameter(f"{node.name}.{r}", v) for r, v in packed.items()]
        reads = 1 if layer.weight is not None else 2
        function = self._function(f"{kernel.name}.{kernel.cell(call)}", lambda: kernel.emit(call))
        self._call(step, function, [*args[:reads], *constants, *args[reads:]])

    def _glue(self, step: Step, call: GlueCall) -> None:
        args = [self.values[ref] for ref in step.reads]
        if glue.is_view(call):
            self.values[step.writes] = args[0]
            return
        quantizers = [
            self.resolved.quantizer(r.tensor, r.encoding) for r in (*step.reads, step.writes)
        ]
        constants = {}
        if not step.is_encode:
            constants = {role: self.graph.constants[c] for role, c in step.node.params.items()}
        packed = glue.parameters(call, constants, quantizers)
        name = f"{step.writes.tensor}.{call.op}"
        params = [self._parameter(f"{name}.{i}", v) for i, v in enumerate(packed)]
        function = self._function(f"{call.op}.{glue.key(call)}", lambda: glue.emit(call))
        self._call(step, function, [*args, *params])

    def _constant(self, step: Step) -> None:
        """A constant tensor, rounded and laid out now."""
        ref = step.writes
        value = self.graph.constants[step.node.params["value"]].astype(np.float32)
        if ref.layout == NHWC:
            value = value.transpose(0, 2, 3, 1)
        quantizer = self.resolved.quantizer(ref.tensor, ref.encoding)
        encoding = encoding_named(ref.encoding)
        if is_integer(ref.encoding):
            codes = encoding.quantize(value, quantizer.scale, quantizer.zero)
        else:
            codes = encoding.quantize(value)
        flat = np.ascontiguousarray(codes).reshape(-1).astype(memory_dtype(ref.encoding))
        self.values[ref] = self._emit(self._parameter(ref.tensor, flat), ref.tensor)

    def _opaque(self, step: Step) -> None:
        """A binding we know nothing of: fp32 in and out, otherwise untouched."""
        from tvm import relax

        shaped = {ref.tensor: self._shaped(ref) for ref in step.reads}
        value = self.found.bindings[step.node.name].value
        if not isinstance(value, relax.Call):
            raise InputError(
                f"binding {step.node.name!r} of the Relax module", type(value).__name__, "a call"
            )
        read = [v for v in variables_of(value) if v in self.found.variables]
        call = on(value, {v: shaped[self.found.variables[v]] for v in read})
        self._arrived(step.node.name, self.builder.emit(call, name_hint=step.node.name))

    # -- emission --------------------------------------------------------------------------

    def _arrived(self, name: str, value: Any) -> None:
        """A tensor that comes in fp32 and torch's shape."""
        size = int(np.prod(self.graph.tensors[name]))
        self.values[Ref(name, "fp32", PLAIN)] = self._reshaped(value, (size,))

    def _shaped(self, ref: Ref) -> Any:
        return self._reshaped(self.values[ref], self.graph.tensors[ref.tensor])

    def _reshaped(self, value: Any, shape: tuple[int, ...]) -> Any:
        from tvm.relax import op

        return self.builder.emit(op.reshape(value, shape))

    def _parameter(self, name: str, value: Any) -> Any:
        from tvm import relax

        self.pending.append(name)
        return relax.const(np.ascontiguousarray(value))

    def _emit(self, value: Any, name: str) -> Any:
        """Bind a value; the constants made for it are noted as its parameters."""
        hint = "".join(c if c.isalnum() else "_" for c in name)
        variable = self.builder.emit(value, name_hint=hint)
        if self.pending:
            self.parameters[variable.name] = self.pending
            self.pending = []
        return variable

    def _function(self, name: str, emit: Any) -> Any:
        if name not in self.functions:
            identifier = KERNEL_PREFIX + "".join(c if c.isalnum() else "_" for c in name)
            function = emit().with_attr("global_symbol", identifier)
            self.functions[name] = self.builder.add_func(function, identifier)
        return self.functions[name]

    def _call(self, step: Step, function: Any, args: list[Any]) -> None:
        from tvm import relax

        ref = step.writes
        size = int(np.prod(self.graph.tensors[ref.tensor]))
        result = relax.TensorType((size,), memory_dtype(ref.encoding))
        call = relax.call_tir(function, args, out_ty=result)
        self.values[ref] = self._emit(call, ref.tensor)
        label = f"{ref.tensor}.{ref.encoding}.{ref.layout}" if step.is_encode else ref.tensor
        self.calls.append(label)
