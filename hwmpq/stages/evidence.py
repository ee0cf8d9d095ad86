"""What a result rests on, for people to check: where the time goes, how far prices were off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from hwmpq.kernels.glue.call import GlueCall
from hwmpq.lower.steps import Step
from hwmpq.search.evaluate import evaluate, index_of
from hwmpq.stages.bench import Attempt, Bench
from hwmpq.stages.ground import Ground
from hwmpq.stages.job import Job
from hwmpq.stages.latency import LatencyFacts
from hwmpq.stages.predicted import foretold
from hwmpq.stages.pricing import price, step_seconds
from hwmpq.stages.result import LayerRow
from hwmpq.stages.walks import calling, schedule_of
from hwmpq.types import Problem


def evidence(bench: Bench, ground: Ground, attempt: Attempt) -> dict[str, Any]:
    """JSON: steps: every kernel call of the artifact, with its seconds as priced and as taken
    inside it; artifacts: all that were timed as a whole, with their prices, losses and bytes;
    cells: measured ones beside what the cost model says of them."""
    return {
        "steps": steps_of(bench.job, ground.latency, attempt),
        "artifacts": _artifacts(bench, ground),
        "cells": [
            {"op": m.workload.op, "format": m.format, "measured_s": m.latency_s, "predicted_s": s}
            for m, s in foretold(bench.job, bench.facts.menu, ground.latency)
        ],
    }


def with_measured(rows: Sequence[LayerRow], steps: Sequence[Mapping[str, Any]]) -> list[LayerRow]:
    """The rows with what each layer took inside the artifact."""
    took = {step["name"]: step["measured_s"] for step in steps if step["kind"] == "layer"}
    return [replace(row, measured_s=took.get(row.name)) for row in rows]


def steps_of(job: Job, facts: LatencyFacts, attempt: Attempt) -> list[dict[str, Any]]:
    """The kernel calls of an artifact in order; measured_s: None where it was not run."""
    steps = calling(schedule_of(job, attempt.made.assignment))
    took: Sequence[float | None] = attempt.own.calls_s or [None] * len(steps)
    return [
        {**_step(step), "predicted_s": _finite(step_seconds(step, facts)), "measured_s": seconds}
        for step, seconds in zip(steps, took, strict=True)
    ]


def _step(step: Step) -> dict[str, str]:
    assert step.call is not None
    if isinstance(step.call, GlueCall):
        kind = "encode" if step.is_encode else "glue"
        return {"name": step.node.name, "kind": kind, "op": step.call.op,
                "format": step.writes.encoding}  # fmt: skip
    call = step.call
    return {"name": step.node.name, "kind": "layer", "op": call.workload.op,
            "format": call.format.name}  # fmt: skip


def _artifacts(bench: Bench, ground: Ground) -> list[dict[str, Any]]:
    """fitted: its time is among those that its price comes from."""
    uniform = {tuple(plan.items()): name for name, plan in bench.uniforms().items()}
    fitted = [
        (uniform.get(tuple(whole.assignment.items()), "mixed"), whole.assignment,
         price(bench.job, whole.assignment, ground.latency), whole.seconds, True)
        for whole in ground.timed
    ]  # fmt: skip
    last = {attempt.made.path: attempt for attempt in bench.history}
    tried = [
        ("tried", a.made.assignment, a.predicted_s, a.own.latency_s, False) for a in last.values()
    ]
    return [
        {"name": name, "predicted_s": _finite(priced), "measured_s": seconds, "fitted": known,
         **_sums(ground.problem, plan)}
        for name, plan, priced, seconds, known in (*fitted, *tried)
    ]  # fmt: skip


def _sums(problem: Problem, plan: Mapping[str, str]) -> dict[str, float | None]:
    """Loss and bytes of a plan; without a loss where one of its cells has none."""
    index = index_of(problem, plan)
    values = evaluate(problem, index)
    known = problem.legal is None or all(problem.legal[i, j] for i, j in enumerate(index))
    return {"loss": float(values.of("loss")) if known else None,
            "nbytes": float(values.of("nbytes"))}  # fmt: skip


def _finite(value: float) -> float | None:
    return float(value) if isfinite(value) else None
