"""Pass 2: the kernel of every layer, written into the annotations."""

from __future__ import annotations

from typing import Any

from hwmpq.formats import format_named
from hwmpq.kernels import Call
from hwmpq.lower.annotations import read
from hwmpq.lower.moved import keep_errors
from hwmpq.lower.rewrite import chosen_kernel
from hwmpq.lower.steps import steps
from hwmpq.targets import Target


def select_kernels(target: Target, threads: int = 1) -> Any:
    """TVM module pass, for who wants to see or change the choice; `lower_annotated` makes the same.

    Pre: `assign_formats` ran. Post: each layer function carries `hwmpq.kernel`; one that it had
    stays. Raises InputError naming the layer and the reasons when no kernel runs its format.
    """
    import tvm

    keep_errors()

    @tvm.transform.module_pass(opt_level=0, name="hwmpq.SelectKernels")  # type: ignore[untyped-decorator,unused-ignore]
    def run(module: Any, _context: Any) -> Any:
        return selected(module, target, threads)

    return run


def selected(module: Any, target: Target, threads: int = 1) -> Any:
    """What the pass does."""
    import tvm

    found = read(module)
    graph, attributes = found.graph, found.attributes
    formats = {n.name: format_named(attributes[n.name]["hwmpq.format"]) for n in graph.layers}
    result = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    for step in steps(graph, formats, target, threads).steps:
        if isinstance(step.call, Call):
            name = step.node.name
            named = attributes[name].get("hwmpq.kernel")
            kernel = chosen_kernel(step.node, step.call, target, named)
            variable = found.bindings[name].value.op
            result[variable] = module[variable].with_attr("hwmpq.kernel", kernel.name)
    return result
