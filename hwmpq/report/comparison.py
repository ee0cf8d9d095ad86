"""Two sides of measured cells beside each other, as a page, Markdown or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hwmpq.report import charts, words, write_twin
from hwmpq.report.content import Entry


def write(told: Entry, path: Path) -> None:
    """told: what `store compare --json` prints. The file's ending says what as. Raises
    InputError."""
    write_twin(path, "comparison", lambda: view(told), lambda: told)


def view(told: Entry) -> dict[str, Any]:
    """The variables of both templates; cells: the slowest of b over a first."""
    cells = [{**cell, "name": _name(cell["workload"])} for cell in told["cells"]]
    drawn = _plane([cell for cell in cells if cell["ratio"]])
    return {
        "title": f"{told['a']} beside {told['b']}", "verdict": verdict(told),
        "a": told["a"], "b": told["b"], "formats": told["formats"],
        "cells": sorted(cells, key=lambda cell: -(cell["ratio"] or 0.0)),
        "charts": [drawn] if drawn else [], "words": words,
    }  # fmt: skip


def verdict(told: Entry) -> str:
    """How b does in each format, and in how many cells."""
    means = [f"{name} {row['ratio']:.2f}" for name, row in told["formats"].items()]
    counts = [f"{count} {word.lower()}" for word, count in sorted(told["counts"].items())]
    text = f"Cells of B: {', '.join(counts)}."
    if means:
        text += f" Seconds of B over A, geometric means: {', '.join(means)}."
    rest = [f"{told[f'only_{side}']} only in {side.upper()}" for side in "ab"
            if told[f"only_{side}"]]  # fmt: skip
    return f"{text} Beside them, {', '.join(rest)}." if rest else text


def _name(workload: Entry) -> str:
    dims = "×".join(str(size) for size in dict(workload["dims"]).values())
    return f"{workload['op']} {dims}"


def _plane(cells: list[dict[str, Any]]) -> charts.Chart | None:
    """Seconds of b against those of a; below the line b is faster."""
    colour = charts.tones(sorted(cell["format"] for cell in cells))
    groups: dict[str, list[charts.Chart]] = {name: [] for name in colour}
    for cell in cells:
        a, b = cell["latency_s"]
        groups[cell["format"]].append({
            "x": 1e6 * a, "y": 1e6 * b, "r": 4.0,
            "text": [f"{cell['name']} in {cell['format']}", f"A {words.seconds(a)}",
                     f"B {words.seconds(b)}, {cell['ratio']:.2f} times as long"],
        })  # fmt: skip
    return charts.chart(
        "plane", "seconds of B against seconds of A",
        charts.axis("A, µs", log=True), charts.axis("B, µs", log=True),
        charts.clouds(groups, colour),
        [charts.rule("ratio", 1.0)],
    )  # fmt: skip
