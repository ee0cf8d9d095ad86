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
        Path,
        typer.Argument(
            metavar="RESULT",
            help="result.json, or the folder that holds one; evaluation.json likewise.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="FILE.html, .md or .json; beside the result."),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="KIND", help="html, md or json; html.")
    ] = None,
    peer: Annotated[
        list[Path] | None,
        typer.Option(
            "--peer",
            metavar="FILE",
            help="What `hwmpq bench ARTIFACT --against NAME MODEL --json` printed: the other "
            "runtime is shown too; may be repeated.",
        ),
    ] = None,
    anonymize: Annotated[
        bool,
        typer.Option(
            "--anonymize",
            help="Leave out what tells whose model and machine it is: names of model, layers, "
            "data, device and CPU, paths, dates and the command line.",
        ),
    ] = False,
) -> Answer:
    """Write the report of a result again: one HTML file without outside parts, Markdown or JSON.

    Example: hwmpq report hwmpq-out --to md --anonymize
    """
    from hwmpq import report as pages
    from hwmpq.report import evaluation
    from hwmpq.report.content import EVALUATION

    if to not in (None, *pages.KINDS):
        raise InputError("--to", to, pages.KINDS)
    file = pages.file_in(result)
    place = out or file.with_name(f"report.{to or 'html'}")
    if to and place.suffix != f".{to}":
        raise InputError(f"--to {to} and --out", place, f"NAME.{to}")
    if file.name == EVALUATION:
        found = evaluation.read(file)
        evaluation.write(evaluation.anonymized(found) if anonymize else found, place)
        return Answer({"version": VERSION, "report": str(place)}, f"written: {place}")
    content = pages.with_peers(pages.read(file), peer or [])
    if anonymize:
        content = pages.anonymized(content)
    pages.write(content, place)
    told = {"version": VERSION, "report": str(place), "status": content.result.get("status")}
    return Answer(told, f"written: {place}")
