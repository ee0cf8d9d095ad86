"""What the worker does for `time`: a block of cells, checked, calibrated, timed round by round."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hwmpq import toolchain
from hwmpq.errors import InputError
from hwmpq.measure import gates, protocol, stats
from hwmpq.measure.environment import conditions, doubts, fingerprint
from hwmpq.measure.kernel import WrongNumbers, call_overhead_s, check_kernel, load_kernel
from hwmpq.measure.protocol import Cell, CellTiming
from hwmpq.measure.public import public_function

Progress = Callable[[Mapping[str, Any]], None]
#: Cells of one block share their inner count unless their times differ by more than this.
MAX_SHARED_RATIO = 10.0
#: Parts of an epoch whose calls are long may make it so many times as long.
MAX_STRETCH = 4
#: A part of an epoch waits so many times its own length for a core that nobody shares.
PATIENCE = 2
_SENTINEL_BYTES = bytes(64 << 10)
_REFERENCE_RUNS = 15
_TASKS = "/proc/self/task"
#: The longest wait for idle threads.
_REST_S = 0.5


class Runner(Protocol):
    """Something that can be called many times: a kernel or an artifact."""

    def run(self, count: int) -> float:
        """Seconds that `count` calls take."""
        ...


class Calls:
    """A zero-argument Python callable as a Runner: for artifacts, whose calls take milliseconds."""

    def __init__(self, function: Callable[[], object]):
        self.function = function

    def run(self, count: int) -> float:
        function = self.function
        began = time.perf_counter()
        for _ in range(count):
            function()
        return time.perf_counter() - began


@dataclass
class Entry:
    """A cell in the making. parts: of an epoch; count: calls per part; rounds: the round of each
    kept sample."""

    cell: Cell
    runner: Runner
    quality: dict[str, Any]
    per_call_s: float = 0.0
    parts: int = 1
    count: int = 1
    kept: list[gates.Epoch] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    rejected: list[tuple[int, gates.Epoch]] = field(default_factory=list)
    error: str = ""


def get_ready(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Import TVM and do all that is done once per process; answers who the worker's machine is, its
    conditions, and the doubts about them.

    payload: {"compiles": whether cells will come without their loop, "on_cpu": whether any runs on
    the CPU; a GPU's need no TVM}.
    """
    versions = {}
    if payload.get("on_cpu", True):
        with toolchain.without_torch():
            import tvm

        versions["tvm"] = tvm.__version__
    if payload.get("compiles"):
        call_overhead_s()
    reference_s()
    now = conditions()
    return {"fingerprint": fingerprint(), **versions, "doubts": doubts(now), **now}


def run_block(payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Time {"cells": [...], **fields of Protocol} and answer {"cells": [CellTiming, ...]}.

    A cell that fails has an error instead of samples. Before each step that may take the process
    down a progress {"key", "step"} names the cell. Raises InputError for a bad request.
    """
    fields = dict(payload)
    cells = [Cell.from_json(item) for item in fields.pop("cells")]
    plan = protocol.Protocol.from_json(fields)
    if len({cell.key for cell in cells}) != len(cells):
        raise InputError("cells of one block need distinct keys", [cell.key for cell in cells])
    threads = os.environ.get("TVM_NUM_THREADS")
    if threads != str(plan.threads):
        raise InputError("worker started with another number of threads", threads, plan.threads)
    timings: dict[str, CellTiming] = {}
    with (
        gates.machine_lock(lambda: progress({"step": "lock"})),
        gates.pinned(plan.pin and plan.threads == 1) as core,
    ):
        entries = []
        for cell in cells:
            try:
                entries.append(_prepare(cell, plan, progress))
            except WrongNumbers as error:
                timings[cell.key] = CellTiming(cell.key, error=f"wrong numbers: {error}")
            except Exception as error:
                timings[cell.key] = CellTiming(cell.key, error=f"{type(error).__name__}: {error}")
        if entries:
            progress({"step": "time"})
            _share_counts(entries, plan)
            shared = _steady_rounds(entries, plan, core, progress)
            timings |= {item.cell.key: _timing(item, plan, shared) for item in entries}
    return {"cells": [timings[cell.key].to_json() for cell in cells]}


def _prepare(cell: Cell, plan: protocol.Protocol, progress: Progress) -> Entry:
    """Load, check before any timing, calibrate."""
    progress({"key": cell.key, "step": "load"})
    runner: Runner
    if cell.launches:
        from hwmpq.measure.cuda import CudaKernel

        on_gpu = CudaKernel(cell)
        progress({"key": cell.key, "step": "check"})
        check_kernel(on_gpu, cell)
        runner, quality = on_gpu, on_gpu.quality
    elif cell.kind == "kernel":
        kernel = load_kernel(cell)
        progress({"key": cell.key, "step": "check"})
        check_kernel(kernel, cell)
        quality = {
            "call_overhead_s": call_overhead_s(cell.loop),
            "weight_copies": kernel.copies,
            "cold": kernel.cold,
        }
        runner = kernel
    else:
        runner, quality = _load_whole(cell)
        progress({"key": cell.key, "step": "first run"})
        runner.run(1)
        overhead = min(Calls(lambda: None).run(10_000) for _ in range(5)) / 10_000
        quality["call_overhead_s"] = overhead
    progress({"key": cell.key, "step": "calibrate"})
    entry = Entry(cell, runner, quality)
    _calibrate(entry, plan.epoch_s)
    return entry


def _load_whole(cell: Cell) -> tuple[Runner, dict[str, Any]]:
    """A whole network, ours or another runtime's, and what there is to say of it."""
    if cell.kind == "program":
        call, description = public_function(cell.function)(cell.settings)
        return Calls(call), {"description": description}
    from hwmpq.artifact import load  # type: ignore[import-not-found,unused-ignore]

    artifact = load(cell.path, threads=int(os.environ["TVM_NUM_THREADS"]))
    size = cell.batch or None
    quality = {"calls_s": artifact.call_seconds()} if cell.inside else {}
    if artifact.on_gpu:
        from hwmpq.measure.cuda import Watched

        watched = Watched(artifact.gpu_seconds(size))
        return watched, quality | watched.quality
    return Calls(artifact.bench_callable(size=size)), quality


def _calibrate(entry: Entry, epoch_s: float) -> None:
    """Seconds per call, estimated twice: one preemption must not mislead. All of it is warm-up."""
    estimates: list[float] = []
    for _ in range(2):
        count, seconds = 1, entry.runner.run(1)
        while seconds < epoch_s / 4 and count < 1 << 30:
            count *= 2 if seconds > epoch_s / 64 else 8
            seconds = entry.runner.run(count)
        estimates.append(seconds / count)
    entry.per_call_s = max(min(estimates), 1e-12)
    entry.quality["calibration_ratio"] = max(estimates) / entry.per_call_s


def _share_counts(entries: list[Entry], plan: protocol.Protocol) -> None:
    """One inner count for the block, or each cell its own where the times lie too far apart."""
    times = [entry.per_call_s for entry in entries]
    shared = max(times) <= MAX_SHARED_RATIO * min(times)
    middle = math.exp(sum(map(math.log, times)) / len(times))
    for entry in entries:
        per_call_s = middle if shared else entry.per_call_s
        entry.count = max(1, round(plan.epoch_s / plan.best_of / per_call_s))
        most = MAX_STRETCH * plan.epoch_s / (entry.count * per_call_s)
        entry.parts = min(plan.best_of, max(1, round(most)))


def latin_square(size: int) -> list[list[int]]:
    """Row r = the order of round r: each item once in each place, and (even size) once after
    each other item. Source: E. J. Williams, Aust. J. Sci. Res. A2 (1949) 149."""
    first = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(size)]
    return [[(item + row) % size for item in first] for row in range(size)]


def _steady_rounds(
    entries: list[Entry], plan: protocol.Protocol, core: int | None, progress: Progress
) -> dict[str, Any]:
    """As `_rounds`; where the machine ran at another speed than the session's, once more: the first
    epochs then count as rejected."""
    environment = conditions()
    shared = _rounds(entries, plan, core, progress)
    if abs(math.log(shared["speed_factor"])) > math.log1p(stats.UNSTEADY):
        for entry in entries:
            entry.rejected += zip(entry.rounds, entry.kept, strict=True)
            entry.kept, entry.rounds = [], []
        shared = _rounds(entries, plan, core, progress)
    return {**shared, "environment": environment}


def _rounds(
    entries: list[Entry], plan: protocol.Protocol, core: int | None, progress: Progress
) -> dict[str, Any]:
    """Fill the entries, interleaved; a bad epoch is repeated once, at once. Returns what all share.

    Two epochs per round and cell at most, so the cap is twice the rounds.
    """
    chance = random.Random(plan.seed)
    items = chance.sample(entries, len(entries))
    orders = latin_square(len(items))
    sentinel: list[float] = []
    began = gates.Counters.read(core)
    for entry in entries:  # discarded: caches, branch predictors, clock frequency
        entry.runner.run(entry.count)
    for number in range(plan.rounds):
        progress({"step": "time", "round": number})
        sentinel.append(_sentinel_s())
        for index in orders[number % len(items)]:
            entry = items[index]
            for _ in range(2):
                count = max(1, int(entry.count * (1 + 0.2 * chance.random())))
                if plan.settle:
                    _wait_for_other_threads()
                    entry.runner.run(1)
                epoch = _epoch(entry, count, core, plan)
                if not epoch.bad:
                    entry.kept.append(epoch)
                    entry.rounds.append(number)
                    break
                entry.rejected.append((number, epoch))
    whole = gates.Epoch.between(began, gates.Counters.read(core), 0.0, 1, plan.threads)
    return {
        "sentinel_s": sentinel,
        "drift": stats.drift(sentinel),
        "speed_factor": stats.speed_factor(sentinel, reference_s()),
        "pressure": whole.pressure,
        "block_steal": whole.steal,
        "core": core,
        "seed": plan.seed,
        "denormals": "kept" if np.float32(1e-40) * np.float32(0.5) else "flushed",
    }


def _wait_for_other_threads() -> None:
    """Until the threads of the runtime that ran before sleep; some spin for a tenth of a second and
    would take the cores that this one's threads need."""
    if not os.path.isdir(_TASKS):
        time.sleep(_REST_S)
        return
    own, end, asleep = str(threading.get_native_id()), time.monotonic() + _REST_S, 0
    while asleep < 3 and time.monotonic() < end:
        time.sleep(0.002)
        asleep = 0 if any(_runs(task) for task in os.listdir(_TASKS) if task != own) else asleep + 1


def _runs(task: str) -> bool:
    try:
        state = Path(_TASKS, task, "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it has ended meanwhile
        return False
    return state == "R"


def _epoch(entry: Entry, count: int, core: int | None, plan: protocol.Protocol) -> gates.Epoch:
    """The least of the parts; crowded where none of them began and ended alone on its core, which
    is not asked where neighbours belong into the distribution."""
    before = gates.Counters.read(core)
    least, crowded = math.inf, plan.threads == 1 and plan.best_of > 1
    patience_s = PATIENCE * count * entry.per_call_s
    for _ in range(entry.parts):
        began_alone = crowded and gates.wait_until_alone(patience_s)
        least = min(least, entry.runner.run(count))
        crowded = crowded and not (began_alone and gates.alone())
    after = gates.Counters.read(core)
    return gates.Epoch.between(before, after, least, count, plan.threads, crowded=crowded)


@functools.cache
def reference_s() -> float:
    """Median seconds of the sentinel when the session, this process, began."""
    return stats.median([_sentinel_s() for _ in range(_REFERENCE_RUNS)])


def _sentinel_s() -> float:
    """Seconds of a fixed piece of work, the better of two: SHA-256 of 64 KiB of zeros, 8 times."""
    found = []
    for _ in range(2):
        began = time.perf_counter()
        for _ in range(8):
            hashlib.sha256(_SENTINEL_BYTES).digest()
        found.append(time.perf_counter() - began)
    return min(found)


def _timing(entry: Entry, plan: protocol.Protocol, shared: Mapping[str, Any]) -> CellTiming:
    """Too few quiet epochs: `noisy` says so, and the disturbed ones count too; the least of all,
    unless a distribution is asked for, as what disturbs a time only adds to it."""
    noisy = len(entry.kept) < min(stats.MIN_SAMPLES, plan.rounds)
    samples, rejected = list(zip(entry.rounds, entry.kept, strict=True)), entry.rejected
    if noisy:
        found = sorted(samples + rejected, key=lambda pair: pair[1].per_call_s)
        most = stats.MIN_SAMPLES if plan.best_of > 1 else len(found)
        samples, rejected = found[:most], found[most:]
        samples.sort(key=lambda pair: pair[0])
    epochs = [epoch for _, epoch in samples]
    quality = {
        **entry.quality,
        **shared,
        "rounds": [number for number, _ in samples],
        "noisy": noisy,
        "disturbance": stats.disturbance(noisy, shared["speed_factor"]),
        "steal": max(epoch.steal for epoch in epochs),
        "away": max(epoch.away for epoch in epochs),
        "switches": sum(epoch.switches for epoch in epochs),
    }
    return CellTiming(
        key=entry.cell.key,
        samples_s=tuple(epoch.per_call_s for epoch in epochs),
        rejected_s=tuple(epoch.per_call_s for _, epoch in rejected),
        inner_count=entry.count,
        quality=quality,
    )
