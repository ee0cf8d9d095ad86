"""Dry walks: the steps that lowering emits for an assignment, without compiling anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hwmpq.formats import format_named
from hwmpq.kernels import Kernel
from hwmpq.kernels import glue as glue_kernels
from hwmpq.kernels.glue.call import GlueCall
from hwmpq.lower.steps import Schedule, Step, steps
from hwmpq.stages.job import Job
from hwmpq.stages.menu import Menu


def schedule_of(job: Job, assignment: Mapping[str, str]) -> Schedule:
    """The steps of the compiled network under an assignment."""
    formats = {name: format_named(fmt) for name, fmt in assignment.items()}
    return steps(job.graph, formats, job.target, job.options.threads)


def calling(schedule: Schedule) -> list[Step]:
    """The steps that call a kernel: no constants, operators that we know nothing of, or views."""
    return [
        step
        for step in schedule.steps
        if step.call is not None
        and not (isinstance(step.call, GlueCall) and glue_kernels.is_view(step.call))
    ]


def schedules(job: Job, menu: Menu) -> list[Schedule]:
    """Dry walks that meet every glue kernel that a mixed assignment may need."""
    kinds = kinds_of(menu)
    found = [walked(job, menu, dict.fromkeys(job.network.names, kind)) for kind in kinds]
    for source, target in pairs_of(kinds):
        for parity in (0, 1):
            mixed = {
                name: source if i % 2 == parity else target
                for i, name in enumerate(job.network.names)
            }
            found.append(walked(job, menu, mixed))
    for source, _, _ in job.network.edges:
        for kind_p, kind_c in pairs_of(kinds):
            found.append(
                walked(job, menu, {**dict.fromkeys(job.network.names, kind_c), source: kind_p})
            )
    return found


def kinds_of(menu: Menu) -> list[str]:
    """One format of each distinct pair of operand encodings: the others have the same glue."""
    seen: dict[tuple[str, str], str] = {}
    for name in menu.formats:
        fmt = format_named(name)
        # weights narrower than 8 bit never reach a matmul's second operand
        b = fmt.weight.name if not fmt.is_integer else "s8"
        seen.setdefault((fmt.activation.name, b), name)
    return list(seen.values())


def pairs_of(kinds: Sequence[str]) -> list[tuple[str, str]]:
    return [(a, b) for a in kinds for b in kinds if a != b]


def walked(job: Job, menu: Menu, wanted: Mapping[str, str]) -> Schedule:
    """The steps of an assignment; a layer without a kernel for its format takes fp32."""
    formats = {}
    for name in job.network.names:
        able = menu.kernels[name]
        choice = wanted[name]
        if choice not in able:
            choice = _stand_in(choice, able)
        formats[name] = format_named(choice)
    return steps(job.graph, formats, job.target, job.options.threads)


def kind_of(name: str, kinds: Sequence[str]) -> str:
    """The one of `kinds` that has the same glue as the format; itself where there is none."""
    fmt = format_named(name)
    for kind in kinds:
        other = format_named(kind)
        same_weight = fmt.is_integer or fmt.weight == other.weight
        if (
            other.activation == fmt.activation
            and other.is_integer == fmt.is_integer
            and same_weight
        ):
            return kind
    return name


def _stand_in(choice: str, able: Mapping[str, Kernel]) -> str:
    """A legal format with the same activation encoding, else fp32."""
    wanted = format_named(choice).activation
    same = [n for n in able if format_named(n).activation == wanted]
    return same[0] if same else "fp32"
