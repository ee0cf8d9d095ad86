"""How a function becomes a command: options by name, --json and --seed, one way to end.

A command's body takes its own arguments by keyword and returns an Answer. What it takes from the
common table `options.TABLE` is listed by name and arrives as `**given`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from hwmpq.cli.options import TABLE
from hwmpq.cli.output import Answer, perform

Json = Annotated[
    bool, typer.Option("--json", help="Print exactly one JSON object on stdout, also on failure.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]


def command(
    app: typer.Typer, *shared: str, name: str | None = None, panel: str | None = None
) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Register the function as a command of `app`; it stays callable as it is.

    shared: names of options in TABLE, handed over as keyword arguments.
    """

    def register(body: Callable[..., Answer]) -> Callable[..., Answer]:
        own = list(inspect.signature(body, eval_str=True).parameters.values())
        explicit = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
        takes_seed = len(explicit) < len(own) or any(p.name == "seed" for p in explicit)

        def entry(**given: Any) -> None:
            as_json, seed = given.pop("as_json"), given.pop("seed")
            if takes_seed:
                given["seed"] = seed
            raise typer.Exit(perform(lambda: body(**given), as_json))

        parameters = [p for p in explicit if p.name != "seed"]
        parameters += [_parameter(key, *TABLE[key]) for key in shared]
        parameters += [_parameter("seed", Seed, 0), _parameter("as_json", Json, False)]
        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        entry.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        entry.__annotations__ = {p.name: p.annotation for p in keyword_only}
        entry.__doc__ = _unwrapped(inspect.getdoc(body) or "")
        entry.__name__ = body.__name__
        command_name = name or body.__name__.strip("_").replace("_", "-")
        app.command(command_name, rich_help_panel=panel, no_args_is_help=False)(entry)
        return body

    return register


def _unwrapped(text: str) -> str:
    """Each paragraph on one line: the terminal wraps it."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )
