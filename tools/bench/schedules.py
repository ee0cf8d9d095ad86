"""How near the default schedules come to the best timed ones, over the layers of models.

    python tools/bench/schedules.py zoo:resnet18 zoo:mobilenet_v2 [--formats fp32,w8a8] [--top 6]

Each distinct layer in each format: its best schedules by estimate, timed in one interleaved block
on a store of its own, each by the least of its epochs, which neighbours disturb the least. ratio:
the default's time over the best one's; the sum of a model weighs each layer by its time.
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
from hwmpq.stages.job import Job, Options, open_job
from hwmpq.stages.latency import Bench, Builder, workers
from hwmpq.stages.menu import make_menu
from hwmpq.stages.tuning import Space, spaces, time_space


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--formats", default="fp32,w8a8,w4a8")
    parser.add_argument("--top", type=int, default=6, help="schedules of a cell")
    parser.add_argument("--every", type=int, default=1, help="take every n-th cell only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows here")
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
                    chosen = spaces(job, menu, args.top)[:: args.every]
                    for row in _rows(job, chosen, Path(folder)):
                        print(json.dumps(row), flush=True)
                        rows.append(row)
    except HwmpqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for line in summary(rows):
        print(line)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _rows(job: Job, chosen: Sequence[Space], folder: Path) -> Iterator[dict[str, Any]]:
    """One row per cell whose default schedule could be timed."""
    with workers(job) as (compiler, timer):
        builder = Builder(job, compiler, folder, with_loop=job.device.remote)
        bench = Bench(job, builder, timer, job.fingerprint)
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
    """Per model and format: cells, the time-weighted and the worst ratio, cells above 1.15."""
    for key in dict.fromkeys((row["model"], row["format"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["format"]) == key]
        whole = sum(row["default_s"] for row in mine) / sum(row["best_s"] for row in mine)
        worst = max(row["ratio"] for row in mine)
        above = sum(row["ratio"] > 1.15 for row in mine)
        yield (
            f"{' '.join(key)}: {len(mine)} cells, weighted {whole:.3f}, worst {worst:.3f}, "
            f"{above} above 1.15"
        )


if __name__ == "__main__":
    sys.exit(main())
