"""How a policy came to its plan: a strip per decision, from the first step to the last."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hwmpq.report.charts import tones

#: Steps and shots that a report shows at most, evenly spread.
_CURVE, _SHOTS = 200, 48


def recorded(policy: Path, scalars: Path) -> dict[str, Any]:
    """{"policy", "scalars"} of the files that a search by training leaves, thinned out; scalars are
    means over the steps in between."""
    told = json.loads(policy.read_text(encoding="utf-8"))
    kept = _spread(len(told["steps"]), _SHOTS)
    for name in ("steps", "probabilities"):
        told[name] = [told[name][i] for i in kept]
    with scalars.open(encoding="utf-8", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return {"policy": told, "scalars": _thinned(rows)}


def strips(policy: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """{"legend": option -> tone, "rows": [{"name", "cells": [{"tone", "alpha", "text"}], "last"}]}:
    in each cell the most probable option; None without a policy."""
    if not policy:
        return None
    legend = tones(option for options in policy["options"] for option in options)
    rows = []
    for r, (name, options) in enumerate(zip(policy["rows"], policy["options"], strict=True)):
        cells = []
        for step, shot in zip(policy["steps"], policy["probabilities"], strict=True):
            odds = dict(zip(options, shot[r], strict=False))
            best = max(odds, key=lambda option: odds[option])
            told = ", ".join(f"{option} {100 * p:.0f} %" for option, p in odds.items())
            cells.append({"tone": legend[best], "alpha": round(odds[best], 2),
                          "text": f"{name}, step {step}: {told}"})  # fmt: skip
            last = f"{best} {100 * odds[best]:.0f} %"
        rows.append({"name": name, "cells": cells, "last": last})
    return {"legend": legend, "rows": rows}


def _thinned(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Means of as many neighbours as leave at most _CURVE rows."""
    width = -(-len(rows) // _CURVE)
    parts = [rows[i : i + width] for i in range(0, len(rows), width)]
    return [
        {name: sum(row[name] for row in part) / len(part) for name in part[0]} for part in parts
    ]


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below count, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
