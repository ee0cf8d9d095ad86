"""What a target does with networks: formats × layers measured, roofs, mixed precision's gain.

Weights and data do not matter here: only times are asked for. Everything measured goes into the
store at once, so that a run that was stopped goes on; what comes out is one JSON value.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from hwmpq import artifact, toolchain
from hwmpq.formats import format_named
from hwmpq.kernels.cases import unsupported
from hwmpq.measure import WorkerProcess
from hwmpq.measure.energy import counters, energy_of
from hwmpq.measure.environment import hardware
from hwmpq.search import solve
from hwmpq.side_jobs.inputs import calibrated, noise
from hwmpq.stages.bench import baseline_names
from hwmpq.stages.build import make_artifact
from hwmpq.stages.cells import timer
from hwmpq.stages.choose import make_problem
from hwmpq.stages.forecast import CELL_S, LAYER_S
from hwmpq.stages.job import Job, Options, Progress, Silent, open_job
from hwmpq.stages.latency import LatencyFacts, count_missing, profile
from hwmpq.stages.menu import Menu, make_menu, uniform
from hwmpq.stages.predicted import foretold
from hwmpq.stages.pricing import price, table
from hwmpq.stages.roofline import Roofline
from hwmpq.stages.timing import Timed, stored_times, time_artifacts
from hwmpq.types import Assignment, Sensitivity, digest

#: Networks of every kind of layer, small ones first.
NETWORKS = ("zoo:resnet20_cifar", "zoo:resnet18", "zoo:mobilenet_v2", "zoo:vit_tiny")
MIXED = "fastest mix"

Keep = Callable[[dict[str, Any]], None]


def evaluate_target(
    options: Options, models: Sequence[str] = NETWORKS, progress: Progress | None = None,
    keep: Keep = lambda found: None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluation of options.target on the device: {"version", "target", ..., "networks"}.

    keep: is given the evaluation as far as it goes, after every network. With options.dry_run
    nothing is measured: "forecast" tells what would be. Raises InputError where the target does not
    run here.
    """
    told: dict[str, Any] = {}
    networks: list[dict[str, Any]] = []
    for model in models:
        job = open_job(replace(options, model=model), progress or Silent())
        with job.store:
            menu = make_menu(job.network, job.target, options.formats)
            told = told or _machine(job)
            if options.dry_run:
                networks.append(_forecast(job, menu))
                continue
            networks.append(_network(job, menu, told))
        keep({**told, "networks": networks})
    if options.dry_run:
        told["forecast_s"] = sum(network["forecast_s"] for network in networks)
    return {**told, "networks": networks}


def _machine(job: Job) -> dict[str, Any]:
    target = job.target
    return {
        "version": 1, "kind": "evaluation", "target": target.name, "device": job.device.name,
        "description": target.description, "features": sorted(target.features),
        "threads": job.options.threads, "date": time.strftime("%Y-%m-%d %H:%M"),
        "fingerprint": job.fingerprint, "machine": None if job.times_elsewhere else hardware(),
        "versions": toolchain.versions(), "unsupported": unsupported(target.features),
    }  # fmt: skip


def _forecast(job: Job, menu: Menu) -> dict[str, Any]:
    cells, layers = count_missing(job, menu), len(job.network.layers)
    plans = len(baseline_names(menu)) + 1
    return {
        "model": job.options.model, "layers": layers, "cells": cells,
        "forecast_s": CELL_S * cells + LAYER_S * layers * plans,
    }  # fmt: skip


def _network(job: Job, menu: Menu, told: dict[str, Any]) -> dict[str, Any]:
    """One network; the machine's roof, of a CPU that times its cells here, is told once."""
    facts = profile(job, menu)
    here = not (job.times_elsewhere or job.estimated or job.target.gpu)
    roofline = Roofline(job) if here else None
    told["bandwidth"] = dict(roofline.bandwidth) if roofline else None
    cells = _cells(job, menu, facts, roofline)
    plans = _plans(job, menu, facts)
    return {
        "model": job.options.model, "layers": len(job.network.layers),
        "macs": sum(layer.workload.macs for layer in job.network.layers),
        "formats": list(menu.formats), "cells": cells, "plans": plans, "gain": _gain(plans),
        "failures": dict(facts.failures), "refused": _refused(job, menu),
    }  # fmt: skip


def _cells(
    job: Job, menu: Menu, facts: LatencyFacts, roofline: Roofline | None
) -> list[dict[str, Any]]:
    """Every different layer in every format; layers: how many are alike; predicted_s: by the cost
    model, None without one."""
    said = {(m.workload.key, m.format): s for m, s in foretold(job, menu, facts)}
    alike: dict[str, list[str]] = {}
    for layer in job.network.layers:
        alike.setdefault(layer.workload.key, []).append(layer.name)
    rows = []
    for layer in job.network.layers:
        workload, names = layer.workload, alike[layer.workload.key]
        if names[0] != layer.name:
            continue
        for name, kernel in menu.kernels[layer.name].items():
            cell, fmt = facts.cell(workload, name), format_named(name)
            if cell is None or cell.error:
                continue
            roof = roofline.of(workload, fmt, kernel, cell.latency_s) if roofline else None
            rows.append({
                "layer": layer.name, "layers": len(names), "op": workload.op,
                "workload": workload.to_json(), "format": name, "kernel": kernel.name,
                "execution": kernel.execution(fmt), "measured_s": cell.latency_s,
                "source": cell.source, "predicted_s": said.get((workload.key, name)),
                "roof": asdict(roof) if roof else None,
            })  # fmt: skip
    return rows


def _plans(job: Job, menu: Menu, facts: LatencyFacts) -> dict[str, dict[str, Any]]:
    """The uniform artifacts and the fastest mix by price, compiled and timed in one run."""
    chosen = {name: uniform(menu, job.network, name)[0] for name in baseline_names(menu)}
    chosen[MIXED] = _fastest(job, menu, facts)
    if job.estimated:
        return {name: {"predicted_s": price(job, plan, facts), "measured_s": None,
                       "assignment": plan} for name, plan in chosen.items()}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="hwmpq-") as folder:
        built = _Built(job, Path(folder))
        timed = stored_times(job, chosen, "median", lambda: built.timed(chosen))
        return {
            name: {
                "predicted_s": price(job, plan, facts), "measured_s": timed[name].latency_s,
                "interval": list(timed[name].interval), "assignment": plan,
                "noisy": bool(timed[name].quality.get("noisy")),
                "energy": built.energy(name, plan),
            }
            for name, plan in chosen.items()
        }  # fmt: skip


def _fastest(job: Job, menu: Menu, facts: LatencyFacts) -> Assignment:
    none = np.zeros((len(job.network.layers), len(menu.formats)))
    losses = Sensitivity(job.network.names, menu.formats, none, "none", 0)
    problem = make_problem(job, menu, losses, table(job, menu, facts), {})
    return solve(replace(problem, minimize="latency_s")).choice


class _Built:
    """Artifacts of plans, made when first asked for; their numbers come from noise."""

    def __init__(self, job: Job, folder: Path):
        self.job, self.folder = job, folder
        self._samples = noise(job)

    def path(self, name: str, plan: Assignment) -> Path:
        place = self.folder / digest(plan)  # the mix may be one of the others
        if not place.exists():
            with self.job.progress.stage(f"compile {name}", None):
                numbers = calibrated(self.job, self._samples, plan)
                make_artifact(self.job, plan, numbers, place, self._samples)
        return place

    def timed(self, plans: Mapping[str, Assignment]) -> dict[str, Timed]:
        folders = {name: self.path(name, plan) for name, plan in plans.items()}
        with (
            self.job.progress.stage("time the artifacts", None),
            timer(self.job, WorkerProcess) as worker,
        ):
            return time_artifacts(self.job, folders, "median", worker)

    def energy(self, name: str, plan: Assignment) -> dict[str, Any] | None:
        """Of one run here; None where nothing counts it."""
        counting = [] if self.job.times_elsewhere else counters(self.job.target)
        if not counting:
            return None
        loaded = artifact.load(self.path(name, plan))
        sizes = {name: self.job.graph.tensors[name][0] for name in self._samples}
        inputs = [array[: sizes[name]] for name, array in self._samples.items()]
        return asdict(energy_of(lambda: loaded(*inputs), counting))


def _gain(plans: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How many times as long as the fastest mix fp32 and the fastest uniform artifact take."""
    times = {name: plan["measured_s"] or plan["predicted_s"] for name, plan in plans.items()}
    others = {name: seconds for name, seconds in times.items() if name != MIXED}
    best = min(others, key=lambda name: others[name])
    return {"over_fp32": times["fp32"] / times[MIXED], "best_uniform": best,
            "over_best_uniform": others[best] / times[MIXED]}  # fmt: skip


def _refused(job: Job, menu: Menu) -> list[dict[str, str]]:
    """Why a kind of layer cannot run in a format, once for each operator."""
    found = {}
    for layer in job.network.layers:
        for name, reason in menu.reasons[layer.name].items():
            found[layer.workload.op, name] = reason
    return [{"op": op, "format": name, "reason": why} for (op, name), why in found.items()]
