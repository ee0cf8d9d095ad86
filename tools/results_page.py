"""Writes docs/results.md from the records in docs/results, in the order of page.toml there.

    python tools/results_page.py

A record is what a bench's `--json` writes (tools/bench/record.py); one that was made otherwise says
so in "recorded". page.toml has the words: title and remarks of each section, and whose figures it
shows.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
HEAD = """# Results

Every table says which program made it, when, and on which machine; run it again on yours. An
interval in brackets is the 95 % interval of a ratio of medians in one interleaved run. Where a goal
was missed, it says so.

<!-- made by tools/results_page.py: change docs/results/page.toml, or run a bench, instead -->
"""


def page(folder: Path) -> str:
    """The whole page. Raises ValueError for a record that no section shows."""
    sections = tomllib.loads((folder / "page.toml").read_text(encoding="utf-8"))["section"]
    records = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*.json")}
    if unused := set(records) - {name for section in sections for name in section["records"]}:
        raise ValueError(f"no section of page.toml shows {sorted(unused)}")
    return "\n".join([HEAD, *(_section(section, records) for section in sections)])


def _section(section: Mapping[str, Any], records: Mapping[str, Any]) -> str:
    parts = [f"## {section['title']}", section["about"].strip()]
    for name in section["records"]:
        parts += [_made(records[name]), *map(_table, records[name]["tables"])]
    return "\n\n".join(parts) + "\n"


def _made(record: Mapping[str, Any]) -> str:
    recorded = f" Recorded {record['recorded']}." if "recorded" in record else ""
    return f"`{record['command']}`, {record['date']}, {record['machine']}.{recorded}"


def _table(table: Mapping[str, Any]) -> str:
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    rows = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
    return f"**{table['title']}**\n\n{rows}" if table.get("title") else rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    (DOCS / "results.md").write_text(page(DOCS / "results"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
