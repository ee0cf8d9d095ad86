"""hwmpq: mixed-precision quantization with the real device in the loop, on Apache TVM.

Everything below is imported on first use: `import hwmpq` itself loads no torch, tvm, xgboost or
ortools.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_EXPORTS = {
    "quantize": "hwmpq.api",
    "Result": "hwmpq.pipeline",
    "load": "hwmpq.artifact",
    "trace": "hwmpq.frontend.torch_export",
    "Target": "hwmpq.targets",
}
__all__ = ["Result", "Target", "load", "quantize", "trace"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hwmpq")
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'hwmpq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


class _Package(ModuleType):
    """Keeps `hwmpq.quantize` the function, though a sub-package of that name exists: the import
    system sets every loaded sub-package as an attribute of its parent."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _EXPORTS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
