"""An evaluation of a target as a page, Markdown or JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from hwmpq.errors import InputError
from hwmpq.report import account, charts, words, write_twin
from hwmpq.report.content import EVALUATION, Entry, json_of


def read(path: Path) -> Entry:
    """An evaluation.json. Raises InputError for another kind of file."""
    found = json_of(path)
    if not is_evaluation(found):
        raise InputError(
            f"{path} is no evaluation", None, f"the {EVALUATION} of `hwmpq target evaluate`"
        )
    return dict(found)


def is_evaluation(found: Any) -> bool:
    return isinstance(found, dict) and found.get("kind") == "evaluation"


def write(found: Entry, path: Path) -> None:
    """Write the report; the file's ending says what as. Raises InputError."""
    write_twin(path, "evaluation", lambda: view(found), lambda: {**found, **summary(found)})


def anonymized(found: Entry) -> dict[str, Any]:
    """Without machine, device and dates; layers are numbered."""
    kept = {name: value for name, value in found.items()
            if name not in ("device", "fingerprint", "machine", "date")}  # fmt: skip
    networks = []
    for n, network in enumerate(found["networks"], 1):
        new = {name: f"layer {i}" for i, name in enumerate(_names(network), 1)}
        networks.append({
            **network, "model": f"network {n}", "failures": {},
            "cells": [{**cell, "layer": new[cell["layer"]]} for cell in network["cells"]],
            "plans": {
                name: {**plan, "assignment": {new[layer]: fmt for layer, fmt
                                              in plan["assignment"].items()}}
                for name, plan in network["plans"].items()
            },
        })  # fmt: skip
    return {**kept, "networks": networks}


def summary(found: Entry) -> dict[str, Any]:
    """What the numbers of all networks come to: {"formats": per format, "parity"}."""
    return {"formats": _formats(found), "parity": account.parity(_cells(found))}


def view(found: Entry) -> dict[str, Any]:
    """The variables of both templates."""
    machine = found.get("machine") or {}
    cells = _cells(found)
    told = summary(found)
    environment = [
        ("machine", machine.get("model")), ("cores", machine.get("cores")),
        ("device", found.get("device")), ("fingerprint", found.get("fingerprint")),
        ("threads", found.get("threads")), ("features", " ".join(found.get("features") or ())),
        ("reads", ", ".join(f"{level} {rate / 1e9:.1f} GB/s" for level, rate
                            in (found.get("bandwidth") or {}).items())),
        ("versions", ", ".join(f"{k} {v}" for k, v in (found.get("versions") or {}).items())),
        ("measured", found.get("date")),
    ]  # fmt: skip
    drawn = [
        _speeds(told["formats"]),
        _roof(cells),
        charts.parity("parity", "cost model against measured cells", cells, "format"),
    ]
    return {
        "title": f"Evaluation of {found['target']}",
        "verdict": verdict(found), "description": found.get("description") or "",
        "networks": [_network(network) for network in found["networks"]],
        "formats": told["formats"], "parity": told["parity"],
        "charts": [one for one in drawn if one],
        "refusals": _refusals(found), "failures": _failures(found),
        "environment": [(k, str(v)) for k, v in environment if v not in (None, "")],
        "words": words,
    }  # fmt: skip


def _names(network: Entry) -> list[str]:
    plans = [plan["assignment"] for plan in network["plans"].values()]
    names = [cell["layer"] for cell in network["cells"]]
    return list(dict.fromkeys([*(layer for plan in plans for layer in plan), *names]))


def _cells(found: Entry) -> list[Entry]:
    return [cell for network in found["networks"] for cell in network["cells"]]


def verdict(found: Entry) -> str:
    """What came out, in two sentences."""
    gains = [network["gain"] for network in found["networks"]]
    if not gains:
        return "Nothing was measured yet."
    over32 = geometric_mean([gain["over_fp32"] for gain in gains])
    over = geometric_mean([gain["over_best_uniform"] for gain in gains])
    timed = all(plan["measured_s"] for network in found["networks"]
                for plan in network["plans"].values())  # fmt: skip
    text = (
        f"{'' if timed else 'By estimates, not timed: '}the fastest mix of formats is "
        f"{over32:.2f} times as fast as fp32 and {over:.2f} times as fast as the best uniform "
        f"format (geometric means of {len(gains)} networks)."
    )
    shares = [f"{row['format']} {100 * row['of_roof']:.0f} %" for row in _formats(found)
              if row["of_roof"] is not None]  # fmt: skip
    if shares:
        text += f" Share of the machine's roof, weighted by time: {', '.join(shares)}."
    return text[0].upper() + text[1:]


def _network(network: Entry) -> dict[str, Any]:
    times = {name: plan["measured_s"] or plan["predicted_s"]
             for name, plan in network["plans"].items()}  # fmt: skip
    top = max(times.values())
    best = min(times.values())
    plans = [
        {"name": name, "seconds": times[name], "width": round(100 * times[name] / top, 2),
         "interval": words.interval(plan.get("interval")), "best": times[name] == best,
         "predicted_s": plan["predicted_s"], "energy": plan.get("energy"),
         "noisy": plan.get("noisy"), "mix": words.mix(plan["assignment"].values())}
        for name, plan in network["plans"].items()
    ]  # fmt: skip
    return {**network, "plans": plans, "parity": account.parity(network["cells"])}


def _formats(found: Entry) -> list[dict[str, Any]]:
    """Per format: cells, geometric mean of the speed-up over fp32 per operator and over all, share
    of the roof weighted by time."""
    base = {_cell_key(cell): cell["measured_s"] for cell in _cells(found)
            if cell["format"] == "fp32"}  # fmt: skip
    rows = []
    for name in dict.fromkeys(cell["format"] for cell in _cells(found)):
        mine = [cell for cell in _cells(found) if cell["format"] == name]
        gains: dict[str, list[float]] = {}
        for cell in mine:
            if fp32 := base.get(_cell_key(cell)):
                gains.setdefault(cell["op"], []).append(fp32 / cell["measured_s"])
        roofs = [(cell["roof"]["roof_s"], cell["measured_s"]) for cell in mine if cell["roof"]]
        every = [gain for group in gains.values() for gain in group]
        rows.append({
            "format": name, "cells": len(mine),
            "execution": ", ".join(sorted({cell["execution"] for cell in mine})),
            "ops": {op: geometric_mean(group) for op, group in gains.items()},
            "speed": geometric_mean(every) if every else None,
            "of_roof": sum(r for r, _ in roofs) / sum(s for _, s in roofs) if roofs else None,
        })  # fmt: skip
    return rows


def _cell_key(cell: Entry) -> str:
    return str(cell["workload"])


def _speeds(formats: Sequence[Entry]) -> charts.Chart | None:
    """Speed-up over fp32: a bar per operator in every format."""
    names = [row["format"] for row in formats]
    ops = list(dict.fromkeys(op for row in formats for op in row["ops"]))
    colour = charts.tones(ops)
    slots = [f"{name} {op}" for name in names for op in ops]
    groups = []
    for o, op in enumerate(ops):
        points = [
            {"x": f * len(ops) + o, "y": row["ops"][op],
             "text": [f"{op} in {row['format']}", f"{row['ops'][op]:.2f} times as fast as fp32"]}
            for f, row in enumerate(formats) if op in row["ops"]
        ]  # fmt: skip
        groups.append(charts.series(op, "bars", colour[op], points))
    return charts.chart(
        "speeds", "speed of layers over fp32, per format and operator",
        charts.axis("", names=slots), charts.axis("times as fast as fp32", zero=True), groups,
        [charts.rule("y", 1.0)],
    )  # fmt: skip


def _roof(cells: Sequence[Entry]) -> charts.Chart | None:
    """Cells in the roofline's plane."""
    shown = [cell for cell in cells if cell["roof"]]
    colour = charts.tones(sorted(cell["format"] for cell in shown))
    groups: dict[str, list[charts.Chart]] = {name: [] for name in colour}
    for cell in shown:
        roof: Mapping[str, Any] = cell["roof"]
        groups[cell["format"]].append({
            "x": roof["intensity"], "y": roof["macs_per_s"] / 1e9, "r": 4.0,
            "text": [
                f"{cell['layer']} in {cell['format']}", cell["kernel"],
                f"{roof['macs_per_s'] / 1e9:.1f} GMAC/s, {roof['bytes_per_s'] / 1e9:.1f} GB/s",
                f"{100 * roof['of_roof']:.0f} % of its roof, bound by {roof['bound']}",
            ],
        })  # fmt: skip
    peaks = sorted({round(cell["roof"]["peak_macs_per_s"] / 1e9, 1) for cell in shown})
    return charts.chart(
        "roof", "MACs per second against MACs per byte",
        charts.axis("MACs per byte", log=True), charts.axis("GMAC/s", log=True),
        charts.clouds(groups, colour),
        [charts.rule("y", peak, f"peak {peak:g}", "faint") for peak in peaks],
    )  # fmt: skip


def _refusals(found: Entry) -> list[dict[str, str]]:
    """Why formats cannot run, on any network and at all: operators and formats of equal reasons
    together."""
    seen = {(item["op"], item["format"]): item["reason"] for network in found["networks"]
            for item in network["refused"]}  # fmt: skip
    for op, reasons in (found.get("unsupported") or {}).items():
        for name, reason in reasons.items():
            seen.setdefault((op, name), reason)
    grouped: dict[str, list[tuple[str, str]]] = {}
    for (op, name), reason in seen.items():
        alike = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w.])", "the format", reason)
        grouped.setdefault(alike, []).append((op, name))
    return [
        {"op": ", ".join(dict.fromkeys(op for op, _ in group)), "reason": reason,
         "formats": ", ".join(dict.fromkeys(name for _, name in group))}
        for reason, group in grouped.items()
    ]  # fmt: skip


def _failures(found: Entry) -> dict[str, str]:
    return {f"{network['model']} {cell}": why for network in found["networks"]
            for cell, why in network["failures"].items()}  # fmt: skip
