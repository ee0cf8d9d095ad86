"""Timing on the real device: protocol, worker process, statistics, environment, store.

    with WorkerProcess(threads=1) as worker:
        timings = time_block(cells, Protocol(), worker)
    store = hwmpq.measure.store.Store.open(None)

Importing this loads neither tvm nor sqlalchemy.
"""

from __future__ import annotations

from hwmpq.errors import WorkerCrashed, WorkerFailed, WorkerTimeout
from hwmpq.measure.environment import conditions, fingerprint, toolchain
from hwmpq.measure.process import WorkerProcess
from hwmpq.measure.protocol import (
    Cell,
    CellTiming,
    Protocol,
    cause,
    is_transient,
    pairs,
    time_block,
)
from hwmpq.measure.replicate import time_replicated
from hwmpq.measure.stats import Comparison, compare, median_interval

__all__ = [
    "Cell",
    "CellTiming",
    "Comparison",
    "Protocol",
    "WorkerCrashed",
    "WorkerFailed",
    "WorkerProcess",
    "WorkerTimeout",
    "cause",
    "compare",
    "conditions",
    "fingerprint",
    "is_transient",
    "median_interval",
    "pairs",
    "time_block",
    "time_replicated",
    "toolchain",
]
