"""The solvers' bars: seconds and gaps of iqp, ilp and the frontier on generated problems.

    python tools/bench/solvers.py [--time-limit 60] [--only iqp|ilp|frontier]

CPU seconds stand beside wall seconds: on a shared machine the first are the fair ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import record

from hwmpq import search
from hwmpq.search.instances import chain, pairs
from hwmpq.search.pareto import frontier
from hwmpq.types import Problem

#: Layers, how the pairs are made, bar.
PAIRS: tuple[tuple[int, dict[str, Any], str], ...] = (
    (53, {}, "proven to 1e-4 in 3 s"),
    (72, {}, "proven to 1e-4 in 10 s"),
    (100, {}, "gap at most 1 % in 60 s"),
    (53, {"common": 0.97}, "gap at most 1 % in 60 s"),
    (100, {"common": 0.97}, "gap at most 1 % in 60 s"),
    (53, {"common": 1.0, "factors": 40}, "gap at most 1 % in 60 s"),
    (53, {"noise": 0.05}, "raw objective"),
)
THREE = ("latency_s", "nbytes", "bops")
#: How the chain of 1000 layers is made.
CHAINS: tuple[dict[str, Any], ...] = (
    {}, {"tied": True}, {"tied": True, "budgets": THREE},
    {"tied": True, "budgets": THREE, "share": 0.2},
)  # fmt: skip


def timed(what: str, bar: str, run: Callable[[], str]) -> tuple[str, ...]:
    """A row of the table."""
    wall, cpu = time.perf_counter(), time.process_time()
    told = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{what:<60} {wall:7.2f} s wall {cpu:7.2f} s CPU  {told}  (bar: {bar})", flush=True)
    return what, bar, told, f"{wall:.2f}", f"{cpu:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--only", choices=["iqp", "ilp", "frontier"])
    record.option(parser)
    words = parser.parse_args()
    limit = words.time_limit
    rows = []

    def solved(problem: Problem, solver: str) -> str:
        found = search.solve(problem, solver, limit)
        return f"{found.status} {found.objective:.6g} gap {found.gap if found.gap else 0:.2e}"

    solved(chain(4), "ilp")  # load the libraries
    if words.only in (None, "iqp"):
        for count, made, bar in PAIRS:
            kind = ", ".join(f"{key} {value}" for key, value in made.items())
            problem = pairs(count, **made)
            what = f"iqp {count} layers {kind}"
            rows.append(timed(what, bar, lambda p=problem: solved(p, "iqp")))
    if words.only in (None, "ilp"):
        for made in CHAINS:
            kind = ", ".join(f"{key} {value}" for key, value in made.items())
            problem = chain(1000, **made)
            what = f"ilp 1000 × 8 {kind}"
            rows.append(timed(what, "optimal in 2 s", lambda p=problem: solved(p, "ilp")))
    if words.only in (None, "frontier"):
        short = chain(60)
        rows.append(timed(
            "frontier 60 layers x 8 formats", "1 s per point",
            lambda: f"{len(frontier(short, points=20, time_limit_s=limit))} points of 20",
        ))  # fmt: skip
    columns = ("problem", "bar", "found", "seconds", "CPU seconds")
    record.write(words.json, record.Table(columns, rows))


if __name__ == "__main__":
    main()
