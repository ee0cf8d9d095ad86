"""report: a result as a page to read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hwmpq.cli.command import command
from hwmpq.cli.output import VERSION, Answer
from hwmpq.errors import InputError


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    command(app, panel="Look first")(report)


def report(
    result: Annotated[
        Path, typer.Argument(metavar="RESULT", help="result.json, or the folder that holds one.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="FILE.html or FILE.md; beside the result."),
    ] = None,
) -> Answer:
    """Write the report of a result again: one HTML file without outside parts, or Markdown.

    Example: hwmpq report hwmpq-out --out report.md
    """
    from hwmpq import report as pages

    file = result / "result.json" if result.is_dir() else result
    place = out or file.with_name("report.html")
    if place.suffix not in (".html", ".md"):
        raise InputError("report file", place, "NAME.html or NAME.md")
    found, rows, frontier = pages.read(file)
    write = pages.html if place.suffix == ".html" else pages.markdown
    write(found, rows, frontier, place)
    told = {"version": VERSION, "report": str(place), "status": found.get("status")}
    return Answer(told, f"written: {place}")
