"""What can be compiled for: targets."""

from __future__ import annotations

from typing import Any

import typer

from hwmpq.cli.command import command
from hwmpq.cli.output import VERSION, Answer

_PANEL = "This machine"


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    command(app, panel=_PANEL)(targets)


def targets() -> Answer:
    """The targets that can be compiled for, and whether this CPU can run them.

    A target is a TOML file of facts; more folders of them by HWMPQ_TARGET_PATH.

    Example: hwmpq targets --json
    """
    from hwmpq import targets as known

    rows: list[dict[str, Any]] = []
    for name in known.names():
        target = known.load(name)
        missing = known.satisfied_by_host(target)
        rows.append(
            {
                "name": name, "description": target.description, "rank": target.rank,
                "features": sorted(target.features), "runs_here": not missing, "missing": missing,
            }
        )  # fmt: skip
    best = max((r for r in rows if r["runs_here"]), key=lambda r: r["rank"], default=None)
    native = None if best is None else best["name"]

    def show(console: Any) -> None:
        from hwmpq.cli.tables import table

        cells = [
            [
                r["name"] + (" (native)" if r["name"] == native else ""),
                "yes" if r["runs_here"] else "lacks " + " ".join(r["missing"]),
                " ".join(r["features"]), r["description"],
            ]
            for r in rows
        ]  # fmt: skip
        console.print(table(["target", "runs here", "features", "what it is"], cells))

    return Answer({"version": VERSION, "native": native, "targets": rows}, show)
