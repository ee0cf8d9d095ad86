"""From a job's options to the network that is found for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hwmpq.errors import InputError
from hwmpq.frontend.model import LoadedModel
from hwmpq.graph import network_of
from hwmpq.methods.fliqs.loop import shown
from hwmpq.methods.fliqs.settings import parsed
from hwmpq.methods.fliqs.targets import latency_target
from hwmpq.methods.fliqs_nas.found import Found
from hwmpq.methods.fliqs_nas.prices import Prices, Seconds, foretold
from hwmpq.methods.fliqs_nas.space import ArchitectureSpace, graph_of, space_for
from hwmpq.methods.fliqs_nas.train import DEFAULTS, search
from hwmpq.stages.budget import Latency
from hwmpq.stages.choose import given_limits
from hwmpq.stages.job import (
    Images,
    Job,
    Options,
    Progress,
    classes,
    input_shape,
    load_images,
    open_job,
    train_folder,
    training_images,
)
from hwmpq.stages.menu import make_menu
from hwmpq.stages.predicted import predictor_of
from hwmpq.types import BoolArray


@dataclass(frozen=True, eq=False, kw_only=True)
class Designed(LoadedModel):
    """The network that was found, for the jobs that take a model; job, images: that it is for."""

    found: Found
    job: Job
    images: Images


def design(
    options: Options, progress: Progress, images: Callable[[Job], Images] = load_images,
    model: LoadedModel | None = None,
) -> tuple[Designed, Options]:  # fmt: skip
    """The search of these options, or what is left of it in their folder; and the options of a job
    for what it found, whose budgets are no longer relative to the given model.

    images, model: where they do not come from the options. Raises InputError for a task that is no
    classification, for ties, for budgets that a reward cannot take, for a dry run, and as `search`
    does.
    """
    if options.dry_run:
        raise InputError("--dry-run with the method", options.method, "methods for a given network")
    limit = latency_target(options)
    job = open_job(options, progress, model, here=False)
    with job.store:
        own = images(job)
        budgets = given_limits(job)
        space = _space(job)
        network = network_of(graph_of(space.largest, space.image[1:]))
        menu = make_menu(network, job.target, options.formats, options.pins)
        seconds = None
        if limit is not None:
            seconds = foretold(predictor_of(job), options.threads)
            budgets["latency_s"] = _limit_s(job, limit, seconds)
        prices = Prices(space, menu.formats, seconds)
        found = _searched(job, own, prices, menu.legal & prices.known, budgets)
    example = (job.model.example[0],)
    name = f"{options.model} by {options.method}"
    designed = Designed(
        found.module, example, name, job.model.normalization, space.classes,
        found=found, job=job, images=own,
    )  # fmt: skip
    return designed, absolute(options, budgets, limit)


def absolute(options: Options, budgets: Mapping[str, float], limit: Latency | None) -> Options:
    """The options with budgets that no longer depend on the given model."""
    words = {}
    if "nbytes" in budgets:
        words["max_size"] = f"{budgets['nbytes']:.0f}B"
    if "bops" in budgets:
        words["max_bops"] = f"{budgets['bops'] / 1e6:.6f}M"
    if limit is not None:
        of = "" if limit.statistic == "median" else f"{limit.statistic}:"
        words["latency"] = f"{of}{budgets['latency_s'] * 1e9:.0f}ns"
    return replace(options, **words)  # type: ignore[arg-type]


def _space(job: Job) -> ArchitectureSpace:
    """Raises InputError."""
    o, count = job.options, classes(job)
    if count is None:
        raise InputError(f"outputs of {o.model}", None, "one number per class")
    if o.ties:
        raise InputError("--tie", ", ".join(o.ties), "none", "--train decide=block ties blocks.")
    _, channels, height, width = input_shape(job.graph)
    return space_for((channels, height, width), count)


def _searched(
    job: Job, images: Images, prices: Prices, legal: BoolArray, budgets: Mapping[str, float]
) -> Found:
    """Train, with progress."""
    o = job.options
    settings, data = parsed(o.train, o.seed, DEFAULTS), training_images(job, images)
    asked = [job.target.name, o.threads]
    steps = settings.training(len(data)).steps
    with shown(job.progress, "search for a network", steps) as note:
        return search(
            job.graph, prices, legal, budgets, data, settings, Path(train_folder(o)), asked, note
        )


def _limit_s(job: Job, limit: Latency, seconds: Seconds) -> float:
    """The latency budget in seconds; a relative one is of the given model's layers."""
    if limit.ratio is None:
        assert limit.seconds is not None
        return limit.seconds
    whole = float(seconds([la.workload for la in job.network.layers], [limit.of]).sum())
    if not np.isfinite(whole):
        raise InputError(f"budget relative to {limit.of!r}", "a layer has no kernel for it")
    return limit.ratio * whole
