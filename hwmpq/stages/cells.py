"""Cells compiled in a worker here, timed on the job's device, put into the store.

`cell_bench` opens all that takes; a failure is a value like a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq.errors import WorkerCrashed, WorkerFailed, WorkerTimeout
from hwmpq.executor import Pool
from hwmpq.kernels import CODEGEN_VERSION, Call, Kernel
from hwmpq.kernels import glue as glue_kernels
from hwmpq.kernels.glue.call import GlueCall
from hwmpq.kernels.glue.cell import to_json
from hwmpq.measure import (
    Cell,
    CellTiming,
    Protocol,
    WorkerProcess,
    cause,
    static_model,
    time_replicated,
    toolchain,
)
from hwmpq.measure.kernel import export_loop
from hwmpq.measure.protocol import START_DEADLINE_S
from hwmpq.measure.reach import reach
from hwmpq.stages.job import Job
from hwmpq.stages.pool import pool_of
from hwmpq.stages.timing import BEST_OF
from hwmpq.types import Measurement, digest

COMPILE_DEADLINE_S = 180.0
#: What a cell's time means; a store's times of another kind are not looked at.
PROTOCOL = f"cold, least of {BEST_OF} parts"


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


def layer_key(cell: str, tvm: Mapping[str, Any], device: str) -> str:
    """The store's key of a layer's cell. cell: of `Kernel.cell`; tvm: the target's; device: the
    machine's fingerprint."""
    return digest([cell, dict(tvm), PROTOCOL, device])


def glue_key(call: str, tvm: Mapping[str, Any], device: str) -> str:
    """The store's key of a glue kernel. call: of `glue.key`."""
    return digest([call, dict(tvm), PROTOCOL, device])


def circumstances(device: str, target: str, toolchain: Mapping[str, Any]) -> dict[str, str]:
    """The parts of a cell's key beside its call, by name."""
    codegen = str(toolchain.get("codegen", "unknown"))
    return {"fingerprint": device, "target": target, "codegen": codegen}


def glue_fact(
    call: Mapping[str, Any], made: Mapping[str, str], timing: CellTiming | None, error: str = ""
) -> dict[str, Any]:
    """What the store keeps of a timed glue kernel. call: of `glue.cell.to_json`; made: of
    `circumstances`; error: why there is no timing."""
    told = {"call": dict(call), "circumstances": dict(made)}
    if timing is None:
        return {"samples_s": [], "speed_factor": 1.0, "error": error, **told}
    factor = timing.quality.get("speed_factor", 1.0)
    return {"samples_s": list(timing.samples_s), "speed_factor": factor, "error": timing.error,
            **told}  # fmt: skip


def glue_seconds(fact: Mapping[str, Any]) -> float:
    """Seconds of a glue kernel from its fact; one that could not be timed makes every plan that
    needs it unaffordable."""
    samples = fact["samples_s"]
    return float(np.median(samples)) * float(fact["speed_factor"]) if samples else float("inf")


@contextmanager
def cell_bench(job: Job) -> Iterator[CellBench]:
    """What measures the cells of a job."""
    with (
        workers(job) as (compiler, timer),
        replicas(job) as others,
        pool_of(job) as pool,
        tempfile.TemporaryDirectory(prefix="hwmpq-") as folder,
    ):
        _tell_doubts(job, timer)
        builder = Builder(job, compiler, Path(folder), with_loop=job.times_elsewhere, pool=pool)
        yield CellBench(job, builder, timer, job.fingerprint, others)


def protocol_of(job: Job) -> Protocol:
    """How cells are timed."""
    o = job.options
    return Protocol(rounds=9, epoch_s=0.004, threads=o.threads, seed=o.seed, best_of=BEST_OF)


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


class Builder:
    """Compiles cells. worker: compiles one after the other, where there is no pool; with_loop: also
    what calls them, for where they go."""

    def __init__(
        self, job: Job, worker: WorkerProcess, folder: Path, *, with_loop: bool,
        pool: Pool | None = None,
    ):  # fmt: skip
        self.job, self.folder, self.with_loop = job, folder, with_loop
        self.pool = pool or Pool([worker], tries=1)
        self.count = 0

    def layer(self, call: Call, kernel: Kernel, key: str) -> Cell | str:
        """The cell to time, or why there is none."""
        return self.layers([LayerCell(key, call, kernel, failed=False)])[key]

    def layers(self, block: Sequence[LayerCell]) -> dict[str, Cell | str]:
        """Key -> the cell to time, or why there is none."""
        requests = {item.key: self._request(item.call, item.kernel) for item in block}
        return self._compile("hwmpq.kernels.build:compile_cell", requests)

    def glue(self, calls: Mapping[str, GlueCall]) -> dict[str, Cell | str]:
        """Key -> the cell to time, or why there is none."""
        target = self.job.target.name
        requests = {key: {"call": to_json(c), "target": target} for key, c in calls.items()}
        return self._compile("hwmpq.kernels.glue.cell:compile_cell", requests)

    def _request(self, call: Call, kernel: Kernel) -> dict[str, Any]:
        return {
            "kind": "layer", "workload": call.workload.to_json(), "format": call.format.name,
            "x": call.x, "out": call.out, "residual": call.residual, "b": call.b,
            "threads": call.threads, "kernel": kernel.name,
            "schedule": kernel.timed.text if kernel.timed else None,
            "target": self.job.target.name, "seed": 0,
        }  # fmt: skip

    def _compile(
        self, function: str, requests: Mapping[str, dict[str, Any]]
    ) -> dict[str, Cell | str]:
        keys, payloads = list(requests), []
        for request in requests.values():
            self.count += 1
            payloads.append({**request, "folder": str(self.folder / str(self.count))})
        built: dict[str, Cell | str] = {}
        for i, answer in self.pool.map(function, payloads, COMPILE_DEADLINE_S):
            if isinstance(answer, WorkerFailed):
                built[keys[i]] = f"compile: {answer}"
            elif isinstance(answer, WorkerCrashed | WorkerTimeout):
                built[keys[i]] = f"compile: {cause(answer, function, COMPILE_DEADLINE_S)}"
            else:
                built[keys[i]] = self._cell(keys[i], answer, Path(payloads[i]["folder"]))
        return built

    def _cell(self, key: str, answer: Mapping[str, Any], folder: Path) -> Cell:
        names = {"library", "launches", "args", "expected", "atol", "rtol"}
        roles, features = (tuple(answer.get(name, ())) for name in ("roles", "features"))
        given = {name: answer[name] for name in names & answer.keys()}
        cell = Cell(key, roles=roles, features=features, **given)
        if cell.launches or not self.with_loop:
            return cell
        export_loop(folder / "loop", cell.function, len(roles), self.job.target.tvm)
        return replace(cell, loop=str(folder / "loop"))


class CellBench:
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
        built = self.builder.layers(block)
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
        built = self.builder.glue({glue_kernels.key(call): call for call in calls})
        timings = self._timed(built)
        made = circumstances(self.device, self.job.target.name, self.toolchain)
        results = []
        for call in calls:
            key = glue_kernels.key(call)
            cell = built[key]
            error = cell if isinstance(cell, str) else "not timed"
            fact = glue_fact(to_json(call), made, timings.get(key), error)
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
