"""Golden samples: what the exact simulator computed, to be replayed on the artifact."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.artifact.run import Artifact
from hwmpq.errors import InputError

SAMPLES = 4


def checksum(stored: NDArray[Any]) -> str:
    """Of a tensor's bytes as it lies in memory."""
    return hashlib.sha256(np.ascontiguousarray(stored).tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Replay:
    """max_abs: largest difference of an output; top1_agreement: % of samples with the same argmax;
    exact: every output bit is equal; first_difference: first tensor whose checksum differs."""

    samples: int
    max_abs: float
    top1_agreement: float
    exact: bool
    first_difference: str


def replay(artifact: Artifact) -> Replay:
    """Run the golden inputs and compare with the golden outputs.

    Raises InputError when the artifact holds no golden samples.
    """
    arrays, metadata = artifact.golden()
    count = int(metadata.get("samples", "0"))
    if not count:
        raise InputError(f"artifact {artifact.path} has no golden samples")
    names = [entry["name"] for entry in artifact.manifest["inputs"]]
    worst, agree, first = 0.0, 0, ""
    exact = True
    for k in range(count):
        inputs = [arrays[f"{k}.input.{n}"] for n in names]
        result = artifact(*inputs)
        outputs = result if isinstance(result, list) else [result]
        for i, entry in enumerate(artifact.manifest["outputs"]):
            want = arrays[f"{k}.output.{entry['name']}"]
            difference = np.abs(outputs[i].astype(np.float64) - want)
            worst = max(worst, float(difference.max(initial=0.0)))
            exact = exact and bool(np.array_equal(outputs[i], want))
            if i == 0:
                rows = want.reshape(len(want), -1).argmax(1)
                agree += int((outputs[0].reshape(len(want), -1).argmax(1) == rows).all())
        if not first:
            first = _first_difference(artifact, inputs, metadata, k)
    return Replay(count, worst, 100.0 * agree / count, exact, first)


def _first_difference(
    artifact: Artifact, inputs: list[NDArray[Any]], metadata: dict[str, str], sample: int
) -> str:
    for name, contents in artifact.trace(*inputs):
        expected = metadata.get(f"{sample}.{name}")
        if expected is not None and checksum(contents) != expected:
            return name
    return ""
