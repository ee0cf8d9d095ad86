"""The programs of tools and tools/bench, as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

_TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path += [str(_TOOLS), str(_TOOLS / "bench")]  # last: nothing of theirs hides a package


def load(name: str) -> Any:
    return importlib.import_module(name)
