"""Seconds of every cell, measured on the device and kept in the store.

A layer's cell is (workload with its epilogue, format, kernel, threads): it reads, writes and takes
its residual in the format's own activation encoding, weights cold. A glue kernel is a cell too.

A failure is kept like a time. One that may pass (a crash, a time-out) is tried again by every run,
once; a compile error or wrong numbers come again for the same key, so only `--fresh` tries those.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq.formats import format_named
from hwmpq.kernels import CODEGEN_VERSION, Call, Kernel
from hwmpq.kernels import glue as glue_kernels
from hwmpq.kernels.glue.call import GlueCall
from hwmpq.kernels.glue.cell import to_json
from hwmpq.measure import (
    Cell,
    CellTiming,
    Protocol,
    WorkerCrashed,
    WorkerFailed,
    WorkerProcess,
    WorkerTimeout,
    cause,
    is_transient,
    static_model,
    time_replicated,
    toolchain,
)
from hwmpq.measure.kernel import export_loop
from hwmpq.measure.protocol import START_DEADLINE_S
from hwmpq.measure.reach import reach
from hwmpq.stages.job import Job
from hwmpq.stages.menu import Menu
from hwmpq.stages.schedule import cell_call, timed_kernel
from hwmpq.stages.walks import schedules
from hwmpq.types import Measurement, Workload, digest

COMPILE_DEADLINE_S = 180.0


@dataclass(frozen=True, eq=False)
class LatencyFacts:
    """layers: (workload key, format) -> Measurement; glue: call key -> seconds.

    overhead_s: seconds per kernel call that the runtime adds, and speed: factor on every cell, both
    fitted on whole artifacts; inside: a step's place in the network (`pricing.place`) -> seconds
    that it took inside them, where these take the place of the cell's; residual: relative error of
    a price, from artifacts left out of that.
    new_timings: cells and glue timed by this run. unknown: why a cell of `layers` has no time.
    """

    layers: dict[tuple[str, str], Measurement]
    glue: dict[str, float]
    overhead_s: float = 0.0
    speed: float = 1.0
    inside: Mapping[str, float] = field(default_factory=dict)
    residual: float = 0.0
    new_timings: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    unknown: dict[tuple[str, str], str] = field(default_factory=dict)

    def cell(self, workload: Workload, fmt: str) -> Measurement | None:
        return self.layers.get((workload.key, fmt))


def layer_place(layer: str, fmt: str) -> str:
    """A layer's name in `LatencyFacts.inside`."""
    return f"{layer} {fmt}"


#: Why a cell was not measured.
TIME_IS_UP = "not measured: --max-time is used up"
NOT_STORED = "not measured yet: run `hwmpq profile`"


def profile(job: Job, menu: Menu, measure: bool = True) -> LatencyFacts:
    """Measure every cell that the store does not know. Each is committed as it is timed.

    Glue comes first and whole: every plan needs it and nothing else tells its time. No block of
    layer cells begins once --max-time is used up. measure: False only reads the store.
    """
    began = time.monotonic()
    device = job.fingerprint
    layers, missing = _known_layers(job, menu, device)
    glue, missing_glue = _known_glue(job, menu, device)
    count = sum(len(block) for block in missing) + len(missing_glue)
    again = sum(item.failed for block in missing for item in block)
    new = 0
    if count and measure:
        if again:
            job.progress.note(f"{again} cells that crashed or timed out before are measured again")
        with (
            job.progress.stage("profile", count) as advance,
            _bench(job) as bench,
        ):
            for part in _chunks(missing_glue, 8):
                for call, seconds in bench.glue(part):
                    glue[glue_kernels.key(call)] = seconds
                    new += 1
                    advance(1)
            for block in missing:
                if job.options.max_time and time.monotonic() - began >= job.options.max_time:
                    job.progress.note(f"--max-time is used up: {count - new} cells not measured")
                    break
                for key, measurement in bench.layers(block):
                    layers[key] = measurement
                    new += 1
                    advance(1)
    failures: dict[str, str] = {}
    unknown: dict[tuple[str, str], str] = {}
    for block in missing:
        for item in block:
            if item.name not in layers:
                unknown[item.name] = TIME_IS_UP if measure else NOT_STORED
    for key, m in layers.items():
        if m.error:
            failures[f"{m.workload.op} {m.format} {m.kernel}"] = unknown[key] = m.error
    return LatencyFacts(layers, glue, new_timings=new, failures=failures, unknown=unknown)


def measure_cells(
    job: Job, menu: Menu, facts: LatencyFacts, wanted: Collection[tuple[str, str]]
) -> LatencyFacts:
    """The facts with these cells measured, even if --max-time is used up: a plan rests on them.

    wanted: (workload key, format). One that fails then has no time.
    """
    _, missing = _known_layers(job, menu, job.fingerprint)
    blocks = [[item for item in block if item.name in wanted] for block in missing]
    layers, unknown = dict(facts.layers), dict(facts.unknown)
    with (
        job.progress.stage("profile", sum(map(len, blocks))) as advance,
        _bench(job) as bench,
    ):
        for block in filter(None, blocks):
            for key, measurement in bench.layers(block):
                layers[key] = measurement
                if measurement.error:
                    unknown[key] = measurement.error
                advance(1)
    new = facts.new_timings + sum(map(len, blocks))
    return replace(facts, layers=layers, unknown=unknown, new_timings=new)


@contextmanager
def _bench(job: Job) -> Iterator[Bench]:
    """What measures the cells of a job."""
    with (
        workers(job) as (compiler, timer),
        replicas(job) as others,
        tempfile.TemporaryDirectory(prefix="hwmpq-") as folder,
    ):
        _tell_doubts(job, timer)
        builder = Builder(job, compiler, Path(folder), with_loop=job.times_elsewhere)
        yield Bench(job, builder, timer, job.fingerprint, others)


@dataclass(frozen=True)
class LayerCell:
    """A cell to measure. failed: it was tried before."""

    key: str
    call: Call
    kernel: Kernel
    failed: bool

    @property
    def name(self) -> tuple[str, str]:
        """Workload key and format: its place in LatencyFacts.layers."""
        return self.call.workload.key, self.call.format.name


def _known_layers(
    job: Job, menu: Menu, device: str
) -> tuple[dict[tuple[str, str], Measurement], list[list[LayerCell]]]:
    """What the store knows, and blocks (all formats of a workload) of what is to be measured.

    A failure that may pass is in both: it stands unless this run gets further.
    """
    known: dict[tuple[str, str], Measurement] = {}
    blocks: list[list[LayerCell]] = []
    seen: set[str] = set()
    for layer in job.network.layers:
        if layer.workload.key in seen:
            continue
        seen.add(layer.workload.key)
        block = []
        for name, kernel in menu.kernels[layer.name].items():
            fmt = format_named(name)
            call = cell_call(layer.workload, fmt, job.options.threads)
            kernel = timed_kernel(job, kernel, layer.workload, fmt)
            key = layer_key(kernel.cell(call), job.target.tvm, device)
            found = job.store.measurement(key)
            if found is not None:
                known[layer.workload.key, name] = found
            if found is None or is_transient(found.error):
                block.append(LayerCell(key, call, kernel, failed=found is not None))
        if block:
            blocks.append(block)
    return known, blocks


def _known_glue(job: Job, menu: Menu, device: str) -> tuple[dict[str, float], list[GlueCall]]:
    known: dict[str, float] = {}
    missing: dict[str, GlueCall] = {}
    for schedule in schedules(job, menu):
        for step in schedule.steps:
            if not isinstance(step.call, GlueCall):
                continue
            key = glue_kernels.key(step.call)
            if key in known or key in missing:
                continue
            if glue_kernels.is_view(step.call):
                known[key] = 0.0
                continue
            fact = job.store.fact("glue", glue_key(key, job.target.tvm, device))
            if fact is not None:
                known[key] = glue_seconds(fact)
            if fact is None or is_transient(fact["error"]):
                missing[key] = step.call
    return known, list(missing.values())


def layer_key(cell: str, tvm: Mapping[str, Any], device: str) -> str:
    """The store's key of a layer's cell. cell: of `Kernel.cell`; tvm: the target's; device: the
    machine's fingerprint."""
    return digest([cell, dict(tvm), "cold", device])


def glue_key(call: str, tvm: Mapping[str, Any], device: str) -> str:
    """The store's key of a glue kernel. call: of `glue.key`."""
    return digest([call, dict(tvm), device])


def glue_fact(
    call: Mapping[str, Any], timing: CellTiming | None, error: str = ""
) -> dict[str, Any]:
    """What the store keeps of a timed glue kernel. call: of `glue.cell.to_json`; error: why there
    is no timing."""
    if timing is None:
        return {"samples_s": [], "speed_factor": 1.0, "error": error, "call": dict(call)}
    factor = timing.quality.get("speed_factor", 1.0)
    return {"samples_s": list(timing.samples_s), "speed_factor": factor, "error": timing.error,
            "call": dict(call)}  # fmt: skip


def glue_seconds(fact: Mapping[str, Any]) -> float:
    """Seconds of a glue kernel from its fact; one that could not be timed makes every plan that
    needs it unaffordable."""
    samples = fact["samples_s"]
    return float(np.median(samples)) * float(fact["speed_factor"]) if samples else float("inf")


def protocol_of(job: Job) -> Protocol:
    """How cells are timed."""
    o = job.options
    return Protocol(rounds=9, epoch_s=0.004, threads=o.threads, seed=o.seed)


@contextmanager
def workers(job: Job) -> Iterator[tuple[WorkerProcess, WorkerProcess]]:
    """Who compiles, always here, and who times: on a device of this machine the same worker."""
    prefix = () if job.device.remote else job.device.start
    with WorkerProcess(prefix, threads=job.options.threads) as here:
        if not job.times_elsewhere:
            yield here, here
            return
        with timer(job, WorkerProcess) as worker:
            yield here, worker


@contextmanager
def replicas(job: Job) -> Iterator[tuple[WorkerProcess, ...]]:
    """The further workers that time every cell: --processes less the one there always is. An
    estimate is the same in all."""
    with ExitStack() as stack:
        yield tuple(
            stack.enter_context(timer(job, WorkerProcess))
            for _ in range(0 if job.estimated else job.options.processes - 1)
        )


def _tell_doubts(job: Job, worker: WorkerProcess) -> None:
    """Say before timing what speaks against the times of the machine."""
    if job.estimated:
        return
    ready = {"function": "hwmpq.measure.timing:get_ready", "payload": {"compiles": False}}
    for doubt in worker.call("call", ready, START_DEADLINE_S)["doubts"]:
        job.progress.note(f"{job.device.name}: {doubt}")


def timer(job: Job, local: Callable[..., WorkerProcess] = WorkerProcess) -> WorkerProcess:
    """The worker that times on the job's device. local: makes one on this machine."""
    if job.device.remote:
        meant = job.device if job.estimated else replace(job.device, fingerprint=job.fingerprint)
        return reach(meant, threads=job.options.threads)
    return local(job.device.start, threads=job.options.threads)


def _chunks(items: list[GlueCall], size: int) -> list[list[GlueCall]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


class Builder:
    """Compiles cells in a worker here. with_loop: also what calls them, for where they go."""

    def __init__(self, job: Job, worker: WorkerProcess, folder: Path, *, with_loop: bool):
        self.job, self.worker, self.folder, self.with_loop = job, worker, folder, with_loop
        self.count = 0

    def layer(self, call: Call, kernel: Kernel, key: str) -> Cell | str:
        """The cell to time, or why there is none."""
        request = {
            "kind": "layer", "workload": call.workload.to_json(), "format": call.format.name,
            "x": call.x, "out": call.out, "residual": call.residual, "b": call.b,
            "threads": call.threads, "kernel": kernel.name,
            "schedule": kernel.timed.text if kernel.timed else None,
            "target": self.job.target.name, "seed": 0,
        }  # fmt: skip
        return self._compile("hwmpq.kernels.build:compile_cell", request, key)

    def glue(self, call: GlueCall, key: str) -> Cell | str:
        """The cell to time, or why there is none."""
        request = {"call": to_json(call), "target": self.job.target.name}
        return self._compile("hwmpq.kernels.glue.cell:compile_cell", request, key)

    def _compile(self, function: str, request: dict[str, Any], key: str) -> Cell | str:
        self.count += 1
        folder = self.folder / str(self.count)
        request["folder"] = str(folder)
        try:
            answer = self.worker.call(
                "call", {"function": function, "payload": request}, COMPILE_DEADLINE_S
            )
        except WorkerFailed as error:
            return f"compile: {error}"
        except (WorkerCrashed, WorkerTimeout) as error:
            return f"compile: {cause(error, function, COMPILE_DEADLINE_S)}"
        names = ("library", "args", "expected", "atol", "rtol")
        roles, features = (tuple(answer.get(name, ())) for name in ("roles", "features"))
        cell = Cell(key, roles=roles, features=features, **{n: answer[n] for n in names})
        if not self.with_loop:
            return cell
        export_loop(folder / "loop", cell.function, len(roles), self.job.target.tvm)
        return replace(cell, loop=str(folder / "loop"))


class Bench:
    """Compiles and times blocks; a failure is a stored value. others: workers that time each block
    too, and share its rounds."""

    def __init__(
        self, job: Job, builder: Builder, worker: WorkerProcess, device: str,
        others: Sequence[WorkerProcess] = (),
    ):  # fmt: skip
        self.job, self.builder, self.worker, self.device = job, builder, worker, device
        self.others = others
        self.protocol = protocol_of(job)
        self.toolchain = toolchain(str(CODEGEN_VERSION))

    def layers(self, block: list[LayerCell]) -> list[tuple[tuple[str, str], Measurement]]:
        built: dict[str, Cell | str] = {}
        for item in block:
            built[item.key] = self.builder.layer(item.call, item.kernel, item.key)
        timings = self._timed(built)
        results = []
        for item in block:
            cell = built[item.key]
            timing = timings.get(item.key)
            measurement = Measurement(
                item.key, item.call.workload, item.call.format.name, item.kernel.name,
                item.call.threads,
                samples_s=timing.samples_s if timing else (),
                error=cell if isinstance(cell, str) else timing.error if timing else "not timed",
                source=static_model.SOURCE if self.job.estimated else "measured",
                quality=_quality(item.kernel, timing),
            )  # fmt: skip
            self.job.store.put(measurement, self.job.target.name, self.device, self.toolchain)
            results.append((item.name, measurement))
        return results

    def glue(self, calls: list[GlueCall]) -> list[tuple[GlueCall, float]]:
        built: dict[str, Cell | str] = {}
        for call in calls:
            key = glue_kernels.key(call)
            built[key] = self.builder.glue(call, key)
        timings = self._timed(built)
        results = []
        for call in calls:
            key = glue_kernels.key(call)
            cell = built[key]
            error = cell if isinstance(cell, str) else "not timed"
            fact = glue_fact(to_json(call), timings.get(key), error)
            self.job.store.put_fact("glue", glue_key(key, self.job.target.tvm, self.device), fact)
            results.append((call, glue_seconds(fact)))
        return results

    def _timed(self, built: Mapping[str, Cell | str]) -> dict[str, CellTiming]:
        """The timings of those that were built, by their keys."""
        cells = [cell for cell in built.values() if isinstance(cell, Cell)]
        if not cells:
            return {}
        if self.job.estimated:
            return {t.key: t for t in static_model.time_cells(cells, self.job.target)}
        workers = (self.worker, *self.others)
        return {t.key: t for t in time_replicated(cells, self.protocol, workers)}


def _quality(kernel: Kernel, timing: CellTiming | None) -> dict[str, Any]:
    """What is kept beside the samples; schedule: where it is not the default one."""
    schedule = {"schedule": kernel.timed.text} if kernel.timed else {}
    return {**(timing.quality if timing else {}), **schedule}
