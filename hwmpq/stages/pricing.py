"""The price of an assignment, and the arrays that the solver needs of it.

plan = overhead · calls + speed · (Σ cells + Σ glue), over the very steps that lowering emits.

For the solver the glue becomes pairwise: transition[p→c][f_p, f_c] holds the glue between p and c,
and every re-encoding of p's result that c asks for, as a dry walk of the steps finds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import ceil

import numpy as np

from hwmpq.kernels import CODEGEN_VERSION
from hwmpq.kernels import glue as glue_kernels
from hwmpq.kernels.glue.call import GlueCall
from hwmpq.lower.steps import Schedule, Step
from hwmpq.stages.job import Job
from hwmpq.stages.latency import LatencyFacts
from hwmpq.stages.menu import Menu
from hwmpq.stages.predicted import sought_s
from hwmpq.stages.walks import calls_of, kind_of, kinds_of, schedule_of, walked
from hwmpq.types import FloatArray, Network, Transition, digest

#: No price is thought to be closer to the time than this share.
LEAST_RESIDUAL = 0.02


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


def price(job: Job, assignment: Mapping[str, str], facts: LatencyFacts) -> float:
    """Predicted seconds of the compiled network under an assignment."""
    schedule = schedule_of(job, assignment)
    total = sum(step_seconds(step, facts) for step in schedule.steps)
    return total + facts.overhead_s * calls_of(schedule)


def fit_overhead(
    job: Job, facts: LatencyFacts, measured: Sequence[tuple[Mapping[str, str], float]]
) -> LatencyFacts:
    """The overhead per call and the speed that explain measured artifacts best, and how well.

    measured: (assignment, seconds) of uniform and random mixed artifacts. speed is a common factor
    on all cells: clocks and neighbours differ between the hour of the profile and this one, and a
    cell alone does not find the caches as its network leaves them. The overhead is at least 0.
    """
    plain = replace(facts, overhead_s=0.0, speed=1.0)
    rows = []
    for assignment, took in measured:
        schedule = schedule_of(job, assignment)
        total = sum(step_seconds(step, plain) for step in schedule.steps)
        if np.isfinite(total):
            rows.append((float(calls_of(schedule)), total, took))
    if not rows:
        return facts
    overhead, speed, residual = fitted(*np.array(rows).T)
    return replace(facts, overhead_s=overhead, speed=speed, residual=residual)


def fitted(calls: FloatArray, cells: FloatArray, seconds: FloatArray) -> tuple[float, float, float]:
    """(overhead, speed, residual): with an overhead if rows left out are foretold better so, which
    few plans of one network, that all make about as many calls, do not always show."""
    found = []
    for free in (False, True):
        errors = left_out_errors(calls, cells, seconds, free)
        found.append((sum(errors), *least_deviation(calls, cells, seconds, free), bound(errors)))
    _, overhead, speed, residual = min(found)
    return overhead, speed, residual


def least_deviation(
    calls: FloatArray, cells: FloatArray, seconds: FloatArray, free: bool
) -> tuple[float, float]:
    """(a, s) of the least Σ |a · calls + s · cells − seconds| / seconds: s > 0, a ≥ 0, and a = 0
    where it is not free.

    The absolute error, so that one disturbed artifact does not move the fit. Some two rows, or one
    with a = 0, are met exactly by an optimum, so all of those are tried.
    """
    tries = [(0.0, float(t / c)) for c, t in zip(cells, seconds, strict=True)]
    for i, j in combinations(range(len(seconds)), 2) if free else ():
        pair = np.array([[calls[i], cells[i]], [calls[j], cells[j]]])
        if abs(np.linalg.det(pair)) > 1e-9 * calls[i] * cells[j]:
            a, s = np.linalg.solve(pair, seconds[[i, j]])
            if a >= 0 and s > 0:
                tries.append((float(a), float(s)))
    return min(tries, key=lambda t: np.abs((t[0] * calls + t[1] * cells) / seconds - 1).sum())


def left_out_errors(
    calls: FloatArray, cells: FloatArray, seconds: FloatArray, free: bool
) -> list[float]:
    """The relative error of every row by a fit on the others."""
    errors = []
    for out in range(len(seconds)):
        rest = np.arange(len(seconds)) != out
        if rest.any():
            a, s = least_deviation(calls[rest], cells[rest], seconds[rest], free)
            errors.append(float(abs((a * calls[out] + s * cells[out]) / seconds[out] - 1)))
    return errors


def bound(errors: Sequence[float]) -> float:
    """What the error of a further plan is thought to be at most: the 90 % quantile, the largest
    below 10 rows (the jackknife's interval, Barber et al., Annals of Statistics 49, 2021). At least
    LEAST_RESIDUAL."""
    rank = min(ceil(0.9 * (len(errors) + 1)), len(errors))
    return max(sorted(errors)[rank - 1] if errors else 0.0, LEAST_RESIDUAL)


def overhead_key(job: Job) -> str:
    """Under which the store keeps what `fit_overhead` found for a network on a device."""
    return digest(["overhead, speed", CODEGEN_VERSION, job.key, dict(job.target.tvm),
                   job.options.threads, job.fingerprint])  # fmt: skip


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
                latency[i, j] = facts.speed * sought_s(cell) + facts.overhead_s
    kinds = kinds_of(menu)
    column = {name: kind_of(name, kinds) for name in formats}
    walks = {k: walked(job, menu, dict.fromkeys(network.names, k)) for k in kinds}
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
                    walk = walked(
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
