"""The price of an assignment, and the arrays that the solver needs of it.

plan = overhead · calls + speed · (Σ cells + Σ glue), over the very steps that lowering emits; where
that is not the time, with what steps took inside artifacts (`stages.fit`).

For the solver the glue becomes pairwise: transition[p→c][f_p, f_c] holds the glue between p and c,
and every re-encoding of p's result that c asks for, as a dry walk of the steps finds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hwmpq.kernels import glue as glue_kernels
from hwmpq.kernels.glue.call import GlueCall
from hwmpq.lower.steps import Schedule, Step
from hwmpq.stages.job import Job
from hwmpq.stages.latency import LatencyFacts, layer_place
from hwmpq.stages.menu import Menu
from hwmpq.stages.predicted import sought_s
from hwmpq.stages.walks import calling, kind_of, kinds_of, schedule_of, walked
from hwmpq.types import Network, Transition


def step_seconds(step: Step, facts: LatencyFacts) -> float:
    """Seconds of a step that calls a kernel, with the runtime's overhead; nan when unknown."""
    found = facts.inside.get(place(step))
    if found is not None:
        return found
    if isinstance(step.call, GlueCall):
        seconds = facts.glue.get(glue_kernels.key(step.call), float("nan"))
    else:
        assert step.call is not None
        cell = facts.cell(step.call.workload, step.call.format.name)
        seconds = float("inf") if cell is None or cell.error else cell.latency_s
    return facts.speed * seconds + facts.overhead_s


def place(step: Step) -> str:
    """Where a kernel is called: a layer in a format, or a glue kernel of an operator."""
    if isinstance(step.call, GlueCall):
        return f"{step.node.name} {glue_kernels.key(step.call)}"
    assert step.call is not None
    return layer_place(step.node.name, step.call.format.name)


def price(job: Job, assignment: Mapping[str, str], facts: LatencyFacts) -> float:
    """Predicted seconds of the compiled network under an assignment."""
    steps = calling(schedule_of(job, assignment))
    return sum(step_seconds(step, facts) for step in steps)


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
                own = facts.speed * sought_s(cell) + facts.overhead_s
                latency[i, j] = facts.inside.get(layer_place(layer.name, name), own)
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
    for step in calling(schedule):
        if not isinstance(step.call, GlueCall):
            continue
        seconds = step_seconds(step, facts)
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
