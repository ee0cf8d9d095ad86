"""Results on stdout, everything else on stderr; with --json exactly one JSON object on stdout.

Needs numpy and the standard library only: the minimal front uses it too.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from hwmpq.errors import HwmpqError

#: `--json` object of a failure, and the version of all JSON objects printed here.
VERSION = 1
INTERNAL = 70
INTERRUPTED = 130


@dataclass(frozen=True)
class Answer:
    """What a command found out.

    json: the object of --json. show: the text for people, or a function that prints to the given
    rich console. note: a line for stderr.
    """

    json: Mapping[str, Any]
    show: str | Callable[[Any], None] = ""
    exit_code: int = 0
    note: str = ""


def perform(body: Callable[[], Answer], as_json: bool) -> int:
    """Run a command's body and print its answer, or its failure; returns the exit code."""
    with results_only() as out:
        try:
            answer = body()
        except HwmpqError as error:
            answer = _deliberate(error)
        except KeyboardInterrupt:
            answer = _interrupted(sys.argv[1:])
        except Exception as error:
            answer = _unexpected(error)
        if answer.note:
            print(answer.note, file=sys.stderr)
        return _print(answer, as_json, out)


def _deliberate(error: HwmpqError) -> Answer:
    """A worker's failure carries its traceback as the next step: that is for debugging only."""
    told, text = error.to_json(), str(error)
    if "Traceback (" in error.next and os.environ.get("HWMPQ_DEBUG") != "1":
        told["next"] = "HWMPQ_DEBUG=1 shows the traceback."
        text = f"{text.partition('. Traceback (')[0]}. {told['next']}"
    return failure(told, error.exit_code, text)


def _interrupted(words: list[str]) -> Answer:
    """The same command goes on, but --fresh would not read what was saved."""
    again = [word for word in words if word != "--fresh"]
    anew = " (with --fresh it begins anew)" if again != words else ""
    step = f"What was saved is kept; to go on{anew}: hwmpq {shlex.join(again)}"
    told = _error("interrupted", "interrupted", step)
    return failure(told, INTERRUPTED, f"interrupted. {step}")


def _unexpected(error: Exception) -> Answer:
    if os.environ.get("HWMPQ_DEBUG") == "1":
        traceback.print_exc()
    text = f"{type(error).__name__}: {error}"
    step = "Please report it, with the traceback that HWMPQ_DEBUG=1 prints."
    told = _error("internal", f"internal error, {text}", step)
    return failure(told, INTERNAL, f"internal error, {text}. {step}")


def _error(code: str, what: str, step: str) -> dict[str, object]:
    return {"code": code, "what": what, "got": None, "allowed": None, "next": step}


def failure(error: Mapping[str, object], exit_code: int, text: str) -> Answer:
    """The answer of a command that failed. error: as HwmpqError.to_json gives it."""
    status = "infeasible" if exit_code == 3 else "error"
    told = {"version": VERSION, "status": status, "error": dict(error)}
    return Answer(told, "", exit_code, f"error: {text}")


def _print(answer: Answer, as_json: bool, out: TextIO) -> int:
    try:
        if as_json:
            json.dump(plain(answer.json), out, allow_nan=False)
            out.write("\n")
        elif callable(answer.show):
            from rich.console import Console

            width = None if out.isatty() else 160
            answer.show(Console(file=out, width=width, highlight=False))
        elif answer.show:
            out.write(answer.show.rstrip("\n") + "\n")
        out.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    return answer.exit_code


@contextlib.contextmanager
def results_only() -> Iterator[TextIO]:
    """Yields the true stdout; meanwhile file descriptor 1 and sys.stdout lead to stderr, so that
    prints of native libraries do not get between the results."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    before, sys.stdout = sys.stdout, sys.stderr
    out = os.fdopen(os.dup(saved), "w", encoding="utf-8")
    try:
        yield out
    finally:
        with contextlib.suppress(BrokenPipeError):
            out.close()
        sys.stderr.flush()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).fflush(None)  # what C libraries still hold belongs to stderr
        os.dup2(saved, 1)
        os.close(saved)
        sys.stdout = before


def plain(value: Any) -> Any:
    """JSON values only: numpy becomes lists and numbers, what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)
