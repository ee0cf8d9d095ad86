"""The workers of --executor, for a stage's independent items."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from hwmpq.executor import Pool, open_pool
from hwmpq.measure import WorkerProcess
from hwmpq.measure.worker import answer
from hwmpq.stages.job import Job


@contextmanager
def pool_of(job: Job) -> Iterator[Pool | None]:
    """None for 'serial': this process works itself. Processes start at their first item."""
    pool = open_pool(job.options.executor, WorkerProcess, answer)
    with pool or nullcontext():
        yield pool
