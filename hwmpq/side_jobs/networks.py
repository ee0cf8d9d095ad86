"""The measured cells of whole networks, for the judgement of a cost model. Reads the store only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hwmpq import zoo
from hwmpq.predict.levels import Net
from hwmpq.predict.rows import Row
from hwmpq.quantize.blocks import block_ends
from hwmpq.stages.job import Job, Options, Progress, Silent, open_job
from hwmpq.stages.latency import profile
from hwmpq.stages.menu import make_menu


def measured_networks(
    models: Sequence[str], options: Options, progress: Progress | None = None
) -> list[Net]:
    """The cells of each model that the store has for this machine and the options' threads.

    Raises InputError for a model with a layer of which no cell was measured.
    """
    nets = []
    for model in models:
        job = open_job(replace(options, model=model), progress or Silent())
        with job.store:
            nets.append(_net(job))
    return nets


def _net(job: Job) -> Net:
    facts = profile(job, make_menu(job.network, job.target), measure=False)
    cells: dict[str, dict[str, Row]] = {}
    for (workload, name), m in facts.layers.items():
        if not m.error and m.source == "measured" and not m.quality.get("schedule"):
            row = Row(
                m.workload, m.format, m.kernel, m.threads, m.latency_s, samples_s=tuple(m.steady_s)
            )
            cells.setdefault(workload, {})[name] = row
    nodes = [node.name for node in job.graph.nodes]
    places = [nodes.index(layer.name) for layer in job.network.layers]
    kind, _, name = job.options.model.partition(":")
    entry = zoo.ENTRIES.get(name) if kind == "zoo" else None
    return Net(
        job.options.model,
        entry.definition.partition(":")[0] if entry else "",
        tuple(cells.get(layer.workload.key, {}) for layer in job.network.layers),
        tuple(int(n) for n in np.searchsorted(block_ends(job.graph), places, "right")),
    )
