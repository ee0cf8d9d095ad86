"""The schedule of a cell: the one that `stages.tuning` timed as the fastest, else the default.

Lowering and pricing both ask here, so what is built is what was priced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    job.store.put_fact("schedule", _key(job, kernel, call), choice_fact(schedule, tried))


def timed_kernel(job: Job, kernel: Kernel, workload: Workload, fmt: Format) -> Kernel:
    """The kernel of a layer with the schedule that timing chose, where it chose one."""
    call = cell_call(workload, fmt, job.options.threads)
    choice = stored_choice(job, kernel, call)
    return kernel if choice is None else kernel.scheduled(choice.schedule, call)


def choice_fact(schedule: Schedule, tried: Sequence[Schedule]) -> dict[str, Any]:
    """What the store keeps of a choice."""
    return {"schedule": schedule.text, "tried": [s.text for s in tried]}


def choice_key(cell: str, tvm: Mapping[str, Any], fingerprint: str) -> str:
    """The key of a choice. cell: `Kernel.cell` with the default schedule."""
    return digest(["schedule", cell, dict(tvm), fingerprint])


def _key(job: Job, kernel: Kernel, call: Call) -> str:
    default = replace(kernel, timed=None)
    return choice_key(default.cell(call), job.target.tvm, job.fingerprint)
