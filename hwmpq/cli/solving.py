"""solve: a bare problem file in, the best choice out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hwmpq.cli.command import command
from hwmpq.cli.output import Answer
from hwmpq.errors import InputError

if TYPE_CHECKING:
    from hwmpq.types import Problem, Solution

#: Exit codes of the statuses of a solution; a time-out without any choice is a missed goal.
_EXIT = {"optimal": 0, "feasible": 0, "infeasible": 3, "timeout": 4}


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    command(app, panel="The main job and its parts")(solve)


def solve(
    problems: Annotated[
        list[Path],
        typer.Argument(
            metavar="PROBLEM.json...",
            help="Losses and costs as arrays (docs/guides/compiler.md). Several: one choice for "
            "all these devices, each with its own latency table and budget.",
        ),
    ],
    search: Annotated[
        str, typer.Option("--search", metavar="NAME", help="ilp, iqp, exhaustive, ...")
    ] = "ilp",
    time_limit: Annotated[
        float, typer.Option("--time-limit", metavar="S", help="Seconds; then the best so far.")
    ] = 60.0,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Also what the budgets are worth, what each layer's next formats would cost, and "
            "which budgets contradict.",
        ),
    ] = False,
    seed: int = 0,
) -> Answer:
    """Choose one format per layer from a problem file alone: no model, no device.

    Tables of loss, latency, bytes or bit operations per layer and format, with budgets, go in; the
    choice, its value and a proven bound come out. Exit code 3 when nothing fits.

    Example: hwmpq solve problem.json --search ilp --time-limit 10 --json
    """
    from hwmpq import search as solvers
    from hwmpq.search.problem_file import read_problem, solution_to_json

    if len(problems) > 1:
        return _several(problems, search, time_limit, explain, seed)
    problem = read_problem(problems[0])
    found = solvers.solve(problem, search, time_limit, seed)
    told = solution_to_json(found)
    note = _note(told, found)
    if explain:
        told |= _explained(problem, found, search, time_limit, seed)
    return Answer(told, _text(told), _EXIT[found.status], note)


def _several(paths: list[Path], search: str, time_limit: float, explain: bool, seed: int) -> Answer:
    """One choice for several devices, named by their files."""
    from hwmpq.search.devices import solve_devices, together
    from hwmpq.search.problem_file import read_problem, solution_to_json

    if search != "ilp" or explain:
        raise InputError(
            "--search or --explain with several problem files",
            next="Leave it out: ilp solves them.",
        )
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        raise InputError("problem files of one name", ", ".join(names), "distinct names")
    problem, devices = together(dict(zip(names, map(read_problem, paths), strict=True)))
    found, seconds = solve_devices(problem, devices, time_limit, seed)
    told = solution_to_json(found) | {"devices": seconds}
    return Answer(told, _text(told), _EXIT[found.status], _note(told, found))


def _note(told: dict[str, Any], found: Solution) -> str:
    """What to say on stderr; an infeasible problem's least values join the answer."""
    if found.status != "infeasible":
        return ""
    told["least"] = dict(found.least)
    least = ", ".join(f"{name} {value:g}" for name, value in found.least.items())
    return f"error: no choice meets the budgets; the least possible: {least or 'unknown'}"


def _explained(
    problem: Problem, found: Solution, search: str, time_limit: float, seed: int
) -> dict[str, Any]:
    from hwmpq.search import alternatives, conflicts, prices

    if not found.choice:
        why = conflicts.conflict(problem, time_limit, seed)
        return {"conflict": why and asdict(why)}
    asked = (problem, found, search, time_limit, seed)
    return {
        "prices": {name: asdict(price) for name, price in prices.prices(*asked).items()},
        "layers": {name: asdict(row) for name, row in alternatives.explain(*asked).items()},
    }


def _text(told: dict[str, Any]) -> str:
    from hwmpq.cli.tables import facts, solved_again

    lines = [f"{told['status']} in {told['seconds']:.3f} s"]
    width = max(map(len, told["choice"]), default=0)
    layers = told.get("layers") or {}
    for layer, fmt in told["choice"].items():
        lines.append(f"  {layer:<{width}}  {fmt}")
        near = layers.get(layer) or {}
        steps = [step for step in (near.get("up"), near.get("down")) if step]
        lines += [f"  {'':<{width}}    {step['fmt']}: {solved_again(step)}" for step in steps]
    values = ("objective", "raw_objective", "bound", "gap", "latency_s", "nbytes", "bops")
    lines += [f"{name}: {told[name]:.6g}" for name in values if told[name] is not None]
    devices = told.get("devices") or {}
    lines += [f"latency_s on {name}: {seconds:.6g}" for name, seconds in devices.items()]
    return "\n".join([*lines, *facts(told)])
