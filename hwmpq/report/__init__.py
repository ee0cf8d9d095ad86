"""A result as a page for people: one self-contained HTML file, or Markdown.

Everything shown is escaped; the page loads nothing from elsewhere and runs without a network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hwmpq.errors import InputError
from hwmpq.report import words

__all__ = ["html", "markdown", "read", "words"]


def html(
    result: Mapping[str, Any],
    rows: Sequence[Any],
    frontier: Sequence[Mapping[str, Any]],
    path: str | Path,
) -> None:
    """Write the page. result: result.json; rows: objects or dicts with the fields of LayerRow;
    frontier: plans {"loss", "latency_s", "nbytes", "assignment"}.

    Raises InputError where the file cannot be written.
    """
    _write(Path(path), "report.html.j2", result, rows, frontier, escape=True)


def markdown(
    result: Mapping[str, Any],
    rows: Sequence[Any],
    frontier: Sequence[Mapping[str, Any]],
    path: str | Path,
) -> None:
    """Write the same as Markdown, without charts. Raises as `html`."""
    _write(Path(path), "report.md.j2", result, rows, frontier, escape=False)


def read(path: Path) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """A result.json, with layers and frontier from the rows.json beside it; without that file
    layers as the assignment tells. Raises InputError for another kind of file."""
    result = _json(path)
    if not isinstance(result, dict) or result.get("version") != 1 or "status" not in result:
        raise InputError(f"{path} is no result", None, "the result.json that quantize wrote")
    beside = path.with_name("rows.json")
    more = _json(beside) if beside.is_file() else {}
    rows = more.get("rows") or [
        {"name": name, "format": fmt, **(words.part(result, "kernels", name) or {})}
        for name, fmt in (result.get("assignment") or {}).items()
    ]
    return result, rows, more.get("frontier") or []


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("cannot read the result", f"{path} ({error})", "result.json") from None


def _write(
    path: Path, template: str, result: Mapping[str, Any], rows: Sequence[Any],
    frontier: Sequence[Mapping[str, Any]], escape: bool,
) -> None:  # fmt: skip
    import jinja2

    from hwmpq.report.view import view

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hwmpq.report"), autoescape=escape, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["cell"] = _cell
    text = environment.get_template(template).render(view(result, rows, frontier, charts=escape))
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise InputError("cannot write the report", f"{path} ({error.strerror})") from None


def _cell(text: object) -> str:
    """Text inside a Markdown table: no markup, no new cell, no new line."""
    plain = " ".join(str(text).split())
    for mark in "\\`*_[]|":
        plain = plain.replace(mark, f"\\{mark}")
    return plain.replace("<", "&lt;").replace(">", "&gt;")
