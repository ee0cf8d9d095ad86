"""Cells without a measured time get a predicted one, where the target's cost model knows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hwmpq.errors import InputError
from hwmpq.formats import format_named
from hwmpq.kernels import Kernel
from hwmpq.predict import Predictor
from hwmpq.stages.job import Job
from hwmpq.stages.latency import NOT_STORED, TIME_IS_UP, LatencyFacts, layer_place
from hwmpq.stages.menu import Menu
from hwmpq.targets import data_folder
from hwmpq.types import Measurement, Workload


def fill_in(job: Job, menu: Menu, facts: LatencyFacts) -> LatencyFacts:
    """The facts with predictions for cells that were not measured or whose timing did not end.

    A measured time is never replaced, and nothing is written to the store. A cell that does not
    compile, crashes or computes wrong numbers stays without a time: no plan may use it.
    """
    wanted = {key: reason for key, reason in facts.unknown.items() if may_predict(reason)}
    if not wanted:
        return facts
    try:
        predictor = predictor_of(job)
    except InputError as error:
        told = {key: f"{reason}; not predicted: {error.what}" for key, reason in wanted.items()}
        return replace(facts, unknown={**facts.unknown, **told})
    layers, unknown = dict(facts.layers), dict(facts.unknown)
    kernels = {
        (layer.workload.key, name): (layer.workload, kernel)
        for layer in job.network.layers
        for name, kernel in menu.kernels[layer.name].items()
    }
    for key, reason in wanted.items():
        found = _predicted(predictor, *kernels[key], key[1], job.options.threads)
        if isinstance(found, Measurement):
            layers[key] = found
            del unknown[key]
        else:
            unknown[key] = f"{reason}; not predicted: {found}"
    count = len(facts.unknown) - len(unknown)
    job.progress.note(f"{count} of {len(wanted)} cells without a measured time are predicted")
    return replace(facts, layers=layers, unknown=unknown)


def foretold(job: Job, menu: Menu, facts: LatencyFacts) -> list[tuple[Measurement, float]]:
    """The measured cells that the target's cost model knows, with the seconds it says; none
    without a model. Its own training cells may be among them."""
    try:
        predictor = predictor_of(job)
    except InputError:  # none, or none for these kernels: nothing to compare
        return []
    threads, cells = job.options.threads, {}
    for layer in job.network.layers:
        for name, kernel in menu.kernels[layer.name].items():
            cell, fmt = facts.cell(layer.workload, name), format_named(name)
            timed = cell is not None and cell.source == "measured" and not cell.error
            if cell and timed and predictor.why_not(layer.workload, fmt, threads) is None:
                cells[layer.workload.key, name] = cell, (layer.workload, fmt, kernel, threads)
    found = predictor.predict_many([item for _, item in cells.values()])
    return [(cell, float(row[0])) for (cell, _), row in zip(cells.values(), found, strict=True)]


def may_predict(reason: str) -> bool:
    """Is the reason for a missing time one that says nothing against the kernel?"""
    return reason in (TIME_IS_UP, NOT_STORED) or reason.startswith(("timed out", "not timed"))


def sought_s(cell: Measurement) -> float:
    """Seconds that the search is given for a cell: of a predicted one an upper quantile, for the
    search picks those that are predicted too short."""
    if cell.source == "predicted":
        return float(cell.quality["upper"])
    return cell.latency_s


def spread(
    job: Job, assignment: Mapping[str, str], facts: LatencyFacts
) -> tuple[float, float]:  # fmt: skip
    """What the bands of the predicted cells take from and add to the price of an assignment."""
    low = high = 0.0
    for layer in job.network.layers:
        fmt = assignment[layer.name]
        cell = facts.cell(layer.workload, fmt)
        if layer_place(layer.name, fmt) in facts.inside:
            continue  # no band: it was timed in the network
        if cell is not None and cell.source == "predicted":
            below, above = cell.quality["interval"]
            low += below - cell.latency_s
            high += above - cell.latency_s
    return facts.speed * low, facts.speed * high


def predictor_of(job: Job) -> Predictor:
    """The cost model of the target. Raises InputError where there is none that fits."""
    folder = data_folder("cost_models") / job.target.name
    if not folder.is_dir():
        raise InputError(
            f"there is no cost model of {job.target.name}",
            next="Run `hwmpq cost-model sample`, then `hwmpq cost-model train`.",
        )
    try:
        predictor = Predictor.load(folder, job.target)
    except InputError as error:
        job.progress.note(f"the cost model of {job.target.name} is not used: {error}")
        raise
    if predictor.fingerprint not in ("", job.fingerprint):
        job.progress.note(
            f"the cost model of {job.target.name} was trained on another machine, "
            f"{predictor.fingerprint}"
        )
    return predictor


def _predicted(
    predictor: Predictor, workload: Workload, kernel: Kernel, name: str, threads: int
) -> Measurement | str:
    """The predicted cell, or why there is none."""
    fmt = format_named(name)
    try:
        centre, low, high = predictor.predict(workload, fmt, kernel, threads)
        [upper] = predictor.upper([(workload, fmt, kernel, threads)])
    except InputError as error:
        return error.what
    return Measurement(
        f"predicted|{workload.key}|{name}|{kernel.name}|{threads}", workload, name, kernel.name,
        threads, (centre,), source="predicted",
        quality={"interval": [low, high], "upper": float(upper)},
    )  # fmt: skip
