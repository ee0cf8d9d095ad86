"""How near every layer is to the machine's roof: MACs and bytes per second over measured peaks.

    python tools/bench/roofline.py zoo:resnet18 [--formats fp32,w8a8 | --artifact DIR]

Layer times and peaks are those of the store, measured where it lacks them; what they and the
columns mean is said in hwmpq/stages/roofline.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import record

from hwmpq.artifact import read_manifest
from hwmpq.cli.jobs import read_assignment
from hwmpq.cli.progress import reporter
from hwmpq.errors import HwmpqError
from hwmpq.formats import format_named
from hwmpq.kernels import Kernel, best
from hwmpq.stages.job import Job, Options, open_job
from hwmpq.stages.latency import LatencyFacts, profile
from hwmpq.stages.menu import make_menu
from hwmpq.stages.roofline import Roofline

#: How many layers are named of those that leave most.
NAMED = 3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--store", help="file or URL of the store (default: the user's)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--formats", default="fp32,w8a8", help="every layer in each of these")
    what.add_argument("--artifact", type=Path, help="each layer in its format of this artifact")
    what.add_argument("--assignment", type=Path, help="... of this file")
    record.option(parser)
    args = parser.parse_args()
    try:
        plan = None
        if args.artifact:
            plan = dict(read_manifest(args.artifact)["assignment"])
        elif args.assignment:
            plan = read_assignment(args.assignment)
        formats = tuple(dict.fromkeys(plan.values() if plan else args.formats.split(",")))
        progress = reporter()
        job = open_job(Options(args.model, weights=args.weights, store=args.store), progress)
        with job.store:
            facts = profile(job, make_menu(job.network, job.target, formats))
            roofline = Roofline(job)
            rows = list(_rows(job, roofline, facts, formats, plan))
    except HwmpqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for level in roofline.levels:
        print(f"{level.name}: {level.bytes_per_s / 1e9:.1f} GB/s ({level.nbytes} bytes)")
    whole = summary(args.model, rows)
    record.show(table(rows), whole)
    record.write(args.json, whole, rows=rows)
    return 0


def _rows(
    job: Job, roofline: Roofline, facts: LatencyFacts, formats: tuple[str, ...],
    plan: dict[str, str] | None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per layer and format that has a time."""
    for layer in job.network.layers:
        for name in [plan[layer.name]] if plan else formats:
            fmt, cell = format_named(name), facts.cell(layer.workload, name)
            kernel: Kernel | None = best(layer.workload, fmt, job.target.features)
            if kernel is None or cell is None or cell.error:
                continue
            yield {
                "layer": layer.name, "format": name, "kernel": kernel.name,
                "latency_s": cell.latency_s,
                **asdict(roofline.of(layer.workload, fmt, kernel, cell.latency_s)),
            }  # fmt: skip


def summary(model: str, rows: list[dict[str, Any]]) -> record.Table:
    """Per format: the share of the roof, weighted by time, and the layers that leave most."""
    found = []
    for name in dict.fromkeys(row["format"] for row in rows):
        mine = [row for row in rows if row["format"] == name]
        share = sum(row["roof_s"] for row in mine) / sum(row["latency_s"] for row in mine)
        worst = sorted(mine, key=lambda row: row["roof_s"] - row["latency_s"])[:NAMED]
        named = ", ".join(f"{row['layer']} {100 * row['of_roof']:.0f} %" for row in worst)
        found.append((f"{model} {name}", f"{100 * share:.0f} %", named))
    return record.Table(("every layer", "of the roof, by time", "most is left in"), found)


def table(rows: list[dict[str, Any]]) -> record.Table:
    columns = (
        "layer", "format", "kernel", "µs", "GMAC/s", "of peak", "GB/s", "of roof", "bound by",
    )  # fmt: skip
    return record.Table(columns, [
        (
            row["layer"], row["format"], row["kernel"], f"{1e6 * row['latency_s']:.1f}",
            f"{row['macs_per_s'] / 1e9:.1f}", f"{100 * row['of_peak']:.0f} %",
            f"{row['bytes_per_s'] / 1e9:.1f}", f"{100 * row['of_roof']:.0f} %", row["bound"],
        )
        for row in rows
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
