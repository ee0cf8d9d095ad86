"""Progress on stderr: bars on a terminal, one line per stage elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

#: Seconds between the lines of a long stage.
_EVERY_S = 15.0


class Lines:
    """A line when a stage begins, one when it ends, and some on the way: for logs."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A part of the work with `total` items; yields advance(n)."""
        self.note(f"{name} ..." if total is None else f"{name}: {total} ...")
        began = spoke = time.monotonic()
        count = 0

        def advance(n: int = 1) -> None:
            nonlocal count, spoke
            count += n
            if time.monotonic() - spoke > _EVERY_S:
                spoke = time.monotonic()
                self.note(f"{name}: {count}" + (f" of {total}" if total else ""))

        yield advance
        done = f", {count} done" if count else ""
        self.note(f"{name}: {time.monotonic() - began:.1f} s{done}")

    def note(self, text: str) -> None:
        """A remark for people."""
        print(text, file=sys.stderr, flush=True)


class Bars:
    """A live bar per stage, with the time left; notes scroll above it."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._live: Any = None

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A part of the work with `total` items; yields advance(n). Stages may nest."""
        from rich.progress import Progress

        owner = self._live is None
        if owner:
            self._live = Progress(console=self._console, transient=True)
            self._live.start()
        live, began = self._live, time.monotonic()
        task = live.add_task(name, total=total)

        def advance(n: int = 1) -> None:
            live.advance(task, n)

        try:
            yield advance
        finally:
            live.remove_task(task)
            if owner:
                live.stop()
                self._live = None
        self._console.print(f"{name}: {time.monotonic() - began:.1f} s", style="dim", markup=False)

    def note(self, text: str) -> None:
        """A remark for people."""
        self._console.print(text, markup=False)


def reporter() -> Lines | Bars:
    """What suits stderr."""
    return Bars() if sys.stderr.isatty() else Lines()
