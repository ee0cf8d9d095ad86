"""Schedules timed against each other: of every cell the best few by estimate, the default first.

Those of a cell are timed in one interleaved block. Each time is kept under the hash of what was
emitted, and the fastest is chosen (`stages.schedule`), so a second run times nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hwmpq.formats import format_named
from hwmpq.kernels import Call, Kernel, Schedule
from hwmpq.stages.cells import Builder, CellBench, LayerCell, layer_key, workers
from hwmpq.stages.job import Job
from hwmpq.stages.menu import Menu
from hwmpq.stages.pool import pool_of
from hwmpq.stages.schedule import cell_call, keep_choice, stored_choice
from hwmpq.types import Measurement

#: A schedule replaces the default where it takes at most this share of its time: less is noise.
WORTH = 0.97


@dataclass(frozen=True)
class Space:
    """The schedules of a cell that are timed, best estimate first."""

    call: Call
    kernel: Kernel
    schedules: tuple[Schedule, ...]


def tune(job: Job, menu: Menu, count: int) -> int:
    """Time the `count` best schedules by estimate of every cell; returns how many cells were timed.

    No cell begins once --max-time is used up. A cell whose default schedule fails keeps it.
    """
    began = time.monotonic()
    open_ = [space for space in spaces(job, menu, count) if not _is_known(job, space)]
    if not open_:
        return 0
    done = 0
    with (
        job.progress.stage("tune", len(open_)) as advance,
        workers(job) as (compiler, timer),
        pool_of(job) as pool,
        tempfile.TemporaryDirectory(prefix="hwmpq-") as folder,
    ):
        builder = Builder(job, compiler, Path(folder), with_loop=job.times_elsewhere, pool=pool)
        bench = CellBench(job, builder, timer, job.fingerprint)
        for space in open_:
            if job.options.max_time and time.monotonic() - began >= job.options.max_time:
                job.progress.note(f"--max-time is used up: {len(open_) - done} cells not tuned")
                break
            times = time_space(job, bench, space)
            keep_choice(job, space.kernel, space.call, fastest(space.schedules, times),
                        space.schedules)  # fmt: skip
            done += 1
            advance(1)
    return done


def spaces(job: Job, menu: Menu, count: int) -> list[Space]:
    """The cells of a menu that have several schedules, each once."""
    found: dict[tuple[str, str], Space] = {}
    for layer in job.network.layers:
        for name, kernel in menu.kernels[layer.name].items():
            call = cell_call(layer.workload, format_named(name), job.options.threads)
            schedules = tuple(kernel.schedules(call)[:count])
            if len(schedules) > 1:
                found.setdefault((layer.workload.key, name), Space(call, kernel, schedules))
    return list(found.values())


def time_space(job: Job, bench: CellBench, space: Space) -> list[Measurement]:
    """The time of every schedule, in order; all go to the store."""
    block = []
    for schedule in space.schedules:
        kernel = space.kernel.scheduled(schedule, space.call)
        key = layer_key(kernel.cell(space.call), job.target.tvm, job.fingerprint)
        block.append(LayerCell(key, space.call, kernel, failed=False))
    return [measurement for _, measurement in bench.layers(block)]


def fastest(schedules: Sequence[Schedule], times: Sequence[Measurement]) -> Schedule:
    """The first, the default, unless another one is faster by more than noise."""
    timed = [(m.latency_s, i) for i, m in enumerate(times) if not m.error]
    if not timed or times[0].error:
        return schedules[0]
    seconds, index = min(timed)
    return schedules[index if seconds <= WORTH * times[0].latency_s else 0]


def _is_known(job: Job, space: Space) -> bool:
    choice = stored_choice(job, space.kernel, space.call)
    return choice is not None and choice.tried >= set(space.schedules)
