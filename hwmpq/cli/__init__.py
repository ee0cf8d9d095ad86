"""The command line: `hwmpq COMMAND ...`. Results on stdout, progress and logs on stderr.

Where typer and rich are not installed (an artifact's machine needs numpy and apache-tvm alone), a
small front with the commands for artifacts takes over.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from hwmpq.cli.output import INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: sys.argv) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        run = _front()
    except KeyboardInterrupt:  # nothing was begun
        return INTERRUPTED
    return run(arguments)


def _front() -> Callable[[Sequence[str]], int]:
    """What runs a command line, with the packages that are here."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        from hwmpq.cli.minimal import run as run_minimal

        return run_minimal
    from hwmpq.cli.app import run

    return run
