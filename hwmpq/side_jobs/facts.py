"""Seconds and losses of every cell, into the store."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from hwmpq import methods
from hwmpq.formats import format_named
from hwmpq.stages.facts import calibrate, monotone_violations, sensitivities
from hwmpq.stages.job import Job, Options, Progress, Silent, load_images, open_job
from hwmpq.stages.latency import LatencyFacts, profile
from hwmpq.stages.menu import Menu, make_menu
from hwmpq.stages.pricing import unknown_cells
from hwmpq.stages.reuse import explained
from hwmpq.stages.schedule import timed_kernel
from hwmpq.stages.tuning import tune
from hwmpq.types import FloatArray


def profile_model(options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """Measure every layer in every format, and the glue; each time is saved at once.

    With options.tune, first so many schedules of each.
    """
    job = open_job(options, progress or Silent())
    with job.store:
        menu = make_menu(job.network, job.target, options.formats, options.pins)
        cache = explained(job, menu)
        tuned = tune(job, menu, options.tune)
        facts = profile(job, menu)
        schedules = _schedules(job, menu)
    return {
        "version": 1, "model": options.model, "layers": list(job.network.names),
        "formats": list(menu.formats), "latency_s": _times(job, menu, facts),
        "why_not": _reasons(job, menu, facts), "glue": len(facts.glue),
        "schedules": schedules, "tuned": tuned,
        "new_timings": facts.new_timings, "failures": facts.failures, "target": job.target.name,
        "threads": options.threads, "fingerprint": job.fingerprint,
        **cache,
    }  # fmt: skip


def _times(job: Job, menu: Menu, facts: LatencyFacts) -> dict[str, dict[str, float]]:
    """Layer -> format -> seconds of its cell."""
    times: dict[str, dict[str, float]] = {}
    for layer in job.network.layers:
        cells = {fmt: facts.cell(layer.workload, fmt) for fmt in menu.formats}
        times[layer.name] = {f: c.latency_s for f, c in cells.items() if c and not c.error}
    return times


def _schedules(job: Job, menu: Menu) -> dict[str, dict[str, str]]:
    """Layer -> format -> schedule, where timing chose another than the default."""
    found: dict[str, dict[str, str]] = {}
    for layer in job.network.layers:
        for name, kernel in menu.kernels[layer.name].items():
            schedule = timed_kernel(job, kernel, layer.workload, format_named(name)).timed
            if schedule is not None:
                found.setdefault(layer.name, {})[name] = schedule.text
    return found


def _reasons(job: Job, menu: Menu, facts: LatencyFacts) -> dict[str, dict[str, str]]:
    """Layer -> format -> why it may not be chosen."""
    unknown = unknown_cells(job.network, facts)
    return {name: menu.reasons[name] | unknown[name] for name in job.network.names}


def sensitivity_model(
    options: Options, progress: Progress | None = None, name: str | None = None
) -> dict[str, Any]:
    """loss[L][F] by an estimator, kept in the store; None where no kernel of the target runs it.

    name: of the estimator; else the options'. The target need not be this machine.
    """
    options = methods.settle(replace(options, sensitivity=name or options.sensitivity))
    job = open_job(options, progress or Silent(), here=False)
    with job.store:
        images = load_images(job)
        menu = make_menu(job.network, job.target, options.formats, options.pins, options.ties)
        cache = explained(job, menu, images, times=False)
        found = sensitivities(job, images, menu, calibrate(job, images, menu))
    return {
        "version": 1, "model": options.model, "target": job.target.name,
        "layers": list(found.layers), "formats": list(found.formats),
        "loss": _numbers(found.loss), "loss_error": _numbers(found.loss_error),
        "pair_loss": _numbers(found.pair_loss), "pair_error": _numbers(found.pair_error),
        "estimator": found.estimator, "samples": found.samples, "metric": found.metric,
        "layer_runs": found.layer_runs,
        "layer_runs_without_reuse": found.layer_runs_without_reuse,
        "not_monotone": list(monotone_violations(found)), "data": images.split,
        **cache,
    }  # fmt: skip


def _numbers(array: FloatArray | None) -> list[list[float | None]] | None:
    """A matrix as JSON; None for what is not known."""
    if array is None:
        return None
    return [[float(x) if np.isfinite(x) else None for x in row] for row in array]
