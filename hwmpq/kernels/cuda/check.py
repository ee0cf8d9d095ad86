"""A kernel of a GPU without one: compiled for the chip and inspected, then run on this CPU."""

from __future__ import annotations

from collections.abc import Sequence
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


def run(function: Any, target: Target, arguments: Sequence[NDArray[Any]], cores: bool) -> str:
    """Compile and inspect a PrimFunc, and call it emulated; its last argument is written in place.

    cores: it shall multiply with tensor cores. Answers '' or what is wrong.
    """
    code = source.code_of(source.build(function, target))
    if wrong := inspected(compiler.compiled(code, target), cores):
        return wrong
    (kernel,) = source.kernels_of(code)
    return emulate.run(code, source.launch(function, kernel, range(len(arguments))), arguments)


def inspected(made: compiler.Compiled, cores: bool) -> str:
    """What is wrong with machine code: spilled registers, no tensor cores where there should be."""
    for name, resources in made.resources.items():
        if resources.spilled or resources.stack:
            return (
                f"{name} keeps {resources.stack} bytes on the stack and spills {resources.spilled}"
            )
    if cores and not made.facts.tensor_products:
        return "no mma instruction"
    return ""
