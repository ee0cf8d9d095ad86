"""What a run would do, and in about how many minutes: nothing is timed, compiled or stored."""

from __future__ import annotations

from collections.abc import Mapping

from hwmpq.stages.bench import MIXED, baseline_names
from hwmpq.stages.facts import calibrate, foreseen
from hwmpq.stages.job import Images, Job
from hwmpq.stages.latency import count_missing
from hwmpq.stages.menu import make_menu
from hwmpq.stages.result import LayerRow, Result
from hwmpq.stages.reuse import explained

#: Seconds to compile and time a cell, and to compile a layer of an artifact, as on a core of a
#: Zen 3 at 3 GHz. An answer of this file is right to a factor of two, not better.
CELL_S, LAYER_S = 1.0, 0.25
#: Plans that a search compiles as a rule: three in a round, two rounds.
PLANS = 6


def forecast(job: Job, images: Images, spent: Mapping[str, float]) -> Result:
    """spent: seconds so far, by stage. The status is 'planned': nothing was judged.

    What the store knows is not counted; --method fliqs also trains, which is not foretold.
    """
    o = job.options
    menu = make_menu(job.network, job.target, o.formats, o.pins, o.ties)
    cache = explained(job, menu, images)
    cells = count_missing(job, menu)
    runs = foreseen(job, images, menu, calibrate(job, images, menu))
    artifacts = len(baseline_names(menu)) + MIXED + PLANS
    layers = len(job.network.layers)
    steps = {
        "profile": {"cells": cells, "seconds": cells * CELL_S},
        "sensitivity": {"layer_runs": runs.layer_runs, "seconds": runs.seconds},
        "compile": {"artifacts": artifacts, "seconds": artifacts * layers * LAYER_S},
    }
    rows = [
        LayerRow(la.name, la.workload.op, "", "", "", "", 0.0, None, {}, menu.reasons[la.name])
        for la in job.network.layers
    ]
    json = {
        "version": 1, "status": "planned", "dry_run": True, "model": o.model,
        "target": job.target.name, "device": job.device.name, "formats": list(menu.formats),
        "layers": layers, "forecast": steps,
        "minutes": sum(step["seconds"] for step in steps.values()) / 60, "seconds": dict(spent),
        **cache,
    }  # fmt: skip
    return Result(json, rows, [], 0, None)
