"""Pass 1: write the chosen formats and the storage plan into the annotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hwmpq.errors import InputError
from hwmpq.formats import format_named
from hwmpq.lower.annotations import read
from hwmpq.lower.moved import keep_errors
from hwmpq.storage import plan


def assign_formats(
    assignment: Mapping[str, str],
    kernels: Mapping[str, str] | None = None,
    schedules: Mapping[str, str] | None = None,
) -> Any:
    """TVM module pass.

    assignment: layer -> format; kernels: layer -> kernel name, and schedules: layer -> text of its
    schedule, where not the default one. Pre: every layer of the module is assigned. Post: each
    layer function carries `hwmpq.format` (and `hwmpq.kernel`, `hwmpq.schedule`), each annotated
    function `hwmpq.stored`, the encoding of its result.
    Raises InputError when assignment and layers differ, or for an unknown format.
    """
    import tvm

    keep_errors()

    @tvm.transform.module_pass(opt_level=0, name="hwmpq.AssignFormats")  # type: ignore[untyped-decorator,unused-ignore]
    def run(module: Any, _context: Any) -> Any:
        return assigned(module, assignment, kernels, schedules)

    return run


def assigned(
    module: Any,
    assignment: Mapping[str, str],
    kernels: Mapping[str, str] | None = None,
    schedules: Mapping[str, str] | None = None,
) -> Any:
    """What the pass does."""
    import tvm

    found = read(module)
    names = [n.name for n in found.graph.layers]
    wrong = sorted(set(names) ^ set(assignment))
    if wrong:
        raise InputError("assignment and layers differ", ", ".join(wrong), names)
    for what, chosen in (("kernels", kernels or {}), ("schedules", schedules or {})):
        unknown = sorted(set(chosen) - set(names))
        if unknown:
            raise InputError(f"{what} chosen for unknown layers", ", ".join(unknown), names)
    formats = {name: format_named(fmt) for name, fmt in assignment.items()}
    storage = plan(found.graph, {n: (f.activation.name, f.weight.name) for n, f in formats.items()})
    updates = {}
    for node in found.graph.nodes:
        if node.op == "opaque":
            continue
        variable = found.bindings[node.name].value.op
        function = module[variable].with_attr("hwmpq.stored", storage.stored[node.name])
        if node.is_layer:
            function = function.with_attr("hwmpq.format", assignment[node.name])
            if kernels and node.name in kernels:
                function = function.with_attr("hwmpq.kernel", kernels[node.name])
            if schedules and node.name in schedules:
                function = function.with_attr("hwmpq.schedule", schedules[node.name])
        updates[variable] = function
    result = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    for variable, function in updates.items():
        result[variable] = function
    return result
