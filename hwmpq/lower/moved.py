"""TVM names that moved between its last releases (0.27: relax.Constant is tvm.ir.GenericConst)."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


def is_constant(expr: Any) -> bool:
    """Whether a Relax expression is a tensor constant."""
    import tvm

    return isinstance(expr, tvm.ir.expr.GenericConst)


def constant_array(expr: Any) -> NDArray[Any]:
    """The contents of a tensor constant."""
    array: NDArray[Any] = expr.value.numpy()
    return array
