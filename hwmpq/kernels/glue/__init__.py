"""Kernels of the glue operators: one PrimFunc per (operator, attrs, tensors in memory).

What they compute is `quantize/glue.py` on codes and `quantize/exact_math.py` on values, bit for
bit. Each file of the folder holds a group of operators and lists them in `EMITTERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from hwmpq import kernels
from hwmpq.errors import UnknownName
from hwmpq.kernels.cuda.grid import GridIR
from hwmpq.kernels.cuda.rows import RowIR
from hwmpq.kernels.glue import rows
from hwmpq.kernels.glue.call import GlueCall, Operand, parameters
from hwmpq.kernels.glue.frame import Frame
from hwmpq.kernels.glue.move import planned
from hwmpq.kernels.ir import IR
from hwmpq.types import digest

__all__ = ["GlueCall", "Operand", "emit", "is_view", "key", "operators", "parameters"]

_MOVES = ("rearrange", "encode")


@cache
def operators() -> dict[str, Callable[[Frame], None]]:
    """Operator -> what emits it, of every file of the folder."""
    found: dict[str, Callable[[Frame], None]] = {}
    for info in iter_modules(__path__):
        found |= getattr(import_module(f"{__name__}.{info.name}"), "EMITTERS", {})
    return found


def emit(call: GlueCall) -> Any:
    """TVM PrimFunc `main`. Arguments: every input, flat; one fp32[4] quantizer per input and one
    for the result; the fp32 parameters (`GlueCall.roles`); out, flat.

    Raises UnknownName for an operator without kernel, InputError for layouts that it cannot take.
    """
    emitters = operators()
    if call.op not in emitters:
        raise UnknownName("glue operator", call.op, emitters)
    ir = _builder(call)
    with ir.function():
        frame = Frame.of(ir, call)
        with ir.running():
            emitters[call.op](frame)
    return ir.result()


def _builder(call: GlueCall) -> IR:
    if not call.grid:
        return IR(call.threads)
    if call.op in rows.EMITTERS:
        return RowIR(call.out.size // call.out.shape[-1])
    return GridIR(call.out.size)


def is_view(call: GlueCall) -> bool:
    """Whether the result is the input's bytes in the same order."""
    if call.op not in _MOVES or not call.same_codes(0):
        return False
    *before, last = planned(call)
    return not before and last.contiguous and call.inputs[0].size == call.out.size


def key(call: GlueCall) -> str:
    """A stable hash of what is emitted."""
    return digest([kernels.CODEGEN_VERSION, asdict(call)])
