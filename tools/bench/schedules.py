"""How near the default schedules come to the best timed ones, over the layers of models.

    python tools/bench/schedules.py [zoo:resnet18 ...] [--formats fp32,w8a8] [--every 4] [--json F]

Every n-th distinct layer in each format: its best schedules by estimate, timed in one interleaved
block on a store of its own, each by the least of its epochs, which neighbours disturb the least.
ratio: the default's time over the best one's; the sum of a model weighs each layer by its time.
At the end: the share of all cells whose default comes within 15 % of their best, and the worst.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
    parser.add_argument("--json", type=Path, help="also write share, worst cells and rows here")
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
    for line in summary(rows):
        print(line)
    if args.json:
        told = {"near": NEAR, "share": share(rows), "worst": worst(rows), "rows": rows}
        args.json.write_text(json.dumps(told, indent=1) + "\n")
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


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Per model and format: cells, the time-weighted and the worst ratio, cells that are near; then
    the share of all cells that are, and the worst of them by name."""
    for key in dict.fromkeys((row["model"], row["format"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["format"]) == key]
        whole = sum(row["default_s"] for row in mine) / sum(row["best_s"] for row in mine)
        most = max(row["ratio"] for row in mine)
        yield (
            f"{' '.join(key)}: {len(mine)} cells, weighted {whole:.3f}, worst {most:.3f}, "
            f"{share(mine):.0%} within {NEAR:g}"
        )
    if rows:
        yield f"all: {len(rows)} cells, {share(rows):.1%} within {NEAR:g}; the worst:"
    for row in worst(rows):
        workload = Workload.from_json(row["workload"])
        sizes = " ".join(f"{name}={size}" for name, size in workload.dims)
        yield (
            f"  {row['ratio']:.3f}  {row['format']} {row['kernel']}: {row['default']} "
            f"{1e6 * row['default_s']:.1f} us, {row['best']} {1e6 * row['best_s']:.1f} us; "
            f"{workload.op} {sizes}"
        )


def share(rows: Sequence[dict[str, Any]]) -> float:
    """Of the cells, how many are near."""
    return sum(row["ratio"] <= NEAR for row in rows) / max(1, len(rows))


def worst(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The farthest from their best first."""
    return sorted(rows, key=lambda row: -row["ratio"])[:NAMED]


if __name__ == "__main__":
    sys.exit(main())
