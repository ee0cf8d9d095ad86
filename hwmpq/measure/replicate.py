"""A block timed in several processes that share its rounds, so that the luck of one process does
not decide: where its memory lies, which addresses its code got.

Every process loads, checks and calibrates for itself. A cell that fails in one of them has failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hwmpq.measure import stats
from hwmpq.measure.process import WorkerProcess
from hwmpq.measure.protocol import Cell, CellTiming, Protocol, time_block

#: Of what disturbs, the worst process is told.
_WORST = ("drift", "steal", "away", "pressure", "block_steal", "calibration_ratio")


def time_replicated(
    cells: Sequence[Cell], protocol: Protocol, workers: Sequence[WorkerProcess]
) -> list[CellTiming]:
    """As `time_block`, one worker after the other; each gives a part of the rounds."""
    if len(workers) == 1:
        return time_block(cells, protocol, workers[0])
    rounds = -(-protocol.rounds // len(workers))
    found = [
        time_block(cells, replace(protocol, rounds=rounds, seed=protocol.seed + i), worker)
        for i, worker in enumerate(workers)
    ]
    return [joined(parts, rounds) for parts in zip(*found, strict=True)]


def joined(parts: Sequence[CellTiming], rounds: int) -> CellTiming:
    """One cell's timings by several processes as one, or the first failure.

    A process without enough quiet epochs does not count where the others have enough of them. The
    rounds are counted through: `rounds` per process. spread: between the processes' medians at the
    session's speed, as (largest / smallest) − 1.
    """
    failed = next((part for part in parts if part.error), None)
    if failed is not None:
        return failed
    quiet = [not part.quality["noisy"] for part in parts]
    enough = sum(len(p.samples_s) for p, fine in zip(parts, quiet, strict=True) if fine)
    noisy = enough < min(stats.MIN_SAMPLES, rounds * len(parts))
    places = [i for i, fine in enumerate(quiet) if fine or noisy]
    used = [parts[i] for i in places]
    steady = [np.array(part.samples_s) * part.quality["speed_factor"] for part in used]
    medians = [stats.median(part) for part in steady]
    samples = tuple(s for part in used for s in part.samples_s)
    factor = stats.median(np.concatenate(steady)) / stats.median(samples)
    spread = max(medians) / min(medians) - 1
    quality: dict[str, Any] = {
        **parts[0].quality,
        "rounds": [i * rounds + r for i in places for r in parts[i].quality["rounds"]],
        "sentinel_s": [s for part in parts for s in part.quality["sentinel_s"]],
        "switches": sum(part.quality["switches"] for part in used),
        **{word: max((part.quality[word] for part in used), key=abs) for word in _WORST},
        "speed_factor": factor, "noisy": noisy, "processes": len(used), "spread": spread,
        "disturbance": stats.disturbance(noisy, factor, spread),
    }  # fmt: skip
    refused = [s for i, part in enumerate(parts) if i not in places for s in part.samples_s]
    rejected = tuple(s for part in parts for s in part.rejected_s)
    return replace(parts[0], samples_s=samples, rejected_s=(*rejected, *refused), quality=quality)
