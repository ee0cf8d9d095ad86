"""The commands for artifacts, and `devices serve`, where typer and rich are not installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from hwmpq.cli import artifact_bench, artifact_jobs, serving
from hwmpq.cli.durations import duration
from hwmpq.cli.output import Answer, failure, perform

_NEEDED = "Install hwmpq with its dependencies (pip install hwmpq) for the other commands."


class _Parser(argparse.ArgumentParser):
    """Ends a wrong command line as the other front does. as_json: whether --json was given."""

    as_json = False

    def error(self, message: str) -> NoReturn:
        step = f"See {self.prog} --help. {_NEEDED}"
        told = {"code": "error", "what": message, "got": None, "allowed": None, "next": step}
        answer = failure(told, 2, f"{message}. {step}")
        sys.exit(perform(lambda: answer, _Parser.as_json))


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    _Parser.as_json = "--json" in arguments
    try:
        given = _parser().parse_args(list(arguments))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    body: Callable[[argparse.Namespace], Answer] = given.body
    return perform(lambda: body(given), given.json)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hwmpq", description=f"Use an artifact with numpy and apache-tvm. {_NEEDED}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, body: Callable[[argparse.Namespace], Answer]) -> _Parser:
        found: _Parser = commands.add_parser(name, help=text, description=text)
        found.add_argument("artifact", metavar="ARTIFACT")
        found.add_argument("--json", action="store_true", help="one JSON object on stdout")
        found.add_argument("--seed", type=int, default=0)
        found.add_argument("--require-signature", type=Path, metavar="KEY.pub")

        def checked(given: argparse.Namespace) -> Answer:
            artifact_jobs.require(given.require_signature)
            return body(given)

        found.set_defaults(body=checked)
        return found

    ran = add(
        "run", "Run on arrays from a file.",
        lambda g: artifact_jobs.run_artifact(g.artifact, g.input, g.output),
    )  # fmt: skip
    ran.add_argument("--input", type=Path, required=True, metavar="x.npy|x.npz")
    ran.add_argument("--output", type=Path, required=True, metavar="y.npy|y.npz")
    timed = add(
        "bench", "Time whole runs.",
        lambda g: artifact_bench.bench_artifact(
            g.artifact, g.rounds, g.threads, g.seed, sustain_s=duration(g.sustain, "--sustain")
        ),
    )  # fmt: skip
    timed.add_argument("--rounds", type=int, default=24)
    timed.add_argument("--threads", type=int)
    timed.add_argument("--sustain", metavar="TIME")
    checked = add(
        "verify", "Replay the golden samples.",
        lambda g: artifact_jobs.verify_artifact(g.artifact, g.data, g.eval),
    )  # fmt: skip
    checked.add_argument("--data", metavar="DATA")
    checked.add_argument("--eval", type=int, metavar="N")
    add("inspect", "What an artifact is.", lambda g: artifact_jobs.inspect_artifact(g.artifact))
    _add_serve(commands)
    return parser


def _add_serve(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "Offer this machine for timing, until interrupted."
    group = commands.add_parser("devices", help=text).add_subparsers(required=True)
    parser = group.add_parser("serve", help=text, description=text)
    parser.add_argument("--key", required=True)
    parser.add_argument("--tracker", metavar="HOST:PORT", default="")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=serving.SERVER_PORT)
    parser.add_argument("--session-limit", type=float, default=serving.SESSION_S)
    parser.add_argument("--trust-network", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(
        body=lambda g: serving.serve_machine(
            g.key, g.tracker, g.host, g.port, g.session_limit, g.trust_network
        )
    )
