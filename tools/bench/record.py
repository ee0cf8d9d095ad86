"""Figures of a bench as tables for people, and as a record of how, when and where they were made.

Every bench takes `--json FILE` and writes its record there; docs/results.md is made of such files
by tools/results_page.py.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from hwmpq import targets
from hwmpq.cli.output import plain
from hwmpq.measure import conditions
from hwmpq.measure.environment import hardware
from hwmpq.toolchain import versions

VERSION = 1


@dataclass(frozen=True)
class Table:
    """Figures as text, a row like the columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


def show(*tables: Table, file: TextIO | None = None) -> None:
    """On stdout, or on another file; as wide as a log may be where nobody looks on."""
    place = file or sys.stdout
    console = Console(file=place, width=None if place.isatty() else 160)
    for table in tables:
        shown = RichTable(title=Text(table.title) if table.title else None)
        for i, column in enumerate(table.columns):
            shown.add_column(Text(column), justify="right" if i else "left")
        for row in table.rows:
            shown.add_row(*map(Text, row))
        console.print(shown)


def quantities(told: Mapping[str, Any]) -> Table:
    """A table of names and values."""
    return Table(("quantity", "value"), [(name, number(value)) for name, value in told.items()])


def number(value: Any) -> str:
    """Floats with four digits, also within lists and mappings."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(number, value))
    return str(value)


def option(parser: argparse.ArgumentParser) -> None:
    """Adds `--json` to a bench's options."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE",
        help="also write the figures here, with command, date, machine and versions",
    )  # fmt: skip


def write(path: Path | None, *tables: Table, rows: Iterable[Mapping[str, Any]] = ()) -> None:
    """The record, where it is asked for. rows: what the tables were made of, where that is more."""
    if path is None:
        return
    here, now = hardware(), conditions()
    told = {
        "version": VERSION, "command": command(path), "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{here['model']}, {here['cores']} cores, {targets.native().name}",
        "load": now["load"], "versions": versions(),
        "tables": [asdict(table) for table in tables if table.rows], "rows": list(rows),
    }  # fmt: skip
    path.write_text(json.dumps(plain(told), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def command(path: Path) -> str:
    """How this program was called, but for --json; of files, which lie elsewhere on other machines,
    the names alone."""
    words = [w for w in sys.argv[1:] if w not in ("--json", str(path), f"--json={path}")]
    named = [re.sub(r"(^|(?<=[:=]))/\S*/", "", word) for word in words]
    return shlex.join(["python", f"tools/bench/{Path(sys.argv[0]).name}", *named])
