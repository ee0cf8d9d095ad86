"""From a result to what the templates show: plain texts, numbers, lengths of bars."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from hwmpq import toolchain
from hwmpq.report import words
from hwmpq.report.words import part

#: A class of colour per status.
_TONES = {"met": "good", "infeasible": "bad", "error": "bad"}
_FIELDS = (
    *("name", "op", "shape", "format", "kernel", "execution", "loss"),
    *("predicted_s", "measured_s", "options", "why_not", "latency_source"),
)


def view(
    result: Mapping[str, Any], rows: Sequence[Any], frontier: Sequence[Mapping[str, Any]],
    charts: bool,
) -> dict[str, Any]:  # fmt: skip
    """The variables of both templates. charts: with the frontier's chart and its script."""
    layers = [_row(row, result) for row in rows]
    plans = [_plan(plan) for plan in sorted(frontier, key=lambda p: p.get("latency_s") or 0.0)]
    return {
        "title": f"{result.get('model', 'model')} on {result.get('target', 'target')}",
        "tone": _TONES.get(str(result.get("status")), "warn"),
        "verdict": words.verdict(result),
        "facts": _facts(result),
        "budget": _budget(result),
        "bars": _bars(result),
        "layers": layers,
        "totals": _totals(layers),
        "mix": Counter(row["format"] for row in layers).most_common(),
        "plans": plans,
        "chart": _chart(plans, result) if charts and len(plans) > 1 else None,
        "executions": {e: words.EXECUTIONS[e] for e in words.EXECUTIONS
                       if any(row["execution"] == e for row in layers)},
        "sources": {s: words.SOURCES[s] for s in words.SOURCES
                    if any(row["source"] == s for row in layers)},
        "refusals": _refusals(layers),
        "failures": {str(k): str(v) for k, v in (result.get("failures") or {}).items()},
        "timed": any(row["measured_s"] is not None for row in layers),
        "beside": any("fp32" in row["options"] for row in layers),
        "environment": _environment(result),
        "seconds": {k: words.seconds(v) for k, v in (result.get("seconds") or {}).items()},
        "words": words,
    }  # fmt: skip


def _row(row: Any, result: Mapping[str, Any]) -> dict[str, Any]:
    given: Mapping[str, Any]
    if isinstance(row, Mapping):
        given = row
    elif is_dataclass(row) and not isinstance(row, type):
        given = asdict(row)
    else:
        given = vars(row)
    found = {name: given.get(name) for name in _FIELDS}
    for name in ("name", "op", "shape", "format", "kernel", "execution"):
        found[name] = "" if found[name] is None else str(found[name])
    source = found["latency_source"] or part(
        result, "kernels", str(found["name"]), "latency_source"
    )
    found["source"] = source or ""
    found["options"], found["why_not"] = found["options"] or {}, found["why_not"] or {}
    return found


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(heading, value, remark) of the tiles on top."""
    base, accuracy = part(result, "baselines", "fp32"), result.get("accuracy") or {}
    measured = part(result, "latency_s", "measured")
    fp32 = part(base or {}, "latency_s")
    facts = [
        ("measured", words.seconds(measured), words.interval(
            part(result, "latency_s", "measured_interval"))),
        ("faster than fp32", words.times(fp32 / measured if fp32 and measured else None),
         f"fp32 takes {words.seconds(fp32)}" if fp32 else ""),
        ("accuracy", words.percent(accuracy.get("deployed")),
         f"float {words.percent(accuracy.get('float'))}, on {accuracy.get('n')} samples"
         if accuracy.get("n") else ""),
        ("weights", words.nbytes(part(result, "nbytes", "weights")),
         f"fp32 {words.nbytes(part(base or {}, 'nbytes'))}" if base else ""),
    ]  # fmt: skip
    return [fact for fact in facts if fact[1] != words.NONE]


def _budget(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Positions in percent of the width, for the measured interval beside the budget."""
    times = result.get("latency_s") or {}
    measured, budget = times.get("measured"), times.get("budget")
    if not measured:
        return None
    ends = times.get("measured_interval") or [measured, measured]
    spread = times.get("predicted_interval") or []
    every = [x for x in (measured, budget, times.get("predicted"), *ends, *spread) if x]
    top = 1.08 * max(every)
    at = {
        name: None if value is None else round(100 * value / top, 3)
        for name, value in (("measured", measured), ("budget", budget),
                            ("predicted", times.get("predicted")))
    }  # fmt: skip
    low, high = ends
    return {
        **at, "low": round(100 * low / top, 3),
        "width": max(0.4, round(100 * (high - low) / top, 3)),
        "rows": [
            ("budget", words.seconds(budget), times.get("statistic") or ""),
            ("measured", words.seconds(measured), words.interval(ends)),
            ("predicted", words.seconds(times.get("predicted")), words.interval(spread)),
        ],
    }  # fmt: skip


def _bars(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ours and the uniform models: latency as length, the rest as text."""
    ours = {
        "latency_s": part(result, "latency_s", "measured"),
        "accuracy": part(result, "accuracy", "deployed"),
        "nbytes": part(result, "nbytes", "weights"),
    }
    every = {"this plan": ours, **(result.get("baselines") or {})}
    known = {name: base for name, base in every.items() if base and base.get("latency_s")}
    top = max((base["latency_s"] for base in known.values()), default=1.0)
    return [
        {
            "name": name, "ours": base is ours, "width": round(100 * base["latency_s"] / top, 2),
            "latency": words.seconds(base["latency_s"]),
            "accuracy": words.percent(base.get("accuracy")),
            "nbytes": words.nbytes(base.get("nbytes")),
            "torch": words.times(base.get("vs_torch_eager")),
        }
        for name, base in known.items()
    ]  # fmt: skip


def _plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    mix = Counter((plan.get("assignment") or {}).values()).most_common()
    return {
        "latency_s": plan.get("latency_s"), "loss": plan.get("loss"),
        "accuracy": plan.get("accuracy"), "nbytes": plan.get("nbytes"),
        "mix": ", ".join(f"{count} × {fmt}" for fmt, count in mix),
    }  # fmt: skip


def _chart(plans: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> dict[str, Any]:
    """Plotly's figure of the frontier, and its script."""
    from plotly.offline import get_plotlyjs

    hover = [
        f"{words.seconds(p['latency_s'])}, loss {words.loss(p['loss'])}, "
        f"{words.nbytes(p['nbytes'])}<br>{_escaped(p['mix'])}"
        for p in plans
    ]
    trace = {
        "x": [1e3 * p["latency_s"] for p in plans], "y": [p["loss"] for p in plans],
        "text": hover, "hovertemplate": "%{text}<extra></extra>", "mode": "lines+markers",
        "line": {"shape": "hv", "width": 2}, "marker": {"size": 8}, "name": "plans",
    }  # fmt: skip
    budget = part(result, "latency_s", "budget")
    return {
        "data": [trace], "budget_ms": None if budget is None else 1e3 * budget,
        "script": get_plotlyjs(),
    }  # fmt: skip


def _escaped(text: str) -> str:
    """Plotly reads a few tags in its texts."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _totals(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def total(name: str) -> Any:
        values = [row[name] for row in layers]
        return None if not values or any(value is None for value in values) else sum(values)

    fp32 = [row["options"].get("fp32") for row in layers]
    return {
        **{name: total(name) for name in ("loss", "predicted_s", "measured_s")},
        "fp32": None if None in fp32 else sum(fp32),
    }


def _refusals(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Reasons against formats, each once, with the layers it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in layers:
        for fmt, reason in row["why_not"].items():
            found.setdefault((str(fmt), str(reason)), []).append(row["name"])
    return [
        {
            "format": fmt, "reason": reason, "count": len(names),
            "layers": ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else ""),
        }
        for (fmt, reason), names in found.items()
    ]  # fmt: skip


def _environment(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = ("model", "target", "device", "threads", "seed", "data", "sensitivity", "new_timings",
             "rounds", "objective", "bound", "gap", "artifact")  # fmt: skip
    told = [
        (name.replace("_", " "), str(result[name]))
        for name in names
        if result.get(name) is not None
    ]
    versions = ", ".join(f"{k} {v}" for k, v in toolchain.versions().items())
    return [
        *told, ("versions", versions), ("python", platform.python_version()),
        ("written", time.strftime("%Y-%m-%d %H:%M")),
    ]  # fmt: skip
