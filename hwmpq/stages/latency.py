"""Seconds of every cell, measured on the device; transitions; the price of an assignment.

A layer's cell is (workload with its epilogue, format, kernel, threads): it reads, writes and takes
its residual in the format's own activation encoding, weights cold. A glue kernel is a cell too.
plan = overhead · calls + Σ cells + Σ glue, walked over the very steps that lowering emits.

For the solver the glue becomes pairwise: transition[p→c][f_p, f_c] holds the glue between p and c,
and every re-encoding of p's result that c asks for, as a dry walk of the steps finds them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq.formats import Format, format_named
from hwmpq.kernels import CODEGEN_VERSION, Call, Kernel
from hwmpq.kernels import glue as glue_kernels
from hwmpq.kernels.glue.call import GlueCall
from hwmpq.kernels.glue.cell import to_json
from hwmpq.lower.steps import Schedule, Step, steps
from hwmpq.measure import (
    Cell,
    Protocol,
    WorkerCrashed,
    WorkerFailed,
    WorkerProcess,
    WorkerTimeout,
    fingerprint,
    time_block,
    toolchain,
)
from hwmpq.stages.job import Job
from hwmpq.stages.menu import Menu
from hwmpq.types import Measurement, Network, Transition, Workload, digest

COMPILE_DEADLINE_S = 180.0


@dataclass(frozen=True, eq=False)
class LatencyFacts:
    """layers: (workload key, format) -> Measurement; glue: call key -> seconds.

    overhead_s: seconds per kernel call that the runtime adds, and speed: factor on every cell, both
    fitted on the uniform artifacts.
    new_timings: cells and glue timed by this run. unknown: why a cell of `layers` has no time.
    """

    layers: dict[tuple[str, str], Measurement]
    glue: dict[str, float]
    overhead_s: float = 0.0
    speed: float = 1.0
    new_timings: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    unknown: dict[tuple[str, str], str] = field(default_factory=dict)

    def cell(self, workload: Workload, fmt: str) -> Measurement | None:
        return self.layers.get((workload.key, fmt))


def cell_call(workload: Workload, fmt: Format, threads: int) -> Call:
    """How a layer is called when it is timed: everything in its own activation encoding."""
    own = fmt.activation.name
    residual = own if "add" in workload.epilogue.split("+") else ""
    b = "" if workload.has_weight else fmt.weight.name
    return Call(workload, fmt, own, own, residual, b, threads)


#: Why a cell was not measured.
TIME_IS_UP = "not measured: --max-time is used up"
NOT_STORED = "not measured yet: run `hwmpq profile`"


def profile(job: Job, menu: Menu, measure: bool = True) -> LatencyFacts:
    """Measure every cell that the store does not know. Each is committed as it is timed.

    Glue comes first and whole: every plan needs it and nothing else tells its time. No block of
    layer cells begins once --max-time is used up. measure: False only reads the store.
    """
    began = time.monotonic()
    device = fingerprint()
    layers, missing = _known_layers(job, menu, device)
    glue, missing_glue = _known_glue(job, menu, device)
    count = sum(len(block) for block in missing) + len(missing_glue)
    new = 0
    if count and measure:
        with (
            job.progress.stage("profile", count) as advance,
            WorkerProcess(job.device.prefix, threads=job.options.threads) as worker,
            tempfile.TemporaryDirectory(prefix="hwmpq-") as folder,
        ):
            bench = _Bench(job, worker, Path(folder), device)
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
            key = item.call.workload.key, item.call.format.name
            if key not in layers:
                unknown[key] = TIME_IS_UP if measure else NOT_STORED
    for key, m in layers.items():
        if m.error:
            failures[f"{m.workload.op} {m.format} {m.kernel}"] = unknown[key] = m.error
    return LatencyFacts(layers, glue, new_timings=new, failures=failures, unknown=unknown)


@dataclass(frozen=True)
class _LayerCell:
    key: str
    call: Call
    kernel: Kernel


def _known_layers(
    job: Job, menu: Menu, device: str
) -> tuple[dict[tuple[str, str], Measurement], list[list[_LayerCell]]]:
    """What the store knows, and blocks (all formats of a workload) of what it does not."""
    known: dict[tuple[str, str], Measurement] = {}
    blocks: list[list[_LayerCell]] = []
    seen: set[str] = set()
    for layer in job.network.layers:
        if layer.workload.key in seen:
            continue
        seen.add(layer.workload.key)
        block = []
        for name, kernel in menu.kernels[layer.name].items():
            call = cell_call(layer.workload, format_named(name), job.options.threads)
            key = digest([kernel.cell(call), dict(job.target.tvm), "cold", device])
            found = job.store.measurement(key)
            if found is None:
                block.append(_LayerCell(key, call, kernel))
            else:
                known[layer.workload.key, name] = found
        if block:
            blocks.append(block)
    return known, blocks


def _known_glue(job: Job, menu: Menu, device: str) -> tuple[dict[str, float], list[GlueCall]]:
    known: dict[str, float] = {}
    missing: dict[str, GlueCall] = {}
    for schedule in _schedules(job, menu):
        for step in schedule.steps:
            if not isinstance(step.call, GlueCall):
                continue
            key = glue_kernels.key(step.call)
            if key in known or key in missing:
                continue
            if glue_kernels.is_view(step.call):
                known[key] = 0.0
                continue
            fact = job.store.fact("glue", _glue_key(job, key, device))
            if fact is None:
                missing[key] = step.call
            else:  # a failure is kept as well: `--fresh` measures again
                samples = fact["samples_s"]
                known[key] = float(np.median(samples)) if samples else float("inf")
    return known, list(missing.values())


def _glue_key(job: Job, key: str, device: str) -> str:
    return digest([key, dict(job.target.tvm), device])


def _schedules(job: Job, menu: Menu) -> list[Schedule]:
    """Dry walks that meet every glue kernel that a mixed assignment may need."""
    kinds = _kinds(menu)
    found = [_walk(job, menu, dict.fromkeys(job.network.names, kind)) for kind in kinds]
    for source, target in _pairs(kinds):
        for parity in (0, 1):
            mixed = {
                name: source if i % 2 == parity else target
                for i, name in enumerate(job.network.names)
            }
            found.append(_walk(job, menu, mixed))
    for source, _, _ in job.network.edges:
        for kind_p, kind_c in _pairs(kinds):
            found.append(
                _walk(job, menu, {**dict.fromkeys(job.network.names, kind_c), source: kind_p})
            )
    return found


def _kinds(menu: Menu) -> list[str]:
    """One format of each distinct pair of operand encodings: the others have the same glue."""
    seen: dict[tuple[str, str], str] = {}
    for name in menu.formats:
        fmt = format_named(name)
        # weights narrower than 8 bit never reach a matmul's second operand
        b = fmt.weight.name if not fmt.is_integer else "s8"
        seen.setdefault((fmt.activation.name, b), name)
    return list(seen.values())


def _pairs(kinds: Sequence[str]) -> list[tuple[str, str]]:
    return [(a, b) for a in kinds for b in kinds if a != b]


def _walk(job: Job, menu: Menu, wanted: Mapping[str, str]) -> Schedule:
    """The steps of an assignment; a layer without a kernel for its format takes fp32."""
    formats = {}
    for name in job.network.names:
        able = menu.kernels[name]
        choice = wanted[name]
        if choice not in able:
            choice = _stand_in(choice, able)
        formats[name] = format_named(choice)
    return steps(job.graph, formats, job.target.vector_bytes, job.options.threads)


def _stand_in(choice: str, able: Mapping[str, Kernel]) -> str:
    """A legal format with the same activation encoding, else fp32."""
    wanted = format_named(choice).activation
    same = [n for n in able if format_named(n).activation == wanted]
    return same[0] if same else "fp32"


def _chunks(items: list[GlueCall], size: int) -> list[list[GlueCall]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


class _Bench:
    """Compiles and times blocks in a worker; a failure is a stored value."""

    def __init__(self, job: Job, worker: WorkerProcess, folder: Path, device: str):
        self.job, self.worker, self.folder, self.device = job, worker, folder, device
        o = job.options
        self.protocol = Protocol(rounds=9, epoch_s=0.004, threads=o.threads, seed=o.seed)
        self.toolchain = toolchain(str(CODEGEN_VERSION))
        self.count = 0

    def _compile(self, function: str, request: dict[str, Any], key: str) -> Cell | str:
        """The cell to time, or why there is none."""
        self.count += 1
        request["folder"] = str(self.folder / str(self.count))
        try:
            answer = self.worker.call(
                "call", {"function": function, "payload": request}, COMPILE_DEADLINE_S
            )
        except (WorkerCrashed, WorkerTimeout, WorkerFailed) as error:
            return f"compile: {error}"
        names = ("library", "args", "expected", "atol", "rtol")
        return Cell(key, roles=tuple(answer["roles"]), **{n: answer[n] for n in names})

    def layers(self, block: list[_LayerCell]) -> list[tuple[tuple[str, str], Measurement]]:
        built: dict[str, Cell | str] = {}
        for item in block:
            c = item.call
            request = {
                "kind": "layer", "workload": c.workload.to_json(), "format": c.format.name,
                "x": c.x, "out": c.out, "residual": c.residual, "b": c.b, "threads": c.threads,
                "kernel": item.kernel.name, "schedule": None, "target": self.job.target.name,
                "seed": 0,
            }  # fmt: skip
            built[item.key] = self._compile("hwmpq.kernels.build:compile_cell", request, item.key)
        cells = [cell for cell in built.values() if isinstance(cell, Cell)]
        timings = {t.key: t for t in time_block(cells, self.protocol, self.worker)} if cells else {}
        results = []
        for item in block:
            cell = built[item.key]
            timing = timings.get(item.key)
            measurement = Measurement(
                item.key, item.call.workload, item.call.format.name, item.kernel.name,
                item.call.threads,
                samples_s=timing.samples_s if timing else (),
                error=cell if isinstance(cell, str) else timing.error if timing else "not timed",
                quality=dict(timing.quality) if timing else {},
            )  # fmt: skip
            self.job.store.put(measurement, self.job.target.name, self.device, self.toolchain)
            results.append(((item.call.workload.key, item.call.format.name), measurement))
        return results

    def glue(self, calls: list[GlueCall]) -> list[tuple[GlueCall, float]]:
        built: dict[str, Cell | str] = {}
        for call in calls:
            request = {"call": to_json(call), "target": self.job.target.name}
            key = glue_kernels.key(call)
            built[key] = self._compile("hwmpq.kernels.glue.cell:compile_cell", request, key)
        cells = [cell for cell in built.values() if isinstance(cell, Cell)]
        timings = {t.key: t for t in time_block(cells, self.protocol, self.worker)} if cells else {}
        results = []
        for call in calls:
            key = glue_kernels.key(call)
            timing = timings.get(key)
            samples = timing.samples_s if timing else ()
            cell = built[key]
            error = cell if isinstance(cell, str) else timing.error if timing else "not timed"
            fact = {"samples_s": list(samples), "error": error, "call": to_json(call)}
            self.job.store.put_fact("glue", _glue_key(self.job, key, self.device), fact)
            # A glue kernel that cannot be timed makes every plan that needs it unaffordable.
            results.append((call, float(np.median(samples)) if samples else float("inf")))
        return results


def step_seconds(step: Step, facts: LatencyFacts) -> float:
    """Seconds of one step, without the runtime's overhead; nan when unknown."""
    if isinstance(step.call, GlueCall):
        return facts.speed * facts.glue.get(glue_kernels.key(step.call), float("nan"))
    if step.call is None:
        return 0.0
    cell = facts.cell(step.call.workload, step.call.format.name)
    if cell is None or cell.error:
        return float("inf")
    return facts.speed * cell.latency_s


def schedule_of(job: Job, assignment: Mapping[str, str]) -> Schedule:
    """The steps of the compiled network under an assignment."""
    formats = {name: format_named(fmt) for name, fmt in assignment.items()}
    return steps(job.graph, formats, job.target.vector_bytes, job.options.threads)


def calls_of(schedule: Schedule) -> int:
    """Kernel calls that remain after views are dropped."""
    return sum(
        1
        for s in schedule.steps
        if s.call is not None
        and not (isinstance(s.call, GlueCall) and glue_kernels.is_view(s.call))
    )


def price(job: Job, assignment: Mapping[str, str], facts: LatencyFacts) -> float:
    """Predicted seconds of the compiled network under an assignment."""
    schedule = schedule_of(job, assignment)
    total = sum(step_seconds(step, facts) for step in schedule.steps)
    return total + facts.overhead_s * calls_of(schedule)


def fit_overhead(
    job: Job, facts: LatencyFacts, measured: Sequence[tuple[Mapping[str, str], float]]
) -> LatencyFacts:
    """The overhead per call, and then the machine's speed, that explain the measured artifacts.

    measured: (assignment, seconds) of the uniform artifacts. The overhead is a least-squares fit,
    at least 0; what it leaves is a common factor on all cells: clocks and neighbours differ between
    the hour of the profile and this one.
    """
    calls, cells, seconds = [], [], []
    for assignment, took in measured:
        schedule = schedule_of(job, assignment)
        total = sum(step_seconds(step, facts) for step in schedule.steps)
        if np.isfinite(total):
            calls.append(calls_of(schedule))
            cells.append(total)
            seconds.append(took)
    if not calls:
        return facts
    n, c, s = np.array(calls, float), np.array(cells), np.array(seconds)
    overhead = max(float((n * (s - c)).sum() / (n * n).sum()), 0.0)
    speed = float(np.median(s / (c + overhead * n)))
    return replace(facts, overhead_s=overhead * speed, speed=facts.speed * speed)


def overhead_key(job: Job) -> str:
    """Under which the store keeps what `fit_overhead` found for a network on a device."""
    return digest(["overhead, speed", CODEGEN_VERSION, job.key, dict(job.target.tvm),
                   job.options.threads, fingerprint()])  # fmt: skip


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """What the solver needs: seconds [L, F], transitions, and what no choice changes; unknown:
    layer -> format -> why there is no time."""

    latency_s: np.ndarray
    transitions: tuple[Transition, ...]
    fixed_s: float
    unknown: dict[str, dict[str, str]] = field(default_factory=dict)


def table(job: Job, menu: Menu, facts: LatencyFacts) -> LatencyTable:
    """Cells, transitions and the fixed part of the network's latency."""
    network, formats = job.network, menu.formats
    latency = np.full((len(network.layers), len(formats)), np.inf)
    for i, layer in enumerate(network.layers):
        for j, name in enumerate(formats):
            cell = facts.cell(layer.workload, name)
            if cell is not None and not cell.error:
                latency[i, j] = facts.speed * cell.latency_s + facts.overhead_s
    kinds = _kinds(menu)
    column = {name: _kind_of(name, kinds) for name in formats}
    walks = {k: _walk(job, menu, dict.fromkeys(network.names, k)) for k in kinds}
    owner = _owners(network)
    for j, name in enumerate(formats):
        entry = _costs(walks[column[name]], facts)
        for i, layer in enumerate(network.layers):
            latency[i, j] += sum(
                seconds for reader, tensor, seconds in entry.encodes
                if reader == layer.name and tensor in job.graph.inputs
            )  # fmt: skip
    between = {name for _, _, glue in network.edges for name in glue}
    entry = _costs(walks[kinds[0]], facts)
    fixed = sum(s for name, s in entry.glue.items() if name not in between)
    transitions = []
    for source, target, glue in network.edges:
        small = {}
        for kind_p in kinds:
            for kind_c in kinds:
                if kind_p == kind_c:
                    walk = walks[kind_c]
                else:
                    walk = _walk(
                        job, menu, {**dict.fromkeys(network.names, kind_c), source: kind_p}
                    )
                small[kind_p, kind_c] = _between(_costs(walk, facts), source, target, glue, owner)
        matrix = np.array([[small[column[a], column[b]] for b in formats] for a in formats])
        if matrix.any():
            transitions.append(Transition(source, target, matrix))
    return LatencyTable(
        latency, tuple(_merged(transitions)), float(fixed), unknown_cells(network, facts)
    )


def unknown_cells(network: Network, facts: LatencyFacts) -> dict[str, dict[str, str]]:
    """Layer -> format -> why its cell has no time."""
    reasons: dict[str, dict[str, str]] = {layer.name: {} for layer in network.layers}
    for layer in network.layers:
        for (workload, fmt), reason in facts.unknown.items():
            if workload == layer.workload.key:
                reasons[layer.name][fmt] = reason
    return reasons


def _kind_of(name: str, kinds: Sequence[str]) -> str:
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


@dataclass(frozen=True)
class _Costs:
    """glue: node -> seconds; encodes: (first reader, tensor, seconds)."""

    glue: dict[str, float]
    encodes: list[tuple[str, str, float]]


def _costs(schedule: Schedule, facts: LatencyFacts) -> _Costs:
    glue: dict[str, float] = {}
    encodes = []
    for step in schedule.steps:
        if not isinstance(step.call, GlueCall) or glue_kernels.is_view(step.call):
            continue
        seconds = step_seconds(step, facts) + facts.overhead_s
        if step.is_encode:
            encodes.append((step.node.name, step.writes.tensor, seconds))
        else:
            glue[step.node.name] = glue.get(step.node.name, 0.0) + seconds
    return _Costs(glue, encodes)


def _owners(network: Network) -> dict[str, tuple[str, str]]:
    """Glue node -> the edge that pays for it, so that it is counted once."""
    owner: dict[str, tuple[str, str]] = {}
    for source, target, glue in network.edges:
        for name in glue:
            owner.setdefault(name, (source, target))
    return owner


def _between(
    costs: _Costs, source: str, target: str, glue: Sequence[str],
    owner: Mapping[str, tuple[str, str]],
) -> float:  # fmt: skip
    edge = (source, target)
    total = sum(costs.glue.get(name, 0.0) for name in glue if owner[name] == edge)
    chain = {source, *glue}
    readers = {target, *glue}
    total += sum(s for reader, tensor, s in costs.encodes if tensor in chain and reader in readers)
    return total


def _merged(transitions: Sequence[Transition]) -> list[Transition]:
    """One matrix per pair of layers."""
    found: dict[tuple[str, str], Transition] = {}
    for item in transitions:
        key = (item.source, item.target)
        if key in found:
            item = Transition(*key, found[key].latency_s + item.latency_s)
        found[key] = item
    return list(found.values())
