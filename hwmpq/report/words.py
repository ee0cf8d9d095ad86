"""Numbers and verdicts in plain words: the only place that turns seconds into ms, bytes into MB."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NONE = "–"
#: What an execution means, for legends.
EXECUTIONS = {
    "native": "the multiply instruction takes both operands in this format",
    "storage-only": "stored narrow, decoded to a wider number before a native multiply",
    "emulated": "computed by other instructions than those for this format",
}
SOURCES = {
    "measured": "timed on the device",
    "predicted": "from the cost model",
    "static-model": "counted from the instructions, not timed",
    "imported": "from an imported table",
}


def seconds(value: Any) -> str:
    """A time with three significant digits: '12.3 µs', '0.456 ms', '1.20 s'."""
    if not _number(value):
        return NONE
    for unit, scale, least in (("s", 1.0, 1.0), ("ms", 1e3, 1e-4)):
        if abs(value) >= least:
            return f"{_digits(value * scale)} {unit}"
    return f"{_digits(value * 1e6)} µs"


def nbytes(value: Any) -> str:
    """A size in decimal units: '812 B', '56.6 kB', '4.20 MB'."""
    if not _number(value):
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{_digits(value / scale)} {unit}"
    return f"{value:.0f} B"


def percent(value: Any) -> str:
    return f"{value:.2f} %" if _number(value) else NONE


def points(value: Any) -> str:
    return f"{value + 0.0:+.2f}" if _number(value) else NONE  # no -0.00


def loss(value: Any) -> str:
    return f"{value:.3g}" if _number(value) else NONE


def times(value: Any) -> str:
    return f"{value:.2f}×" if _number(value) else NONE


def mix(formats: Iterable[str]) -> str:
    """How many layers are in which format: '12 × w8a8, 2 × fp32'."""
    return ", ".join(f"{count} × {fmt}" for fmt, count in Counter(formats).most_common())


def interval(pair: Any) -> str:
    """'0.41 ms to 0.43 ms', or a dash when an end is unknown."""
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(map(_number, pair)):
        return NONE
    return f"{seconds(pair[0])} to {seconds(pair[1])}"


def part(result: Mapping[str, Any], *path: str) -> Any:
    """A value deep in a result, None where any step is missing."""
    found: Any = result
    for name in path:
        if not isinstance(found, Mapping):
            return None
        found = found.get(name)
    return found


def verdict(result: Mapping[str, Any]) -> str:
    """One or two sentences: what was promised, what was measured."""
    status = "dry-run" if result.get("dry_run") else result.get("status")
    measured, budget = part(result, "latency_s", "measured"), part(result, "latency_s", "budget")
    drop = part(result, "accuracy", "drop")
    estimate = seconds(part(result, "latency_s", "predicted"))
    time = f"{seconds(measured)} measured" if _number(measured) else f"{estimate}, not timed,"
    if _number(measured) and interval(part(result, "latency_s", "measured_interval")) != NONE:
        time += f" (95 % interval {interval(part(result, 'latency_s', 'measured_interval'))})"
    limit = f"the budget of {seconds(budget)}" if _number(budget) else "the request"
    sentences = {
        "met": f"Met: {time}, within {limit}.",
        "missed": f"Missed: {time}, over {limit}.",
        "infeasible": f"Infeasible: no choice of formats meets {limit}.",
        "accuracy": f"Too inaccurate: {time}, but the accuracy drop is larger than allowed.",
        "slower": f"Slower: {time}, which is more than the fp32 model takes here.",
        "dry-run": "Planned only: no network was compiled.",
    }
    text = sentences.get(str(status), f"{str(status).capitalize()}.")
    if status == "missed" and result.get("ambiguous"):
        text = f"Undecided: {time}; the interval lies on both sides of {limit}."
    words = [text]
    reason = part(result, "error", "what")
    if reason:
        words.append(f"{reason}. {part(result, 'error', 'next') or ''}".strip())
    base = part(result, "baselines", "fp32", "latency_s")
    if _number(measured) and measured > 0 and _number(base):
        words.append(f"That is {base / measured:.2f} times as fast as the fp32 model.")
    if _number(drop):
        metric = part(result, "accuracy", "metric") or "accuracy"
        known = part(result, "accuracy", "deployed"), part(result, "accuracy", "simulated")
        reached = percent(next((value for value in known if value is not None), None))
        words.append(f"{metric} {reached}, {points(-drop)} points against float.")
    return " ".join(words)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _digits(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
