"""Cells measured to train a cost model on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hwmpq.stages.job import Options, Progress, Silent
from hwmpq.stages.sampling import machine, sample
from hwmpq.stages.shapes import zoo_shapes


def sample_cells(options: Options, rows: int, progress: Progress | None = None) -> dict[str, Any]:
    """Measure shapes like those of the zoo in every format, into the store; see stages.sampling."""
    job = machine(options, progress or Silent())
    with job.store:
        with job.progress.stage("trace the zoo", None):
            origins = zoo_shapes()
        done = sample(job, origins, rows)
    return {
        "version": 1, "target": job.target.name, "threads": options.threads,
        "fingerprint": job.fingerprint, **asdict(done),
    }  # fmt: skip
