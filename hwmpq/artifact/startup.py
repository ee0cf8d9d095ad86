"""How long an artifact takes to start, in a process of its own: import, load, first result.

`python -m hwmpq.artifact.startup ARTIFACT` is that process; it prints one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from hwmpq.errors import InputError

#: The longest that a start may take: the import alone takes seconds where the disk is slow.
_DEADLINE_S = 240.0


@dataclass(frozen=True)
class StartUp:
    """Seconds. import_tvm: of TVM's runtime, once per process, whatever it runs; load: checks of
    all files, library and parameters; first_call: the first result, caches and thread pool cold."""

    import_tvm: float
    load: float
    first_call: float


def start_up(path: Path) -> StartUp:
    """Start an artifact in a fresh process. Raises InputError when it does not start."""
    program = [sys.executable, "-m", __name__, str(path)]
    settings = {"TVM_USE_RUNTIME_LIB": "1", **os.environ}
    try:
        ran = subprocess.run(
            program, env=settings, capture_output=True, text=True, timeout=_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise InputError("the artifact did not start", f"nothing in {_DEADLINE_S:g} s") from None
    if ran.returncode != 0:
        last = ran.stderr.strip().splitlines()[-1:]
        raise InputError("the artifact did not start", "".join(last) or f"exit {ran.returncode}")
    return StartUp(**json.loads(ran.stdout))


def _measure(path: str) -> StartUp:
    import numpy as np

    began = time.perf_counter()
    from tvm.runtime import vm as _vm  # noqa: F401

    imported = time.perf_counter()
    from hwmpq.artifact.run import load

    ready = time.perf_counter()
    model = load(path)
    loaded = time.perf_counter()
    inputs = [np.zeros(e["shape"], e["dtype"]) for e in model.manifest["inputs"]]
    called = time.perf_counter()
    model(*inputs)
    return StartUp(imported - began, loaded - ready, time.perf_counter() - called)


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(sys.argv[1]))))
