"""A lowered network for a GPU: one text of all its kernels, machine code, a list of launches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from hwmpq.errors import InputError
from hwmpq.kernels.cuda import compiler, source
from hwmpq.kernels.cuda.compiler import Compiled
from hwmpq.launches import Launch, Launches
from hwmpq.lower.codegen import plan_memory, storage_bytes
from hwmpq.targets import Target


@dataclass(frozen=True, eq=False)
class CudaNetwork:
    """text: CUDA C of the kernels; compiled: their machine code; launches: how they are run."""

    text: str
    compiled: Compiled
    launches: Launches


def compile_network(module: Any, target: Target, inputs: int) -> tuple[CudaNetwork, int]:
    """What `lift_parameters` gave, for the target's GPU, and the bytes of activations.

    inputs: how many of main's arguments are the network's, the others are parameters. Raises
    InputError for an operator without a kernel, and without NVRTC.
    """
    functions = {v.name_hint: module[v] for v in module.get_global_vars() if v.name_hint != "main"}
    text = source.build(functions, target)
    walk = _Walk(functions, {kernel.name: kernel for kernel in source.kernels_of(text)})
    main = plan_memory()(module)["main"]
    outputs = walk.run(main)
    numbers = [walk.places[variable] for variable in main.params]
    launches = Launches(
        str(target.tvm["arch"]), tuple(walk.buffers), tuple(numbers[:inputs]),
        tuple(numbers[inputs:]), outputs, tuple(walk.launches),
    )  # fmt: skip
    return CudaNetwork(text, compiler.compiled(text, target), launches), storage_bytes(main)


class _Walk:
    """places: variable -> number of the buffer that holds it."""

    def __init__(self, functions: Mapping[str, Any], kernels: Mapping[str, source.Kernel]):
        self.functions, self.kernels = functions, kernels
        self.places: dict[Any, int] = {}
        self.buffers: list[int] = []
        self.launches: list[Launch] = []

    def run(self, main: Any) -> tuple[int, ...]:
        """Numbers of the outputs' buffers."""
        from tvm import relax

        for variable in main.params:
            self.places[variable] = self._buffer(_nbytes(variable.ty))
        result = main.body.body
        for block in main.body.blocks:
            for binding in block.bindings:
                if isinstance(binding.value, relax.Tuple) and binding.var.same_as(result):
                    result = binding.value
                else:
                    self._binding(binding)
        several = isinstance(result, relax.Tuple)
        return tuple(self.places[v] for v in (result.fields if several else [result]))

    def _binding(self, binding: Any) -> None:
        from tvm import relax

        value = binding.value
        if isinstance(value, relax.Var):
            self.places[binding.var] = self.places[value]
            return
        operator = getattr(getattr(value, "op", None), "name", "")
        if operator == "relax.memory.alloc_storage":
            self.places[binding.var] = self._buffer(int(value.args[0].values[0]))
        elif operator == "relax.builtin.alloc_tensor":
            self.places[binding.var] = self._buffer(_nbytes(binding.var.ty))
        elif operator in ("relax.memory.alloc_tensor", "relax.reshape"):
            self.places[binding.var] = self.places[value.args[0]]
        elif isinstance(value, relax.Call) and isinstance(value.op, relax.GlobalVar):
            self._launch(value)
        else:
            raise InputError(
                f"no kernel for a GPU for {binding.var.name_hint!r}", operator or value, None,
                "Compile the network for a CPU, or rewrite this operator by others.",
            )  # fmt: skip

    def _launch(self, call: Any) -> None:
        name = call.op.name_hint
        numbers = [self.places[argument] for argument in call.args]
        kernel = self.kernels[f"{name}_kernel"]
        self.launches.append(source.launch(self.functions[name], kernel, numbers))

    def _buffer(self, nbytes: int) -> int:
        self.buffers.append(nbytes)
        return len(self.buffers) - 1


def _nbytes(ty: Any) -> int:
    size = prod(int(extent) for extent in ty.shape.values)
    return size * np.dtype(str(ty.dtype)).itemsize
