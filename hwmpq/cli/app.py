"""All commands in one application, and what happens to a command line that is no command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from hwmpq.cli import (
    artifacts,
    cost_model,
    devices,
    doctor,
    exporting,
    jobs,
    machine,
    reports,
    solving,
    stores,
    target,
)
from hwmpq.cli.output import INTERRUPTED, failure, perform

app = typer.Typer(
    name="hwmpq",
    help="Finds the number format of every layer that keeps a model accurate within a latency "
    "the device really reaches, and compiles it.\n\n"
    "Start: hwmpq quantize zoo:digits_cnn --data digits --latency 0.7x\n\n"
    "Results go to stdout, progress to stderr. Exit codes: 0 met, 2 bad input, 3 infeasible, "
    "4 missed, 5 accuracy, 6 slower than fp32, 7 device or store lost, 70 internal error, "
    "130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _part in (jobs, exporting, solving, artifacts, machine, doctor, reports):
    _part.register(app)
for _name, _group in (
    ("artifact", artifacts.group),
    ("devices", devices.group),
    ("target", target.group),
    ("cost-model", cost_model.group),
    ("store", stores.group),
):
    app.add_typer(_group, name=_name)

#: Base of what typer raises for a command line it does not understand.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("hwmpq"))
        raise typer.Exit(0)


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    return


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    command = typer.main.get_command(app)
    try:
        code = command.main(list(arguments), prog_name="hwmpq", standalone_mode=False)
    except _UsageError as error:
        return _refuse(error, arguments)
    except typer.Abort:
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def _refuse(error: Any, arguments: Sequence[str]) -> int:
    """A usage error: what is wrong and where to read on; help when nothing at all was asked."""
    what = str(error.format_message()).rstrip(".")
    if type(error).__name__ == "NoArgsIsHelpError":
        if what:  # older versions hand the help over instead of printing it
            print(what)
        return 2
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "hwmpq"
    commands = getattr(context.command, "commands", None) if context else None
    told = {
        "code": "error", "what": what, "got": " ".join(arguments),
        "allowed": sorted(commands) if commands else None, "next": f"See {where} --help.",
    }  # fmt: skip
    text = what if what.endswith("?") else f"{what}."
    answer = failure(told, 2, f"{text} See {where} --help.")
    return perform(lambda: answer, "--json" in arguments)
