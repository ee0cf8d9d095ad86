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
    """max_abs: largest difference of an output; top1_agreement: % of runs with the same argmax;
    exact: every output bit is equal; first_difference: first tensor whose checksum differs."""

    samples: int
    max_abs: float
    top1_agreement: float
    exact: bool
    first_difference: str


def replay(artifact: Artifact) -> Replay:
    """Run the golden inputs, at every batch size, and compare with the golden outputs.

    Raises InputError when the artifact holds no golden samples.
    """
    arrays, metadata = artifact.golden()
    count = int(metadata.get("samples", "0"))
    if not count:
        raise InputError(
            f"artifact {artifact.path} has no golden samples",
            next="Give --data, or build it again.",
        )
    samples = [
        {
            kind: [arrays[f"{k}.{kind[:-1]}.{e['name']}"] for e in artifact.manifest[kind]]
            for kind in ("inputs", "outputs")
        }
        for k in range(count)
    ]
    runs = samples + [_in_rows(samples, size) for size in artifact.sizes[1:]]
    worst, agree, exact = 0.0, 0, True
    for run in runs:
        result = artifact(*run["inputs"])
        outputs = result if isinstance(result, list) else [result]
        for got, want in zip(outputs, run["outputs"], strict=True):
            difference = np.abs(got.astype(np.float64) - want)
            worst = max(worst, float(difference.max(initial=0.0)))
            exact = exact and bool(np.array_equal(got, want))
        got, want = (o[0].reshape(len(o[0]), -1).argmax(1) for o in (outputs, run["outputs"]))
        agree += int((got == want).all())
    differ = (_first_difference(artifact, s["inputs"], metadata, k) for k, s in enumerate(samples))
    return Replay(count, worst, 100.0 * agree / len(runs), exact, next(filter(None, differ), ""))


def _in_rows(samples: list[dict[str, list[NDArray[Any]]]], size: int) -> dict[str, Any]:
    """The rows of the samples, from the first one again where they end, as one of a batch size."""
    whole = {kind: list(map(np.concatenate, zip(*(s[kind] for s in samples), strict=True)))
             for kind in samples[0]}  # fmt: skip
    return {k: [a[np.arange(size) % len(a)] for a in arrays] for k, arrays in whole.items()}


def _first_difference(
    artifact: Artifact, inputs: list[NDArray[Any]], metadata: dict[str, str], sample: int
) -> str:
    for name, contents in artifact.trace(*inputs):
        expected = metadata.get(f"{sample}.{name}")
        if expected is not None and checksum(contents) != expected:
            return name
    return ""
