"""The schedule of a cell: the one that `stages.tuning` timed as the fastest, else the default.

Lowering and pricing both ask here, so what is built is what was priced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hwmpq.formats import Format
from hwmpq.kernels import Call, Kernel, Schedule
from hwmpq.stages.job import Job
from hwmpq.types import Workload, digest


@dataclass(frozen=True)
class Choice:
    """The fastest of the schedules that were timed together."""

    schedule: Schedule
    tried: frozenset[Schedule]


def cell_call(workload: Workload, fmt: Format, threads: int) -> Call:
    """How a layer is called when it is timed: everything in its own activation encoding."""
    own = fmt.activation.name
    residual = own if "add" in workload.epilogue.split("+") else ""
    b = "" if workload.has_weight else fmt.weight.name
    return Call(workload, fmt, own, own, residual, b, threads)


def stored_choice(job: Job, kernel: Kernel, call: Call) -> Choice | None:
    """What the store knows of a cell's schedules."""
    fact = job.store.fact("schedule", _key(job, kernel, call))
    if fact is None:
        return None
    return Choice(Schedule.parse(fact["schedule"]), frozenset(map(Schedule.parse, fact["tried"])))


def keep_choice(
    job: Job, kernel: Kernel, call: Call, schedule: Schedule, tried: Sequence[Schedule]
) -> None:
    """Let the store know the fastest of the schedules that were tried."""
    fact = {"schedule": schedule.text, "tried": [s.text for s in tried]}
    job.store.put_fact("schedule", _key(job, kernel, call), fact)


def timed_kernel(job: Job, kernel: Kernel, workload: Workload, fmt: Format) -> Kernel:
    """The kernel of a layer with the schedule that timing chose, where it chose one."""
    call = cell_call(workload, fmt, job.options.threads)
    choice = stored_choice(job, kernel, call)
    return kernel if choice is None else kernel.scheduled(choice.schedule, call)


def _key(job: Job, kernel: Kernel, call: Call) -> str:
    default = replace(kernel, timed=None)
    return digest(["schedule", default.cell(call), dict(job.target.tvm), job.fingerprint])
