"""A kernel of a GPU without one: compiled for the chip and inspected, then run on this CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.kernels.cuda import compiler, emulate, source
from hwmpq.targets import Target


def check_tools() -> None:
    """Raises InputError where kernels of a GPU cannot be compiled or emulated here."""
    if compiler.missing():
        raise InputError("no compiler for GPUs (NVRTC)", next=compiler.INSTALL)
    emulate.check_tools()


def how(target: Target) -> str:
    """What a check without a GPU is worth."""
    return (
        f"compiled for {target.tvm['arch']} and inspected, run emulated on this CPU: nothing was "
        "executed on a GPU, and nothing timed"
    )


@dataclass(frozen=True, eq=False)
class Run:
    """One use of a function: its last argument is written in place. cores: it shall multiply with
    tensor cores."""

    function: str
    arguments: Sequence[NDArray[Any]]
    cores: bool


def run(functions: Mapping[str, Any], target: Target, runs: Sequence[Run]) -> list[str]:
    """Compile and inspect PrimFuncs, and call them emulated. Answers of each run '' or what is
    wrong with it."""
    code = source.build(functions, target)
    made = compiler.compiled(code, target)
    kernels = {kernel.name: kernel for kernel in source.kernels_of(code)}
    emulated = emulate.briefly(code)

    def one(asked: Run) -> str:
        kernel = kernels[f"{asked.function}_kernel"]
        if wrong := inspected(made, kernel.name, asked.cores):
            return wrong
        numbers = range(len(asked.arguments))
        launch = source.launch(functions[asked.function], kernel, numbers)
        return emulated.run_on(launch, asked.arguments)

    return [one(asked) for asked in runs]


def inspected(made: compiler.Compiled, kernel: str, cores: bool) -> str:
    """What is wrong with a kernel's machine code: spilled registers, no tensor cores where there
    should be."""
    resources = made.resources[kernel]
    if resources.spilled or resources.stack:
        return f"{kernel} keeps {resources.stack} bytes on the stack and spills {resources.spilled}"
    if cores and not resources.tensor_products:
        return "no mma instruction"
    return ""
