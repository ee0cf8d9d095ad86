"""Writes docs/results.md from docs/results/*.json, one file per bench.

    python tools/results_page.py

A file holds "title", "order", "command", "date", "machine", "about" (Markdown), and "tables": each
with "columns" and "rows". Figures are typed in nowhere else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
HEAD = """# Results

Every table says which program made it, when, and on which machine; run it again on yours. An
interval in brackets is the 95 % interval of a ratio of medians in one interleaved run. Where a goal
was missed, it says so.

<!-- made by tools/results_page.py: change docs/results/*.json instead -->
"""


def page(folder: Path) -> str:
    """The whole page."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return "\n".join([HEAD, *map(section, sorted(found, key=lambda bench: bench["order"]))])


def section(bench: dict[str, Any]) -> str:
    """One bench."""
    made = f"`{bench['command']}`, {bench['date']}, {bench['machine']}."
    parts = [f"## {bench['title']}", made, bench["about"], *map(table, bench["tables"])]
    return "\n\n".join(parts) + "\n"


def table(told: dict[str, Any]) -> str:
    lines = [told["columns"], ["---"] * len(told["columns"]), *told["rows"]]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> int:
    (DOCS / "results.md").write_text(page(DOCS / "results"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
