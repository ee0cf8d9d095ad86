"""Functions that a request to the worker may name: public ones that this package defines."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from hwmpq.errors import InputError


def public_function(path: str) -> Callable[..., Any]:
    """'hwmpq.module:name' -> the function. Raises InputError for anything outside the package."""
    module, _, name = path.partition(":")
    if module.split(".")[0] != "hwmpq" or not name.isidentifier() or name.startswith("_"):
        raise InputError("not a callable function", path, "hwmpq.module:name")
    found: Callable[..., Any] | None = getattr(importlib.import_module(module), name, None)
    if not callable(found) or found.__module__.split(".")[0] != "hwmpq":
        raise InputError("not a callable function", path, "hwmpq.module:name")
    return found
