"""TVM names that moved between its last releases (0.27: relax.Constant is tvm.ir.GenericConst)."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from hwmpq.errors import InputError, UnknownName


def keep_errors() -> None:
    """Have an InputError that leaves a pass come out of TVM as one, with its text, and not as a
    RuntimeError. An UnknownName comes out as an InputError."""
    from tvm_ffi import register_error

    for cls in (UnknownName, InputError):  # the last one is what is raised
        register_error("hwmpq.InputError", cls)


def is_constant(expr: Any) -> bool:
    """Whether a Relax expression is a tensor constant."""
    import tvm

    return isinstance(expr, tvm.ir.expr.GenericConst)


def constant_array(expr: Any) -> NDArray[Any]:
    """The contents of a tensor constant."""
    array: NDArray[Any] = expr.value.numpy()
    return array
