"""The whole curve of a model; nothing is compiled but the uniform artifacts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq import methods
from hwmpq.measure import WorkerProcess
from hwmpq.pipeline import gather
from hwmpq.stages import budget as budgets
from hwmpq.stages.bench import Bench, Clock, limit_seconds
from hwmpq.stages.cells import timer
from hwmpq.stages.choose import frontier_rows, walk_frontier, within
from hwmpq.stages.facts import Facts
from hwmpq.stages.ground import survey
from hwmpq.stages.job import Job, Options, Progress, Silent, load_images, open_job
from hwmpq.stages.verify import float_logits, simulated

#: Plans of a frontier whose accuracy is simulated.
JUDGED = 8


def frontier_model(options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """Least loss for every latency within the budgets, with sizes and simulated accuracies.

    Raises InfeasibleError when no plan is within them.
    """
    options = methods.settle(options)
    limit = budgets.parse_latency(options.latency)
    budgets.parse_sums(options.max_size, options.max_bops)
    clock = Clock()
    with clock.time("trace"):
        job = open_job(options, progress or Silent())
    with job.store:
        facts = gather(job, clock, load_images(job))
        with (
            tempfile.TemporaryDirectory(prefix="hwmpq-") as folder,
            timer(job, WorkerProcess) as worker,
        ):
            ground = survey(Bench(job, facts, clock, Path(folder), worker, limit))
        seconds = limit_seconds(limit, ground.first)
        with clock.time("search"):
            points = walk_frontier(job, within(ground.problem, seconds))
        rows = frontier_rows(points)
        with clock.time("verify"):
            metric, reference = _judge_some(job, facts, rows)
    return {
        "version": 1, "model": options.model, "target": job.target.name, "device": job.device.name,
        "threads": options.threads, "seed": options.seed, "frontier": rows,
        "budget": {"latency_s": seconds, "nbytes": None, **ground.problem.budgets},
        "baselines": {n: {"latency_s": t.latency_s} for n, t in ground.first.items()},
        "accuracy": {"metric": metric, "float": reference, "n": len(facts.images.holdout)},
        "overhead_s": ground.latency.overhead_s, "estimator": facts.loss.estimator,
        "new_timings": ground.latency.new_timings, "failures": ground.latency.failures,
        "data": facts.images.split, "seconds": clock.seconds,
        **facts.cache,
    }  # fmt: skip


def _judge_some(job: Job, facts: Facts, rows: list[dict[str, Any]]) -> tuple[str, float]:
    """Add accuracy and drop on the held-out images to at most JUDGED plans, evenly spread; returns
    the metric and float's score."""
    holdout = facts.images.holdout
    reference = float_logits(job, holdout, "held-out images")
    metric, score = "", 0.0
    for i in np.unique(np.linspace(0, len(rows) - 1, min(JUDGED, len(rows))).astype(int)):
        found = simulated(job, rows[i]["assignment"], facts.quantizers, holdout, reference)
        rows[i] |= {"accuracy": found.simulated, "drop": found.drop}
        metric, score = found.metric, found.float
    return metric, score
