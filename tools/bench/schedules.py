"""How near the default schedules come to the best timed ones, over the layers of models.

    python tools/bench/schedules.py [zoo:resnet18 ...] [--formats fp32,w8a8] [--every 4] [--json F]

Every n-th distinct layer in each format: its best schedules by estimate, timed in one interleaved
block on a store of its own, each by the least of its epochs, which neighbours disturb the least.
ratio: the default's time over the best one's; the sum of a model weighs each layer by its time.
At the end: how many cells' default comes within 15 % of their best, and the worst.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import record

from hwmpq.cli.progress import reporter
from hwmpq.errors import HwmpqError
from hwmpq.stages.cells import Builder, CellBench, workers
from hwmpq.stages.job import Job, Options, open_job
from hwmpq.stages.menu import make_menu
from hwmpq.stages.tuning import Space, spaces, time_space
from hwmpq.types import Workload

MODELS = ("zoo:resnet18", "zoo:resnet50", "zoo:mobilenet_v2_tf", "zoo:vit_tiny")
#: A default that takes at most so many times as long as the best is near enough.
NEAR = 1.15
#: How many of the worst cells are named.
NAMED = 8


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--formats", default="fp32,w8a8,w4a8")
    parser.add_argument("--top", type=int, default=6, help="schedules of a cell")
    parser.add_argument("--every", type=int, default=4, help="take every n-th layer only")
    parser.add_argument("--threads", type=int, default=1)
    record.option(parser)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    try:
        for model in args.models:
            with tempfile.TemporaryDirectory(prefix="hwmpq-") as folder:
                options = Options(
                    model, formats=tuple(args.formats.split(",")), threads=args.threads,
                    store=str(Path(folder) / "store.sqlite"),
                )  # fmt: skip
                job = open_job(options, reporter())
                with job.store:
                    menu = make_menu(job.network, job.target, options.formats)
                    chosen = sample(spaces(job, menu, args.top), args.every)
                    for row in _rows(job, chosen, Path(folder)):
                        print(json.dumps(row), flush=True)
                        rows.append(row)
    except HwmpqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    tables = models(rows), worst(rows)
    record.show(*tables)
    record.write(args.json, *tables, rows=rows)
    return 0


def sample(found: Sequence[Space], every: int) -> list[Space]:
    """The cells of every n-th layer, in all formats."""
    layers = list(dict.fromkeys(space.call.workload for space in found))[::every]
    return [space for space in found if space.call.workload in layers]


def _rows(job: Job, chosen: Sequence[Space], folder: Path) -> Iterator[dict[str, Any]]:
    """One row per cell whose default schedule could be timed."""
    with workers(job) as (compiler, timer):
        builder = Builder(job, compiler, folder, with_loop=job.device.remote)
        bench = CellBench(job, builder, timer, job.fingerprint)
        for space in chosen:
            times = {
                schedule.text: min(m.samples_s)
                for schedule, m in zip(space.schedules, time_space(job, bench, space), strict=True)
                if not m.error
            }
            default = space.schedules[0].text
            if default in times:
                best = min(times, key=lambda text: times[text])
                yield {
                    "model": job.options.model, "workload": space.call.workload.to_json(),
                    "format": space.call.format.name, "kernel": space.kernel.name,
                    "default": default, "default_s": times[default],
                    "best": best, "best_s": times[best],
                    "ratio": times[default] / times[best], "times_s": times,
                }  # fmt: skip


def models(rows: Sequence[dict[str, Any]]) -> record.Table:
    """Per model and format, and of all."""
    keys = dict.fromkeys((row["model"], row["format"]) for row in rows)
    groups = {" ".join(k): [r for r in rows if (r["model"], r["format"]) == k] for k in keys}
    return record.Table(
        ("model and format", "cells", "weighted by time", "worst", f"within {NEAR:g}"),
        [_model(name, own) for name, own in [*groups.items(), ("all", rows)] if own],
    )


def _model(name: str, rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    whole = sum(row["default_s"] for row in rows) / sum(row["best_s"] for row in rows)
    most = max(row["ratio"] for row in rows)
    near = sum(row["ratio"] <= NEAR for row in rows) / len(rows)
    return name, str(len(rows)), f"{whole:.3f}", f"{most:.3f}", f"{near:.1%}"


def worst(rows: Sequence[dict[str, Any]]) -> record.Table:
    """The farthest from their best first."""
    found = []
    for row in sorted(rows, key=lambda row: -row["ratio"])[:NAMED]:
        workload = Workload.from_json(row["workload"])
        sizes = " ".join(f"{name}={size}" for name, size in workload.dims)
        times = [f"{row[which]} {1e6 * row[f'{which}_s']:.1f} µs" for which in ("default", "best")]
        found.append((f"{workload.op} {sizes}", row["format"], f"{row['ratio']:.3f}", *times))
    return record.Table(("worst cells", "format", "ratio", "default", "best"), found)


if __name__ == "__main__":
    sys.exit(main())
