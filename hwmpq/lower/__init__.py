"""From an annotated Relax module, an assignment and quantizers to a compiled library.

The passes, in order; each may be put into a `tvm.ir.transform.Sequential`, states its pre- and
postcondition in its docstring, and leaves unannotated calls untouched:
  annotate         (in `frontend.relax_import`) anybody's module -> annotated calls, layers fused
  assign_formats   formats and the storage plan written into the annotations
  select_kernels   (optional) the kernel of every layer written there too, to be seen or changed
  lower_annotated  annotated calls -> emitted kernels on flat tensors, packed constants
  lift_parameters  constants -> arguments of main (a function, since it also returns the arrays)
then TVM's own lowering of what is left, memory planning and code generation (`compile_module`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from hwmpq.graph import Graph
from hwmpq.lower.annotations import read
from hwmpq.lower.assign import assign_formats, assigned
from hwmpq.lower.codegen import compile_module
from hwmpq.lower.cuda import CudaNetwork, compile_network
from hwmpq.lower.parameters import lift_parameters
from hwmpq.lower.rewrite import chosen_kernel, lower_annotated, lowered
from hwmpq.lower.select import select_kernels
from hwmpq.lower.steps import Schedule, Step, steps
from hwmpq.quantizers import Quantizers
from hwmpq.targets import Target

__all__ = [
    "Built", "CudaNetwork", "Schedule", "Step", "assign_formats", "build", "chosen_kernel",
    "compile_module", "graph_of", "lift_parameters", "lower_annotated", "select_kernels", "steps",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Built:
    """executable: TVM's, ready to export, for a GPU a `CudaNetwork`; parameters: in the order main
    takes them after the inputs; lowered: the module before code generation, to look at; calls: the
    tensor that each kernel call writes, in order; peak_memory: bytes of activations in the plan."""

    executable: Any
    parameters: dict[str, NDArray[Any]]
    lowered: Any
    calls: tuple[str, ...]
    peak_memory: int


def graph_of(module: Any) -> Graph:
    """The canonical graph of an annotated module: what to calibrate, and the layers to assign.

    Raises InputError when `main` is missing or its shapes are not constant.
    """
    return read(module).graph


def build(
    module: Any,
    assignment: Mapping[str, str],
    quantizers: Quantizers,
    target: Target,
    threads: int = 1,
    kernels: Mapping[str, str] | None = None,
    schedules: Mapping[str, str] | None = None,
    system_lib: bool = False,
) -> Built:
    """Compile an annotated Relax module.

    kernels: layer -> kernel name, schedules: layer -> text of its schedule, where not the default.
    system_lib: see `compile_module`.
    Raises InputError when a layer has no kernel for its format on the target.
    """
    # The passes' own functions: errors that went through TVM lose all but their text.
    module = lowered(assigned(module, assignment, kernels, schedules), quantizers, target, threads)
    module, parameters = lift_parameters(module)
    calls = tuple(json.loads(str(module.attrs["hwmpq.calls"])))
    if target.gpu:
        inputs = len(module["main"].params) - len(parameters)
        network, peak = compile_network(module, target, inputs)
        return Built(network, parameters, module, calls, peak)
    executable, peak = compile_module(module, target, threads, system_lib)
    return Built(executable, parameters, module, calls, peak)
