"""Timing an artifact, and other programs beside it. numpy and the TVM runtime are enough."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.cli.accuracy import Samples
from hwmpq.cli.against import Against
from hwmpq.cli.artifact_jobs import runtime_only
from hwmpq.cli.output import VERSION, Answer
from hwmpq.errors import InputError
from hwmpq.report import words

if TYPE_CHECKING:
    from hwmpq.measure import Cell, CellTiming, Protocol, WorkerProcess

Array = NDArray[Any]
#: The longest silence of the child, which loads TVM and the artifact first.
_DEADLINE_S = 240.0


def bench_artifact(
    artifact: str, rounds: int = 24, threads: int | None = None, seed: int = 0,
    sustain_s: float | None = None, against: Against | None = None, data: str | None = None,
    limit: int | None = None,
) -> Answer:  # fmt: skip
    """Time whole runs at every batch size in a child process, as `quantize` does, and one start in
    another; a rival in the same rounds. sustain_s: then the first size once more, under load for
    so long. data: also the accuracy of both on its first `limit` samples."""
    runtime_only()
    from hwmpq.artifact import load, read_manifest
    from hwmpq.artifact.manifest import libraries
    from hwmpq.artifact.startup import start_up
    from hwmpq.measure import Cell, Protocol, WorkerProcess

    manifest, path = read_manifest(Path(artifact)), str(Path(artifact).resolve())
    count = threads or int(manifest["threads"])
    samples = None if data is None else Samples.of(manifest, data, limit)
    sizes = list(libraries(manifest))
    own = [Cell(f"the artifact, batch {n}", "artifact", path=path, batch=n) for n in sizes]
    with tempfile.TemporaryDirectory(prefix="hwmpq-") as folder:
        others = against.opponents(manifest, sizes, count, Path(folder)) if against else []
        protocol = Protocol(rounds=rounds, threads=count, seed=seed, settle=bool(others))
        with WorkerProcess(threads=count) as worker:
            timings = _timed([*own, *(other.cell() for other in others)], protocol, worker)
            parts = _sustained(own[0], worker, sustain_s, count, seed) if sustain_s else []
        classes: list[Array] = []
        if samples:
            classes.append(samples.classes(load(artifact).run_samples))
            classes += [samples.classes(other.outputs()) for other in others[:1]]
    both = zip_longest(sizes, timings[: len(sizes)], timings[len(sizes) :])
    batches = [_batch(size, mine, other, against) for size, mine, other in both]
    told: dict[str, Any] = {
        "version": VERSION, "artifact": str(artifact), **batches[0], "batches": batches[1:],
        "threads": count, "target": manifest["target"]["name"],
        "quality": dict(timings[0].quality), "start_up_s": asdict(start_up(Path(artifact))),
    }  # fmt: skip
    if samples:
        told["accuracy"] = samples.accuracy(classes[0])
        for other in classes[1:]:
            same = 100.0 * float((other == classes[0]).mean())
            told["against"]["accuracy"] = {**samples.accuracy(other), "agreement": same}
    if parts:
        told["sustained"] = parts
    return Answer(told, "\n".join(_lines(told)))


def _lines(told: Mapping[str, Any]) -> list[str]:
    """All that is told, for people."""
    lines = [
        line for batch in (told, *told["batches"]) for line in _batch_lines(batch, told["threads"])
    ]
    load, first, tvm = (told["start_up_s"][n] for n in ("load", "first_call", "import_tvm"))
    lines.append(
        f"start-up: load {words.seconds(load)}, first result {words.seconds(first)}, together "
        f"{(load + first) / tvm:.2f} times the import of TVM's runtime, {words.seconds(tvm)}"
    )
    if told["quality"].get("noisy"):
        lines.append("The machine was busy: these times are disturbed.")
    if accuracy := told.get("accuracy"):
        lines.append(f"top-1 on {accuracy['n']} samples: {words.percent(accuracy['top1'])}")
        if other := words.part(told, "against", "accuracy"):
            lines[-1] += (
                f"; {told['against']['name']} {words.percent(other['top1'])}, the same class for "
                f"{words.percent(other['agreement'])}"
            )
    return lines + (_table(told["sustained"]) if "sustained" in told else [])


def _sustained(
    own: Cell, worker: WorkerProcess, seconds: float, threads: int, seed: int
) -> list[dict[str, Any]]:
    """The parts of a load; each is told on stderr as it ends."""
    from hwmpq.measure.sustained import sustained

    parts = []
    for part in sustained(lambda plan: _timed([own], plan, worker)[0], seconds, threads, seed):
        parts.append({
            "begin_s": part.begin_s, "latency_s": timing_json(part.samples_s),
            "temperature_c": part.temperature_c,
        })  # fmt: skip
        print(_line(parts[-1], parts[0]), file=sys.stderr, flush=True)
    return parts


def _table(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Time against minute, with bars as long as the medians."""
    last = parts[-1]["latency_s"]["median"] / parts[0]["latency_s"]["median"]
    return [
        "minute     median        p90  warmest sensor", *(_line(part, parts[0]) for part in parts),
        f"In the end {last:.3f} times as long as at first.",
    ]  # fmt: skip


def _line(part: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """A row of the table: a bar of 20 characters is the first part's median."""
    found, warm = part["latency_s"], part["temperature_c"]
    bar = "#" * round(20 * found["median"] / first["latency_s"]["median"])
    told = words.NONE if warm is None else f"{warm:.0f} °C"
    return (
        f"{part['begin_s'] / 60:6.1f} {words.seconds(found['median']):>10} "
        f"{words.seconds(found['p90']):>10} {told:>15}  {bar}"
    )


def _timed(cells: Sequence[Cell], protocol: Protocol, worker: WorkerProcess) -> list[CellTiming]:
    """Raises InputError when one of them cannot be timed."""
    from hwmpq.measure import CellTiming

    # time_block would compile a kernel first, for which TVM's runtime alone is not enough
    request = {"cells": [cell.to_json() for cell in cells], **protocol.to_json()}
    reply = worker.call("time", request, _DEADLINE_S)
    timings = [CellTiming.from_json(item) for item in reply["cells"]]
    for timing in timings:
        if timing.error:
            raise InputError(f"cannot time {timing.key}", timing.error)
    return timings


def _batch(
    size: int, own: CellTiming, other: CellTiming | None, against: Against | None
) -> dict[str, Any]:
    """What is told of a batch size. ratio: how many times as long as the artifact the other program
    takes, from paired rounds."""
    from hwmpq.measure import compare, pairs

    told: dict[str, Any] = {"batch": size, "latency_s": timing_json(own.samples_s)}
    if other is not None and against is not None:
        found = compare(*pairs(other, own))
        told["against"] = {
            "name": against.runtime, "model": against.model,
            "latency_s": timing_json(other.samples_s), "ratio": found.ratio,
            "interval": list(found.interval), "verdict": found.verdict,
            "description": other.quality["description"],
        }  # fmt: skip
    return told


def _batch_lines(told: Mapping[str, Any], threads: int) -> list[str]:
    """The times of a batch size."""
    found, other, size = told["latency_s"], told.get("against"), f"batch {told['batch']}"
    lines = [
        f"{size}: {words.seconds(found['median'])} median (95 % interval "
        f"{words.interval(found['interval'])}), fastest {words.seconds(found['min'])}, "
        f"p90 {words.seconds(found['p90'])}; {found['samples']} samples, {threads} thread(s)"
    ]
    if other:
        lines.append(
            f"{size}, {other['name']} fp32: {words.seconds(other['latency_s']['median'])}, "
            f"{other['ratio']:.2f} times as long"
        )
    return lines


def timing_json(samples_s: Sequence[float]) -> dict[str, Any]:
    """{"median", "interval", "min", "p90", "samples"} of the contract."""
    from hwmpq.measure import median_interval

    return {
        "median": float(np.median(samples_s)), "interval": list(median_interval(samples_s)),
        "min": min(samples_s), "p90": float(np.quantile(samples_s, 0.9)),
        "samples": len(samples_s),
    }  # fmt: skip
