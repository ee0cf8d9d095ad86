"""Arrays for a model of several inputs: an .npz file that holds one by the name of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq import data
from hwmpq.artifact.golden import SAMPLES
from hwmpq.errors import InputError
from hwmpq.quantizers import Quantizers
from hwmpq.stages.facts import RANGES
from hwmpq.stages.job import Job
from hwmpq.types import Assignment

Array = NDArray[np.float32]
_BATCH = 64


def named_arrays(job: Job) -> dict[str, Array]:
    """Input -> its samples [N, ...], normalized. Raises InputError."""
    spec, names = job.options.calib_data or job.options.data or "", job.graph.inputs
    if not spec.startswith("npz:"):
        raise InputError(
            "data for a model with several inputs", spec or None,
            f"npz:FILE with the float32 arrays {', '.join(names)}",
        )  # fmt: skip
    found = data.arrays(Path(spec.removeprefix("npz:")))
    for name in names:
        rest = list(job.graph.tensors[name][1:])
        if name not in found:
            raise InputError(f"no array {name} in {spec}", ", ".join(found), ", ".join(names))
        array, count = found[name], len(found[names[0]])
        if array.dtype != np.float32 or list(array.shape) != [count, *rest] or not count:
            raise InputError(
                f"array {name} in {spec}", f"{array.dtype} {list(array.shape)}",
                f"float32 {['N', *rest]}, N the same for all inputs",
            )  # fmt: skip
    return {name: found[name] for name in names}


def calibrated(job: Job, arrays: dict[str, Array], assignment: Assignment) -> Quantizers:
    """Quantizers for an assignment. Raises InputError for steps of --ptq that need images."""
    import torch

    from hwmpq.quantize.calibrate import calibrate
    from hwmpq.quantize.ptq import OF_PLAN

    asked = [step for step in OF_PLAN if step in job.options.ptq]
    if asked:
        raise InputError(
            "--ptq for a model with several inputs", ", ".join(asked), "bias, equalize"
        )
    count = min(job.options.calib, *map(len, arrays.values()))
    batches: list[Any] = [
        {name: torch.from_numpy(a[at : min(at + _BATCH, count)]) for name, a in arrays.items()}
        for at in range(0, count, _BATCH)
    ]
    return calibrate(
        job.graph, batches, tuple(dict.fromkeys(assignment.values())), RANGES,
        steps=job.options.ptq,
    )  # fmt: skip


def noise(job: Job) -> dict[str, Array]:
    """Seeded samples of every input, for golden samples where there are no data."""
    chance = np.random.default_rng(job.options.seed)
    shapes = {name: (SAMPLES, *job.graph.tensors[name][1:]) for name in job.graph.inputs}
    return {name: chance.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
