"""The few array operations that numpy and torch spell differently; torch is never imported here.

A tensor can only exist once its owner has imported torch, so it is looked up, not loaded.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

#: A numpy array or a torch tensor; what goes in decides what comes out.
Array = Any


def namespace(x: Array) -> Any:
    """The module (`numpy` or `torch`) that `x` belongs to."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(x, torch.Tensor) else np


def cast(x: Array, dtype: str) -> Array:
    """`x` as `dtype` (numpy's name of it) in its own library, without gradient."""
    xp = namespace(x)
    return np.asarray(x, dtype) if xp is np else x.detach().to(getattr(xp, dtype))


def like(value: Any, x: Array, dtype: str = "float32") -> Array:
    """A number or array of either library as an array of `x`'s library, on `x`'s device."""
    xp = namespace(x)
    if xp is np:
        return cast(value.detach().cpu().numpy() if namespace(value) is not np else value, dtype)
    if namespace(value) is np:
        value = xp.from_numpy(np.array(value, dtype))  # a copy: tensors over read-only memory warn
    return value.detach().to(x.device, getattr(xp, dtype))


def everywhere(value: Any, expected: float) -> bool:
    """Whether a number, or every element of an array, equals `expected`."""
    return bool((value == expected).all()) if hasattr(value, "all") else bool(value == expected)
