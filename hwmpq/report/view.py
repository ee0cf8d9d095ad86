"""From a result to what the templates show: plain texts, numbers, lengths of bars."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hwmpq.errors import UnknownName
from hwmpq.formats import format_named
from hwmpq.report import account, charts, learning, words
from hwmpq.report.content import Content, Entry
from hwmpq.report.words import part

#: A class of colour per status.
_TONES = {"met": "good", "infeasible": "bad", "error": "bad"}
_FIELDS = (
    *("name", "op", "shape", "format", "kernel", "execution", "loss"),
    *("predicted_s", "measured_s", "options", "why_not", "latency_source"),
)
#: What the parity of predictions is shown for: evidence, in words, and what its colours tell.
_PARITIES = (
    ("artifacts", "whole artifacts, by the sum of their parts", "name"),
    ("steps", "kernel calls inside the artifact, by their prices", "kind"),
    ("cells", "layers in formats, by the cost model", "format"),
)
#: Options that say where things lie, not what is done.
_PLACES = ("store", "out", "train_out", "fresh", "dry_run")


def view(content: Content) -> dict[str, Any]:
    """The variables of both templates."""
    result, evidence = content.result, content.evidence
    layers = [_row(row, result) for row in content.rows]
    plans = [_plan(plan) for plan in
             sorted(content.frontier, key=lambda p: p.get("latency_s") or 0.0)]  # fmt: skip
    return {
        "title": f"{result.get('model', 'model')} on {result.get('target', 'target')}",
        "tone": _TONES.get(str(result.get("status")), "warn"),
        "verdict": words.verdict(result),
        "facts": _facts(result),
        "budget": _budget(result),
        "bars": _bars(content),
        "layers": layers,
        "totals": _totals(layers),
        "mix": Counter(row["format"] for row in layers).most_common(),
        "plans": plans,
        "waterfall": _waterfall(content),
        "parities": _parities(evidence),
        "policy": learning.strips(evidence.get("policy")),
        "charts": _charts(content, layers),
        "executions": {e: words.EXECUTIONS[e] for e in words.EXECUTIONS
                       if any(row["execution"] == e for row in layers)},
        "sources": {s: words.SOURCES[s] for s in words.SOURCES
                    if any(row["source"] == s for row in layers)},
        "refusals": _refusals(layers),
        "failures": {str(k): str(v) for k, v in (result.get("failures") or {}).items()},
        "timed": any(row["measured_s"] is not None for row in layers),
        "beside": any("fp32" in row["options"] for row in layers),
        "doubts": doubts(part(result, "environment", "quality") or {}),
        "environment": _environment(result),
        "reproduce": command(result),
        "seconds": {k: words.seconds(v) for k, v in (result.get("seconds") or {}).items()},
        "words": words,
    }  # fmt: skip


def numbers(content: Content) -> dict[str, Any]:
    """The JSON twin: what the page shows, as numbers."""
    measured = part(content.result, "latency_s", "measured")
    evidence = content.evidence
    return {
        "version": 1, "verdict": words.verdict(content.result), "result": content.result,
        "layers": [_row(row, content.result) for row in content.rows],
        "frontier": content.frontier, "peers": content.peers, "evidence": evidence,
        "waterfall": account.waterfall(evidence.get("steps") or (), measured),
        "parity": {name: account.parity(evidence.get(name) or ()) for name, _, _ in _PARITIES},
        "doubts": doubts(part(content.result, "environment", "quality") or {}),
        "reproduce": command(content.result),
    }  # fmt: skip


def _charts(content: Content, layers: Sequence[Entry]) -> list[charts.Chart]:
    evidence = content.evidence
    found = [
        charts.accuracy(content), charts.frontier(content), *charts.layers(layers),
        *(charts.parity(name, title, evidence.get(name) or (), key)
          for name, title, key in _PARITIES),
        *charts.curves(evidence.get("scalars") or ()),
    ]  # fmt: skip
    return [chart for chart in found if chart]


def _row(given: Entry, result: Entry) -> dict[str, Any]:
    found = {name: given.get(name) for name in _FIELDS}
    for name in ("name", "op", "shape", "format", "kernel", "execution"):
        found[name] = "" if found[name] is None else str(found[name])
    source = found["latency_source"] or part(
        result, "kernels", str(found["name"]), "latency_source"
    )
    found["source"], found["bits"] = source or "", _bits(str(found["format"]))
    found["options"], found["why_not"] = found["options"] or {}, found["why_not"] or {}
    return found


def _bits(name: str) -> int | None:
    """Of a weight; None for a format that another installation knows."""
    try:
        return format_named(name).weight.bits
    except UnknownName:
        return None


def _facts(result: Entry) -> list[tuple[str, str, str]]:
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


def _budget(result: Entry) -> dict[str, Any] | None:
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
    limit = [("budget", words.seconds(budget), times.get("statistic") or "")] if budget else []
    return {
        **at, "low": round(100 * low / top, 3),
        "width": max(0.4, round(100 * (high - low) / top, 3)),
        "rows": [
            *limit,
            ("measured", words.seconds(measured), words.interval(ends)),
            ("predicted", words.seconds(times.get("predicted")), words.interval(spread)),
        ],
    }  # fmt: skip


def _bars(content: Content) -> list[dict[str, Any]]:
    """Ours, the uniform models and other runtimes: latency as length, the rest as text."""
    result = content.result
    ours = {
        "latency_s": part(result, "latency_s", "measured"),
        "accuracy": part(result, "accuracy", "deployed"),
        "nbytes": part(result, "nbytes", "weights"),
    }
    peers = {
        f"{peer.get('name')}, float": {
            "latency_s": part(peer, "latency_s", "median"),
            "accuracy": part(peer, "accuracy", "top1"),
        }
        for peer in content.peers
    }
    every = {"this plan": ours, **(result.get("baselines") or {}), **peers}
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


def _plan(plan: Entry) -> dict[str, Any]:
    return {
        **{name: plan.get(name) for name in ("latency_s", "loss", "drop", "nbytes")},
        "mix": words.mix((plan.get("assignment") or {}).values()),
    }


def _waterfall(content: Content) -> list[dict[str, Any]]:
    """The groups with where their bars begin and how long they are, in percent of all bars."""
    steps = content.evidence.get("steps") or ()
    found = account.waterfall(steps, part(content.result, "latency_s", "measured"))
    sizes = [
        group["predicted_s"] if group["measured_s"] is None else group["measured_s"]
        for group in found
    ]
    whole = sum(size for size in sizes if size and size > 0) or 1.0
    return [
        {**group, "left": 100 * max(group["start_s"], 0.0) / whole,
         "width": 100 * max(size or 0.0, 0.0) / whole, "share": 100 * (size or 0.0) / whole}
        for group, size in zip(found, sizes, strict=True)
    ]  # fmt: skip


def _parities(evidence: Entry) -> list[dict[str, Any]]:
    found = [
        {"id": name, "title": title, "told": account.parity(evidence.get(name) or ())}
        for name, title, _ in _PARITIES
    ]
    return [one for one in found if one["told"]]


def _totals(layers: Sequence[Entry]) -> dict[str, Any]:
    def total(name: str) -> Any:
        values = [row[name] for row in layers]
        return None if not values or any(value is None for value in values) else sum(values)

    fp32 = [row["options"].get("fp32") for row in layers]
    return {
        **{name: total(name) for name in ("loss", "predicted_s", "measured_s")},
        "fp32": None if None in fp32 else sum(fp32),
    }


def _refusals(layers: Sequence[Entry]) -> list[dict[str, Any]]:
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


def doubts(quality: Entry) -> list[str]:
    """What speaks against the times, of what was recorded with them; [] where nothing does."""
    around = quality.get("environment") or {}
    load, governor = around.get("load") or [0.0], around.get("governor")
    return [text for held, text in (
        (quality.get("noisy"), "too few quiet epochs: disturbed ones were counted"),
        ((quality.get("steal") or 0.0) > 0.01, "another guest took part of the CPU's time"),
        (abs(quality.get("drift") or 0.0) > 0.05, "the machine's speed changed meanwhile"),
        (load[0] > len(around.get("affinity") or [0]) + 1, f"load average {load[0]:.1f}"),
        (governor not in (None, "performance"), f"the CPU's governor is {governor}"),
        (around.get("virtual"), "a virtual machine: neighbours on its host are not seen"),
    ) if held]  # fmt: skip


def _environment(result: Entry) -> list[tuple[str, str]]:
    names = ("model", "target", "device", "threads", "seed", "data", "method", "sensitivity",
             "new_timings", "rounds", "objective", "bound", "gap", "artifact")  # fmt: skip
    around: Mapping[str, Any] = result.get("environment") or {}
    machine, versions = around.get("machine") or {}, around.get("versions") or {}
    caches = (machine.get("caches") or {}).items()
    told = [(name.replace("_", " "), result.get(name)) for name in names]
    told += [
        ("machine", machine.get("model")),
        ("caches", ", ".join(f"{name} {size >> 10} KiB" for name, size in caches)),
        ("cores", machine.get("cores")), ("fingerprint", around.get("fingerprint")),
        ("operating system", part(around, "quality", "environment", "kernel")),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
        ("measured", around.get("date")), ("schedules", _schedules(result)),
    ]  # fmt: skip
    return [
        (name, f"{value:.4g}" if isinstance(value, float) else str(value))
        for name, value in told if value not in (None, "")
    ]  # fmt: skip


def _schedules(result: Entry) -> str:
    """Whether kernels were tuned: times of tuned and untuned ones do not compare."""
    if "options" not in result:
        return ""
    tuned = part(result, "options", "tune")
    return f"the fastest of {tuned} timed for each cell" if tuned else "by estimate, not tuned"


def command(result: Entry) -> str:
    """The command line that asks for this result again; '' where it was asked for in Python."""
    options = result.get("options")
    if options is None or not (options.get("data") or options.get("calib_data")):
        return ""
    parts = ["hwmpq", "quantize", str(result.get("model"))]
    for name, value in options.items():
        if name in _PLACES:
            continue
        flag = f"--{name.replace('_', '-')}"
        if name in ("pins", "ties"):
            parts += [item for each in value for item in (flag.removesuffix("s"), str(each))]
        elif isinstance(value, bool):
            parts.append(flag)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            parts += [flag, ",".join(map(str, value)) or "none"]
        else:
            parts += [flag, f"{value:g}s" if name == "max_time" else str(value)]
    return shlex.join(parts)
