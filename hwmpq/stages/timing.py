"""Artifacts timed against each other in one interleaved run, and against torch eager."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq.errors import DeviceError
from hwmpq.kernels import CODEGEN_VERSION
from hwmpq.measure import (
    Cell,
    CellTiming,
    Protocol,
    WorkerProcess,
    median_interval,
    time_replicated,
)
from hwmpq.stages.job import Job
from hwmpq.types import Assignment, digest

#: Parts of an epoch of which a median's samples are the least; a percentile's are the epochs.
BEST_OF = 5


@dataclass(frozen=True)
class Timed:
    """Seconds of one artifact: the statistic asked for and its 95 % interval; calls_s: least
    seconds of every kernel call inside it, none where it did not run."""

    latency_s: float
    interval: tuple[float, float]
    samples_s: tuple[float, ...]
    quality: Mapping[str, Any]
    calls_s: tuple[float, ...] = ()


def time_artifacts(
    job: Job, folders: Mapping[str, Path], statistic: str, worker: WorkerProcess, rounds: int = 25
) -> dict[str, Timed]:
    """Time artifacts together, in Latin-square rounds. Raises DeviceError when one cannot run.

    Each is loaded twice and half of the rounds go to either: the time depends on where the memory
    of the loaded artifact lies, so this belongs into the interval.
    """
    protocol = Protocol(
        rounds=rounds, epoch_s=0.006, threads=job.options.threads, seed=job.options.seed,
        best_of=_best_of(statistic),
    )  # fmt: skip
    cells = [
        Cell(key, kind="artifact", path=str(path), inside=True) for key, path in folders.items()
    ]
    timings = time_replicated(cells, protocol, (worker, worker))
    return {t.key: _timed(t, statistic) for t in timings}


def stored_times(
    job: Job,
    assignments: Mapping[str, Assignment],
    statistic: str,
    measure: Callable[[], dict[str, Timed]],
) -> dict[str, Timed]:
    """The uniform artifacts' times as first measured here.

    Prices and relative budgets rest on them while a plan is chosen, so a run that goes on where
    one was killed chooses the same; what is reported and accepted is always timed afresh.
    """
    key = digest(
        ["calls", _best_of(statistic), CODEGEN_VERSION, job.key, assignments, dict(job.target.tvm),
         job.options.threads, job.fingerprint]
    )  # fmt: skip
    found = job.store.fact("uniform", key)
    if found is None:
        timed = measure()
        kept = {
            name: {
                "samples_s": list(t.samples_s), "quality": dict(t.quality),
                "calls_s": list(t.calls_s),
            }
            for name, t in timed.items()
        }  # fmt: skip
        job.store.put_fact("uniform", key, kept)
        return timed
    return {
        name: Timed(
            *summary(tuple(entry["samples_s"]), statistic),
            tuple(entry["samples_s"]),
            entry["quality"],
            tuple(entry["calls_s"]),
        )
        for name, entry in found.items()
    }


def _best_of(statistic: str) -> int:
    return BEST_OF if statistic == "median" else 1


def _timed(timing: CellTiming, statistic: str) -> Timed:
    if timing.error:
        raise DeviceError(f"the artifact {timing.key!r} could not be timed", timing.error)
    value, interval = summary(timing.samples_s, statistic)
    quality = dict(timing.quality)
    return Timed(value, interval, timing.samples_s, quality, tuple(quality.pop("calls_s")))


def summary(samples: tuple[float, ...], statistic: str) -> tuple[float, tuple[float, float]]:
    """The statistic of the epochs and an interval: distribution-free for the median; for a
    percentile the value itself up to the largest epoch."""
    if statistic == "median":
        return float(np.median(samples)), median_interval(samples)
    value = float(np.percentile(samples, float(statistic[1:])))
    return value, (float(np.median(samples)), float(np.max(samples)))


def torch_eager_s(job: Job) -> float | None:
    """Median seconds of one call of the float torch module, eager, on the same threads.

    In this process: torch is loaded here and nowhere else. None for an exported program, whose
    module is not the user's, for another machine's device, and where nothing is timed.
    """
    if job.device.remote or job.estimated:
        return None
    import time

    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(job.options.threads)
    try:
        module = job.model.module
        example = job.model.example
        samples = []
        with torch.inference_mode():
            for i in range(30):
                began = time.perf_counter()
                module(*example)
                if i >= 5:
                    samples.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return float(np.median(samples))
