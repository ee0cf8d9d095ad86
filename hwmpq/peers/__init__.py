"""Other runtimes as programs that are timed beside ours: one file per runtime.

A file defines `PRECISIONS` and `load(settings) -> (call, description)`: a function without
arguments that runs the model once on prepared inputs, and what it is, for the report. It is what a
`Cell` of kind 'program' names, so it runs in the worker, interleaved with our artifacts. Its
`outputs(settings)` is a function from a batch of the model's own size to the first output for it.
Nothing here is needed to use hwmpq: the packages come with the extra `bench`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError

#: The runtimes, each a module of this package.
NAMES = ("onnxruntime", "openvino", "torch")


def need(*packages: str) -> None:
    """Raises InputError naming the extra when a package is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"optional packages are not installed: {', '.join(missing)}",
            next="Run: pip install 'hwmpq[bench]'",
        )


def check_precision(runtime: str, precision: str, allowed: Sequence[str]) -> None:
    """Raises InputError for a precision that the runtime is not timed in."""
    if precision not in allowed:
        raise InputError(f"precision of {runtime}", precision, allowed)


def noise(shapes: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """Seeded inputs: those of `Artifact.bench_callable` for the same shapes."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(tuple(shape)).astype(np.float32) for shape in shapes]
