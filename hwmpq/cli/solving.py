"""solve: a bare problem file in, the best choice out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hwmpq.cli.command import command
from hwmpq.cli.output import Answer

#: Exit codes of the statuses of a solution; a time-out without any choice is a missed goal.
_EXIT = {"optimal": 0, "feasible": 0, "infeasible": 3, "timeout": 4}


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    command(app, panel="The main job and its parts")(solve)


def solve(
    problem: Annotated[Path, typer.Argument(metavar="PROBLEM.json", help="See the README.")],
    search: Annotated[
        str, typer.Option("--search", metavar="NAME", help="ilp, iqp, exhaustive, ...")
    ] = "ilp",
    time_limit: Annotated[
        float, typer.Option("--time-limit", metavar="S", help="Seconds; then the best so far.")
    ] = 60.0,
    seed: int = 0,
) -> Answer:
    """Choose one format per layer from a problem file alone: no model, no device.

    Tables of loss, latency, bytes or bit operations per layer and format, with budgets, go in; the
    choice, its value and a proven bound come out. Exit code 3 when nothing fits.

    Example: hwmpq solve problem.json --search ilp --time-limit 10 --json
    """
    from hwmpq import search as solvers
    from hwmpq.search.problem_file import read_problem, solution_to_json

    found = solvers.solve(read_problem(problem), search, time_limit, seed)
    told = solution_to_json(found)
    note = ""
    if found.status == "infeasible":
        told["least"] = dict(found.least)
        least = ", ".join(f"{name} {value:g}" for name, value in found.least.items())
        note = f"error: no choice meets the budgets; the least possible: {least or 'unknown'}"
    return Answer(told, _text(told), _EXIT[found.status], note)


def _text(told: dict[str, Any]) -> str:
    lines = [f"{told['status']} in {told['seconds']:.3f} s"]
    width = max(map(len, told["choice"]), default=0)
    lines += [f"  {layer:<{width}}  {fmt}" for layer, fmt in told["choice"].items()]
    values = ("objective", "raw_objective", "bound", "gap", "latency_s", "nbytes", "bops")
    lines += [f"{name}: {told[name]:.6g}" for name in values if told[name] is not None]
    return "\n".join(lines)
