"""Seconds of every cell, measured on the device and kept in the store.

A layer's cell is (workload with its epilogue, format, kernel, threads): it reads, writes and takes
its residual in the format's own activation encoding, weights cold. A glue kernel is a cell too.

A failure is kept like a time. One that may pass (a crash, a time-out) is tried again by every run,
once; a compile error or wrong numbers come again for the same key, so only `--fresh` tries those.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from hwmpq.formats import format_named
from hwmpq.kernels import glue as glue_kernels
from hwmpq.kernels.glue.call import GlueCall
from hwmpq.measure import is_transient
from hwmpq.stages.cells import LayerCell, cell_bench, glue_key, glue_seconds, layer_key
from hwmpq.stages.job import Job
from hwmpq.stages.menu import Menu
from hwmpq.stages.schedule import cell_call, timed_kernel
from hwmpq.stages.walks import schedules
from hwmpq.types import Measurement, Workload


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
    layers, missing = known_layers(job, menu)
    glue, missing_glue = known_glue(job, menu)
    count = sum(len(block) for block in missing) + len(missing_glue)
    again = sum(item.failed for block in missing for item in block)
    new = 0
    if count and measure:
        if again:
            job.progress.note(f"{again} cells that crashed or timed out before are measured again")
        with (
            job.progress.stage("profile", count) as advance,
            cell_bench(job) as bench,
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


def count_missing(job: Job, menu: Menu) -> int:
    """Cells and glue kernels that `profile` would time."""
    _, blocks = known_layers(job, menu)
    _, glue = known_glue(job, menu)
    return sum(map(len, blocks)) + len(glue)


def measure_cells(
    job: Job, menu: Menu, facts: LatencyFacts, wanted: Collection[tuple[str, str]]
) -> LatencyFacts:
    """The facts with these cells measured, even if --max-time is used up: a plan rests on them.

    wanted: (workload key, format). One that fails then has no time.
    """
    _, missing = known_layers(job, menu)
    blocks = [[item for item in block if item.name in wanted] for block in missing]
    layers, unknown = dict(facts.layers), dict(facts.unknown)
    with (
        job.progress.stage("profile", sum(map(len, blocks))) as advance,
        cell_bench(job) as bench,
    ):
        for block in filter(None, blocks):
            for key, measurement in bench.layers(block):
                layers[key] = measurement
                if measurement.error:
                    unknown[key] = measurement.error
                advance(1)
    new = facts.new_timings + sum(map(len, blocks))
    return replace(facts, layers=layers, unknown=unknown, new_timings=new)


def known_layers(
    job: Job, menu: Menu
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
            key = layer_key(kernel.cell(call), job.target.tvm, job.fingerprint)
            found = job.store.measurement(key)
            if found is not None:
                known[layer.workload.key, name] = found
            if found is None or is_transient(found.error):
                block.append(LayerCell(key, call, kernel, failed=found is not None))
        if block:
            blocks.append(block)
    return known, blocks


def known_glue(job: Job, menu: Menu) -> tuple[dict[str, float], list[GlueCall]]:
    """As `known_layers`; those that move no data are known to take no time."""
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
            fact = job.store.fact("glue", glue_key(key, job.target.tvm, job.fingerprint))
            if fact is not None:
                known[key] = glue_seconds(fact)
            if fact is None or is_transient(fact["error"]):
                missing[key] = step.call
    return known, list(missing.values())


def _chunks(items: list[GlueCall], size: int) -> list[list[GlueCall]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
