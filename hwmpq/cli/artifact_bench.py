"""Timing an artifact, and other programs beside it. numpy and the TVM runtime are enough."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwmpq.cli.artifact_jobs import runtime_only
from hwmpq.cli.output import VERSION, Answer
from hwmpq.errors import InputError, UnknownName
from hwmpq.report import words

if TYPE_CHECKING:
    from hwmpq.measure import Cell, CellTiming, Protocol, WorkerProcess

#: The longest silence of the child, which loads TVM and the artifact first.
_DEADLINE_S = 240.0


def bench_artifact(
    artifact: str, rounds: int = 24, threads: int | None = None, seed: int = 0,
    against: tuple[str, str] | None = None, sustain_s: float | None = None,
) -> Answer:  # fmt: skip
    """Time whole runs in a child process, as `quantize` does, and one start in another; a rival in
    the same rounds. sustain_s: then once more, under load for so long."""
    runtime_only()
    from hwmpq.artifact import read_manifest
    from hwmpq.artifact.startup import start_up
    from hwmpq.measure import Cell, Protocol, WorkerProcess

    manifest = read_manifest(Path(artifact))
    count = threads or int(manifest.get("threads", 1))
    own = Cell("artifact", "artifact", path=str(Path(artifact).resolve()))
    with tempfile.TemporaryDirectory(prefix="hwmpq-") as folder:
        cells = [own]
        if against is not None:
            cells.append(_rival(*against, manifest, count, Path(folder)))
        protocol = Protocol(rounds=rounds, threads=count, seed=seed, settle=against is not None)
        with WorkerProcess(threads=count) as worker:
            timing, *others = _timed(cells, protocol, worker)
            parts = _sustained(own, worker, sustain_s, count, seed) if sustain_s else []
    started = start_up(Path(artifact))
    found = timing_json(timing.samples_s)
    told: dict[str, Any] = {
        "version": VERSION, "artifact": str(artifact), "latency_s": found, "threads": count,
        "target": manifest["target"]["name"], "quality": dict(timing.quality),
        "start_up_s": asdict(started),
    }  # fmt: skip
    lines = [
        f"{words.seconds(found['median'])} median (95 % interval "
        f"{words.interval(found['interval'])}), fastest {words.seconds(found['min'])}, "
        f"p90 {words.seconds(found['p90'])}; {found['samples']} samples, {count} thread(s)"
    ]
    lines.append(
        f"start-up: load {words.seconds(started.load)}, first result "
        f"{words.seconds(started.first_call)}; import of TVM's runtime "
        f"{words.seconds(started.import_tvm)}"
    )
    if timing.quality.get("noisy"):
        lines.append("The machine was busy: these times are disturbed.")
    if against is not None:
        told["against"] = _compared(*against, others[0], timing)
        lines.append(
            f"{against[0]} fp32: {words.seconds(told['against']['latency_s']['median'])}, "
            f"{told['against']['ratio']:.2f} times as long"
        )
    if parts:
        told["sustained"] = parts
        lines += _table(parts)
    return Answer(told, "\n".join(lines))


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


def _rival(
    runtime: str, model: str, manifest: Mapping[str, Any], threads: int, folder: Path
) -> Cell:
    """The user's float model in another runtime, with the artifact's input shape."""
    from hwmpq.frontend.model import load_model
    from hwmpq.measure import Cell
    from hwmpq.peers import NAMES, need
    from hwmpq.peers.rival import Rival, write_files

    if runtime not in NAMES:
        raise UnknownName("program for --against", runtime, NAMES)
    need(runtime)
    shape = tuple(manifest["inputs"][0]["shape"])
    files = {}
    if runtime != "torch":
        files = write_files(load_model(model, input_shape=shape).graph(), folder)
    function, settings = Rival(model, None, shape, files).program(runtime, threads=threads)
    return Cell(runtime, "program", function=function, settings=settings)


def _timed(cells: Sequence[Cell], protocol: Protocol, worker: WorkerProcess) -> list[CellTiming]:
    """Raises InputError when one of them cannot be timed."""
    from hwmpq.measure import CellTiming

    # time_block would compile a kernel first, for which TVM's runtime alone is not enough
    request = {"cells": [cell.to_json() for cell in cells], **protocol.to_json()}
    reply = worker.call("time", request, _DEADLINE_S)
    timings = [CellTiming.from_json(item) for item in reply["cells"]]
    for timing in timings:
        if timing.error:
            what = "the artifact" if timing.key == "artifact" else timing.key
            raise InputError(f"{what} could not be timed", timing.error)
    return timings


def _compared(runtime: str, model: str, other: CellTiming, own: CellTiming) -> dict[str, Any]:
    """ratio: how many times as long as the artifact the other takes, from paired rounds."""
    from hwmpq.measure import compare, pairs

    found = compare(*pairs(other, own))
    return {
        "name": runtime, "model": model, "latency_s": timing_json(other.samples_s),
        "ratio": found.ratio, "interval": list(found.interval), "verdict": found.verdict,
        "description": other.quality["description"],
    }  # fmt: skip


def timing_json(samples_s: Sequence[float]) -> dict[str, Any]:
    """{"median", "interval", "min", "p90", "samples"} of the contract."""
    from hwmpq.measure import median_interval

    return {
        "median": float(np.median(samples_s)), "interval": list(median_interval(samples_s)),
        "min": min(samples_s), "p90": float(np.quantile(samples_s, 0.9)),
        "samples": len(samples_s),
    }  # fmt: skip
