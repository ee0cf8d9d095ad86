"""What every choice rests on: times of whole artifacts, prices fitted on them, the problem.

The closed loop comes back here: `measured` times predicted cells that a plan would rest on, and
`refitted` fits the prices again with the plans that were compiled and timed meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hwmpq.stages.bench import Attempt, Bench, baseline_names
from hwmpq.stages.choose import given_limits, make_problem
from hwmpq.stages.fit import Whole, fit_prices, overhead_key
from hwmpq.stages.latency import LatencyFacts, measure_cells
from hwmpq.stages.pricing import table
from hwmpq.stages.timing import Timed
from hwmpq.types import Problem


@dataclass(frozen=True, eq=False)
class Ground:
    """What every choice rests on. first: the baselines' times; latency: cells with the overhead;
    timed: all artifacts so far, as if in the first run."""

    first: dict[str, Timed]
    latency: LatencyFacts
    problem: Problem
    timed: tuple[Whole, ...]


def survey(bench: Bench) -> Ground:
    """Time the baselines and some random mixed artifacts unless the store knows, fit the prices on
    them, put the problem together.

    The fit is kept in the store, for `hwmpq search`, where it rests on measured cells alone.
    """
    job, facts = bench.job, bench.facts
    first = bench.first_times()
    plans = bench.uniforms() | bench.mixed()
    timed = tuple(_whole(plan, first[name]) for name, plan in plans.items())
    baselines = {name: first[name] for name in baseline_names(facts.menu)}
    ground = _fitted(bench, facts.latency, timed, baselines)
    if all(cell.source == "measured" for cell in facts.latency.layers.values()):
        found = ground.latency
        fit = {"overhead_s": found.overhead_s, "speed": found.speed, "inside": dict(found.inside)}
        job.store.put_fact("overhead", overhead_key(job), fit)
    if ground.latency.inside:
        job.progress.note(
            "the sum of the cells is not the time of the network: steps are priced by what they "
            f"took inside whole artifacts; prices miss by up to {ground.latency.residual:.1%}"
        )
    return ground


def measured(bench: Bench, ground: Ground, plans: Iterable[Mapping[str, str]]) -> Ground | None:
    """The ground with times for the predicted cells that the plans would rest on; None where there
    is no such cell."""
    latency, layers = ground.latency, bench.job.network.layers
    wanted = set()
    for plan in plans:
        for layer in layers:
            cell = latency.cell(layer.workload, plan[layer.name])
            if cell is not None and cell.source == "predicted":
                wanted.add((layer.workload.key, plan[layer.name]))
    if not wanted:
        return None
    bench.job.progress.note(f"{len(wanted)} predicted cells that the best plans rest on are timed")
    with bench.clock.time("profile"):
        latency = measure_cells(bench.job, bench.facts.menu, latency, wanted)
    return _fitted(bench, latency, ground.timed, ground.first)


def refitted(bench: Bench, ground: Ground, attempts: Sequence[Attempt]) -> Ground:
    """The ground with the attempts of one run among the fitted artifacts.

    Their seconds are brought to the first run's by the baselines that were timed beside them.
    """
    scale = float(np.exp(np.mean([
        np.log(ground.first[name].latency_s / attempts[0].timed[name].latency_s)
        for name in ground.first
    ])))  # fmt: skip
    new = tuple(_whole(a.made.assignment, a.own, scale) for a in attempts)
    return _fitted(bench, ground.latency, ground.timed + new, ground.first)


def _whole(plan: Mapping[str, str], timed: Timed, scale: float = 1.0) -> Whole:
    return Whole(dict(plan), scale * timed.latency_s, timed.calls_s)


def _fitted(
    bench: Bench, latency: LatencyFacts, timed: tuple[Whole, ...], first: dict[str, Timed]
) -> Ground:
    job, facts = bench.job, bench.facts
    latency = fit_prices(job, latency, timed)
    with bench.clock.time("search"):
        prices = table(job, facts.menu, latency)
        problem = make_problem(job, facts.menu, facts.loss, prices, given_limits(job))
    return Ground(first, latency, problem, timed)
