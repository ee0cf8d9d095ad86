"""A block of cells in a worker: what to time, how, and what came out.

A block is timed interleaved, so that its cells see the same machine and can be compared in pairs.
A cell that crashes or hangs the worker is found, recorded, and the block runs again without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from hwmpq.errors import DeviceError, InputError, WorkerCrashed, WorkerTimeout, in_words
from hwmpq.measure.process import WorkerProcess
from hwmpq.types import FloatArray, reject_unknown

#: A fresh worker may take this long to import TVM; this never counts against a cell.
START_DEADLINE_S = 180.0
KINDS = ("kernel", "artifact", "program")


@dataclass(frozen=True)
class Cell:
    """One thing to time.

    kind 'kernel': `library` (.so) with `function`; `args`: a safetensors file with the tensors "0",
    "1", ... in argument order; `roles[i]`: 'output' (overwritten, must be written whole), 'weight'
    (rotated through copies, so that it is read cold), anything else (warm, as given); `expected`: a
    safetensors file with the right outputs under their argument index, compared by
    |got − expected| ≤ atol + rtol·|expected|.
    features: those that its code needs; the worker asks Linux for the ones that want asking.
    loop: the folder of `kernel.export_loop` for it, '' = the worker compiles its loop.
    launches: of a GPU's kernel, whose `library` is machine code: the file of its `Launches`.
    kind 'artifact': `path`: its folder; `batch`: which of its batch sizes, 0 = the first; `inside`:
    are the seconds of every kernel call in it wanted too?
    kind 'program': `function`: 'hwmpq.module:name', which makes of `settings` a call without
    arguments and a description.
    """

    key: str
    kind: Literal["kernel", "artifact", "program"] = "kernel"
    library: str = ""
    function: str = "main"
    args: str = ""
    roles: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    expected: str = ""
    loop: str = ""
    launches: str = ""
    atol: float = 0.0
    rtol: float = 0.0
    path: str = ""
    batch: int = 0
    inside: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Cell:
        """Raises InputError for an unknown key or kind."""
        reject_unknown("cell", data, set(Cell.__dataclass_fields__))
        given = {name: value for name, value in data.items() if value is not None}
        if given.get("kind", "kernel") not in KINDS:
            raise InputError("kind of cell", data["kind"], KINDS)
        lists = {name: tuple(given.get(name, ())) for name in ("roles", "features")}
        return Cell(**(given | lists))


@dataclass(frozen=True)
class Protocol:
    """How a block is timed.

    rounds: each gives every cell one epoch; epoch_s: about how long an epoch is; best_of: a sample
    is the least of so many parts of it, for what shares a physical core with this one comes and
    goes within milliseconds; 1 where a distribution is asked for; threads: must be
    those of the worker; seed: of the order and the jitter of the inner count; pin: to the last core
    (one thread only); deadline_s: the longest silence of the worker, one step or one round;
    settle: each epoch waits until other threads sleep and begins with a call that is not timed, for
    cells of several runtimes, whose idle threads spin for a while and evict each other's memory.
    """

    rounds: int = 12
    epoch_s: float = 0.008
    threads: int = 1
    seed: int = 0
    pin: bool = True
    deadline_s: float = 60.0
    settle: bool = False
    best_of: int = 1

    def __post_init__(self) -> None:
        counts = (self.rounds, self.threads, self.best_of)
        if min(counts) < 1:
            raise InputError("rounds, threads and best_of", counts, "at least 1")
        if not (0 < self.epoch_s < math.inf and 0 < self.deadline_s < math.inf):
            raise InputError(
                "epoch_s and deadline_s", (self.epoch_s, self.deadline_s), "positive seconds"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Protocol:
        """Raises InputError for an unknown key."""
        reject_unknown("protocol", data, set(Protocol.__dataclass_fields__))
        return Protocol(**data)


@dataclass(frozen=True)
class CellTiming:
    """Raw seconds per call of every kept epoch, or an error.

    rejected_s: epochs that a gate refused. quality, where there are samples: rounds (the round of
    each sample), sentinel_s (per round), drift, speed_factor (what turns the seconds into those at
    the session's speed), disturbance (relative standard error that the flags stand for), steal,
    away, pressure (shares of time), switches, noisy, cold, weight_copies, call_overhead_s,
    calibration_ratio, core, seed, denormals, environment, description (of a program), calls_s (of
    the kernel calls inside an artifact), gpu (name, driver, clocks and what throttled them).
    """

    key: str
    samples_s: tuple[float, ...] = ()
    rejected_s: tuple[float, ...] = ()
    inner_count: int = 0
    quality: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def latency_s(self) -> float:
        """Median of the samples. Raises ValueError for a failed cell."""
        if not self.samples_s:
            raise ValueError(f"cell {self.key} has no time: {self.error}")
        return float(np.median(self.samples_s))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> CellTiming:
        """Raises InputError for an unknown key or a time that cannot be one."""
        reject_unknown("timing", data, set(CellTiming.__dataclass_fields__))
        samples, rejected = tuple(data["samples_s"]), tuple(data["rejected_s"])
        for value in samples + rejected:
            if not (isinstance(value, float) and 0 < value < math.inf):
                raise InputError(f"time of {data['key']}", value, "positive seconds")
        return CellTiming(**{**data, "samples_s": samples, "rejected_s": rejected})


def pairs(a: CellTiming, b: CellTiming) -> tuple[FloatArray, FloatArray]:
    """The seconds of two cells of one block in the rounds that both have: for `stats.compare`."""
    first = dict(zip(a.quality["rounds"], a.samples_s, strict=True))
    second = dict(zip(b.quality["rounds"], b.samples_s, strict=True))
    both = sorted(first.keys() & second.keys())
    return np.array([first[i] for i in both]), np.array([second[i] for i in both])


def time_block(
    cells: Sequence[Cell], protocol: Protocol, worker: WorkerProcess | None = None
) -> list[CellTiming]:
    """Time the cells together; the answers are in their order, failures are values.

    Without a worker one is started here and ended. Raises DeviceError when the worker dies with no
    cell in hand, WorkerFailed for a request that it refuses.
    """
    if worker is None:
        with WorkerProcess(threads=protocol.threads) as own:
            return time_block(cells, protocol, own)
    timings: dict[str, CellTiming] = {}
    waiting = list(cells)
    while waiting:
        place: dict[str, Any] = {}
        request = {"cells": [cell.to_json() for cell in waiting], **protocol.to_json()}
        on_cpu = [cell for cell in waiting if not cell.launches]
        compiles = any(cell.kind == "kernel" and not cell.loop for cell in on_cpu)
        needs = {"compiles": compiles, "on_cpu": bool(on_cpu)}
        ready = {"function": "hwmpq.measure.timing:get_ready", "payload": needs}
        worker.call("call", ready, START_DEADLINE_S)
        try:
            reply = worker.call("time", request, protocol.deadline_s, _keep(place))
        except (WorkerCrashed, WorkerTimeout) as error:
            culprit = place.get("key") or (waiting[0].key if len(waiting) == 1 else None)
            if place.get("step") in (None, "lock"):
                raise
            if culprit is None:  # in the middle of the rounds: each alone shows who it was
                for cell in waiting:
                    timings[cell.key] = time_block([cell], protocol, worker)[0]
                break
            reason = cause(error, place["step"], protocol.deadline_s)
            timings[culprit] = CellTiming(culprit, error=reason)
            waiting = [cell for cell in waiting if cell.key != culprit]
        else:
            timings |= {cell.key: _answered(reply, cell.key) for cell in waiting}
            break
    return [timings[cell.key] for cell in cells]


def _answered(reply: Mapping[str, Any], key: str) -> CellTiming:
    """The cell's part of the answer; a time that cannot be one is a failure of the cell.

    Raises DeviceError where there is no such part.
    """
    try:
        (item,) = [item for item in reply["cells"] if item["key"] == key]
        return CellTiming.from_json(item)
    except InputError as error:
        return CellTiming(key, error=f"answer of the worker: {error}")
    except (KeyError, TypeError, ValueError) as error:
        raise DeviceError(f"answer of the worker about {key}", in_words(error)) from None


def _keep(place: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    def note(progress: dict[str, Any]) -> None:
        place.clear()
        place.update(progress)

    return note


def cause(error: WorkerCrashed | WorkerTimeout, step: str, deadline_s: float) -> str:
    """The error of a cell in whose step the worker ended."""
    if isinstance(error, WorkerCrashed):
        return f"crashed: {error.cause} in step {step!r}"
    return f"timed out after {deadline_s:g} s in step {step!r}"


def is_transient(error: str) -> bool:
    """May the same cell come out well the next time? A crash or a time-out may be the machine's."""
    return error.removeprefix("compile: ").startswith(("crashed", "timed out"))
