"""Our artifacts beside other runtimes, interleaved in one run, for any models and thread counts.

    python tools/bench/peers.py zoo:resnet18 --weights F --calib-data npz:images.npz [--threads 1,2]

Ours: fp32, bf16, w8a8 where the target has them, and a mixed plan from --assignment or --artifact.
Theirs: the float model in every precision that each installed runtime has on this CPU; int8 is one
QDQ file, calibrated on --calib-data. `NAME=VALUE` gives an option to one of several models.
Writes rows.jsonl (one row per contender) and bench.html into --out; the table goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record

from hwmpq import peers
from hwmpq.artifact import read_manifest
from hwmpq.cli.jobs import read_assignment
from hwmpq.cli.progress import reporter
from hwmpq.errors import HwmpqError, InputError
from hwmpq.measure import (
    Cell,
    CellTiming,
    Protocol,
    WorkerProcess,
    compare,
    conditions,
    fingerprint,
    median_interval,
    pairs,
    time_block,
)
from hwmpq.peers.rival import Rival, write_files
from hwmpq.stages.build import make_artifact
from hwmpq.stages.facts import calibrate
from hwmpq.stages.job import Job, Options, Progress, load_images, open_job
from hwmpq.stages.menu import Menu, make_menu, uniform
from hwmpq.types import Assignment

OURS = ("fp32", "bf16", "w8a8")
#: runtime, precision, compiled
THEIRS = (
    ("openvino", "fp32", False),
    ("openvino", "bf16", False),
    ("openvino", "int8", False),
    ("onnxruntime", "fp32", False),
    ("onnxruntime", "int8", False),
    ("torch", "fp32", True),
    ("torch", "fp32", False),
)
#: Images that give int8 its ranges, ours and theirs alike.
CALIB = 64
#: torch.compile may be silent for so long.
_DEADLINE_S = 900.0


@dataclass(frozen=True)
class Words:
    """What was asked for one model."""

    model: str
    weights: str | None
    calib_data: str
    assignment: str | None
    artifact: str | None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--weights", action="append", default=[], metavar="[MODEL=]F")
    parser.add_argument("--calib-data", action="append", required=True, metavar="[MODEL=]DATA")
    parser.add_argument("--assignment", action="append", default=[], metavar="[MODEL=]F")
    parser.add_argument("--artifact", action="append", default=[], metavar="[MODEL=]DIR")
    parser.add_argument("--threads", default="1", help="such as 1,2")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    record.option(parser)
    args = parser.parse_args()
    progress = reporter()
    rows: list[dict[str, Any]] = []
    tables = []
    try:
        peers.need("onnx", "onnxruntime", "openvino")
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "rows.jsonl").open("w") as file:
            for model in args.models:
                words = _words(model, args)
                for threads in map(int, args.threads.split(",")):
                    found = bench(words, threads, args.rounds, args.seed, progress)
                    rows += found
                    file.writelines(json.dumps(row) + "\n" for row in found)
                    file.flush()
                    tables.append(table(found))
                    record.show(tables[-1])
    except HwmpqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    plot(rows, args.out / "bench.html")
    record.write(args.json, *tables)
    progress.note(f"rows and plot in {args.out}")
    return 0


def _words(model: str, args: argparse.Namespace) -> Words:
    """Raises InputError when images are missing: random ones give ranges that mean nothing."""

    def of(given: Sequence[str]) -> str | None:
        own = [item.removeprefix(f"{model}=") for item in given if item.startswith(f"{model}=")]
        common = [item for item in given if not any(item.startswith(f"{m}=") for m in args.models)]
        return next(iter([*own, *common]), None)

    calib = of(args.calib_data)
    if calib is None:
        raise InputError(f"--calib-data for {model}", None, "[MODEL=]DATA")
    return Words(model, of(args.weights), calib, of(args.assignment), of(args.artifact))


def bench(
    words: Words, threads: int, rounds: int, seed: int, progress: Progress
) -> list[dict[str, Any]]:
    """One interleaved block: a row per contender, ours first."""
    options = Options(
        words.model, weights=words.weights, calib_data=words.calib_data, threads=threads,
        seed=seed, calib=CALIB,
    )  # fmt: skip
    job = open_job(options, progress)
    protocol = Protocol(
        rounds=rounds, epoch_s=0.05, threads=threads, seed=seed, deadline_s=_DEADLINE_S, settle=True
    )
    with job.store, tempfile.TemporaryDirectory(prefix="hwmpq-") as folder:
        cells = contenders(job, words, Path(folder))
        with (
            progress.stage(f"time {words.model}, {threads} thread(s)", None),
            WorkerProcess(threads=threads) as worker,
        ):
            timings = time_block(cells, protocol, worker)
    about = {"model": words.model, "threads": threads, "target": job.target.name,
             "fingerprint": fingerprint(), "conditions": conditions()}  # fmt: skip
    return list(_rows(about, timings))


def contenders(job: Job, words: Words, folder: Path) -> list[Cell]:
    """Compiled artifacts and the rivals' files, in `folder`."""
    images = load_images(job).calib
    plans = _plans(job, words)
    formats = tuple(dict.fromkeys(fmt for plan in plans.values() for fmt in plan.values()))
    quantizers = calibrate(job, load_images(job), make_menu(job.network, job.target, formats))
    cells = []
    with job.progress.stage("compile", len(plans)) as advance:
        for name, plan in plans.items():
            samples = {job.graph.inputs[0]: images.batch(range(1))}
            made = make_artifact(job, plan, quantizers, folder / name, samples)
            cells.append(Cell(f"hwmpq {name}", "artifact", path=str(made.path)))
            advance(1)
    with job.progress.stage("files for other runtimes", None):
        files = write_files(job.graph, folder, images.batch(range(len(images))))
    rival = Rival(words.model, words.weights, None, files)
    for runtime, precision, compiled in THEIRS:
        function, settings = rival.program(runtime, precision, job.options.threads, compiled)
        name = f"{runtime} {precision}" + (" compiled" if compiled else "")
        cells.append(Cell(name, "program", function=function, settings=settings))
    return cells


def _plans(job: Job, words: Words) -> dict[str, Assignment]:
    """Name -> assignment; the mixed one as given."""
    menu: Menu = make_menu(job.network, job.target)
    plans = {f: uniform(menu, job.network, f)[0] for f in OURS if f in menu.formats}
    if words.assignment:
        plans["mixed"] = read_assignment(Path(words.assignment))
    elif words.artifact:
        plans["mixed"] = dict(read_manifest(Path(words.artifact))["assignment"])
    return plans


def _rows(about: Mapping[str, Any], timings: Sequence[CellTiming]) -> Iterator[dict[str, Any]]:
    """ratios: how many times as long as each of ours it takes, from paired rounds."""
    ours = [t for t in timings if t.key.startswith("hwmpq ") and not t.error]
    for timing in timings:
        row: dict[str, Any] = {**about, "contender": timing.key, "error": timing.error}
        if not timing.error:
            row["latency_s"] = {
                "median": timing.latency_s, "interval": list(median_interval(timing.samples_s)),
                "min": min(timing.samples_s), "samples": len(timing.samples_s),
            }  # fmt: skip
            row["ratios"] = {}
            for own in ours:
                found = compare(*pairs(timing, own))
                row["ratios"][own.key] = {
                    "ratio": found.ratio, "interval": list(found.interval),
                    "verdict": found.verdict,
                }  # fmt: skip
            row |= {"samples_s": list(timing.samples_s), "quality": dict(timing.quality)}
        yield row


def table(rows: Sequence[Mapping[str, Any]]) -> record.Table:
    """One block: milliseconds, and each contender's time over each of ours; or why it has none."""
    first = rows[0]
    ours = [row["contender"] for row in rows if row["contender"].startswith("hwmpq ")]
    columns = ("contender", "ms [95 %]", *(f"÷ {name}" for name in ours))
    title = f"{first['model']}, {first['threads']} thread(s), {first['target']}"
    return record.Table(columns, [_cells(row, ours) for row in rows], title)


def _cells(row: Mapping[str, Any], ours: Sequence[str]) -> tuple[str, ...]:
    if row["error"]:
        return row["contender"], row["error"], *("" for _ in ours)
    times, noisy = row["latency_s"], " noisy" if row["quality"]["noisy"] else ""
    low, high = (1e3 * x for x in times["interval"])
    others = {name: found for name, found in row["ratios"].items() if name != row["contender"]}
    ratios = [_ratio(others[name]) if name in others else "" for name in ours]
    ms = f"{1e3 * times['median']:.3f} [{low:.3f}, {high:.3f}]{noisy}"
    return row["contender"], ms, *ratios


def _ratio(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars with their intervals, a panel per model and number of threads."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    blocks = list(dict.fromkeys((row["model"], row["threads"]) for row in rows))
    titles = [f"{model}, {threads} thread(s)" for model, threads in blocks]
    figure = make_subplots(rows=len(blocks), cols=1, subplot_titles=titles)
    for i, block in enumerate(blocks, 1):
        part = [r for r in rows if (r["model"], r["threads"]) == block and not r["error"]]
        part.sort(key=lambda row: -row["latency_s"]["median"])
        middle = [1e3 * row["latency_s"]["median"] for row in part]
        ends = [[1e3 * x for x in row["latency_s"]["interval"]] for row in part]
        own = [row["contender"].startswith("hwmpq ") for row in part]
        error = {
            "type": "data", "symmetric": False,
            "array": [high - m for (_, high), m in zip(ends, middle, strict=True)],
            "arrayminus": [m - low for (low, _), m in zip(ends, middle, strict=True)],
        }  # fmt: skip
        bar = go.Bar(
            x=middle, y=[row["contender"] for row in part], orientation="h", error_x=error,
            marker_color=["#1f77b4" if ours else "#b0b0b0" for ours in own],
            text=[f"{m:.3f}" for m in middle],
        )  # fmt: skip
        figure.add_trace(bar, row=i, col=1)
        figure.update_xaxes(title_text="ms, median and 95 % interval", row=i, col=1)
    figure.update_layout(showlegend=False, height=120 + 330 * len(blocks), template="plotly_white")
    figure.write_html(path, include_plotlyjs=True)


if __name__ == "__main__":
    sys.exit(main())
