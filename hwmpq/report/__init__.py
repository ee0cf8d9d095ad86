"""A result as a page for people: one self-contained HTML file, Markdown, or JSON.

Everything shown is escaped; the page loads nothing from elsewhere and runs without a network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hwmpq.errors import InputError
from hwmpq.report import words
from hwmpq.report.anonymize import anonymized
from hwmpq.report.content import Content, file_in, read, with_peers

__all__ = [
    "KINDS", "Content", "anonymized", "file_in", "read", "with_peers", "words", "write",
]  # fmt: skip

#: File endings that a report may have.
KINDS = ("html", "md", "json")


def write(content: Content, path: Path) -> None:
    """Write the report; the file's ending says what as.

    Raises InputError for another ending, and where the file cannot be written.
    """
    from hwmpq.report.view import numbers, view

    write_twin(path, "report", lambda: view(content), lambda: numbers(content))


def write_twin(
    path: Path, template: str, view: Callable[[], Mapping[str, Any]],
    numbers: Callable[[], Mapping[str, Any]],
) -> None:  # fmt: skip
    """A page from template.html.j2 or template.md.j2, or its numbers as JSON. Raises InputError."""
    kind = path.suffix.removeprefix(".")
    if kind not in KINDS:
        raise InputError("report file", path, [f"NAME.{kind}" for kind in KINDS])
    text = json.dumps(numbers(), indent=1) + "\n" if kind == "json" else _page(
        f"{template}.{kind}.j2", view(), escape=kind == "html"
    )  # fmt: skip
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise InputError("cannot write the report", f"{path} ({error.strerror})") from None


def _page(template: str, view: Mapping[str, Any], escape: bool) -> str:
    return str(_environment(escape).get_template(template).render(view))


@cache
def _environment(escape: bool) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hwmpq.report"), autoescape=escape, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["cell"] = _cell
    return environment


def _cell(text: object) -> str:
    """Text inside a Markdown table: no markup, no new cell, no new line."""
    plain = " ".join(str(text).split())
    for mark in "\\`*_[]|":
        plain = plain.replace(mark, f"\\{mark}")
    return plain.replace("<", "&lt;").replace(">", "&gt;")
