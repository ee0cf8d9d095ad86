"""Where the time of an artifact goes, and how far predictions were off: numbers for all twins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Entry = Mapping[str, Any]
#: Groups of steps in the order of the waterfall; what has a name of its own comes in between.
ENCODE, OUTSIDE = "re-encoding between formats", "outside of kernels"


def waterfall(steps: Sequence[Entry], measured_s: float | None) -> list[dict[str, Any]]:
    """Groups of an artifact's kernel calls: {"name", "count", "predicted_s", "measured_s",
    "start_s": where it begins when each follows the one before}.

    measured_s: of the whole run; what its kernels leave of it comes last. Where no call was timed,
    start_s goes by predictions.
    """
    groups: dict[str, list[Entry]] = {}
    for kind in ("layer", "encode", "glue"):
        for step in steps:
            if step["kind"] == kind:
                groups.setdefault(_group(step), []).append(step)
    found: list[dict[str, Any]] = [
        {"name": name, "count": len(group), "predicted_s": _sum(group, "predicted_s"),
         "measured_s": _sum(group, "measured_s")}
        for name, group in groups.items()
    ]  # fmt: skip
    timed = bool(steps) and all(step["measured_s"] is not None for step in steps)
    if timed and measured_s is not None:
        rest = measured_s - sum(step["measured_s"] for step in steps)
        found.append({"name": OUTSIDE, "count": 0, "predicted_s": None, "measured_s": rest})
    start = 0.0
    for group in found:
        group["start_s"] = start
        start += group["measured_s" if timed else "predicted_s"] or 0.0
    return found


def parity(points: Sequence[Entry]) -> dict[str, float] | None:
    """{"n", "median": of the relative errors' sizes, "within": share of at most 10 %, "worst"} of
    points with predicted_s and measured_s."""
    errors = [
        abs(p["predicted_s"] / p["measured_s"] - 1)
        for p in points
        if p.get("predicted_s") and p.get("measured_s")
    ]
    if not errors:
        return None
    return {"n": len(errors), "median": median(errors), "worst": max(errors),
            "within": sum(error <= 0.1 for error in errors) / len(errors)}  # fmt: skip


def _group(step: Entry) -> str:
    if step["kind"] == "layer":
        return f"{step['op']} layers"
    return ENCODE if step["kind"] == "encode" else str(step["op"])


def _sum(steps: Sequence[Entry], name: str) -> float | None:
    values = [step[name] for step in steps]
    return None if any(value is None for value in values) else sum(values)
