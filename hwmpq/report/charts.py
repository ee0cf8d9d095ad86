"""The charts of a page as data: `templates/charts.js` draws them.

A chart: {"id", "label", "x", "y": axes, "series", "rules"}. An axis: {"title", "log", "zero": does
it begin there, "names": those of the numbers 0, 1, ..}. A series: {"name", "kind": points, line or
bars, "tone": its colour, "mark", "fill": solid, hollow or hatched, "points"}. A point: x, y, ends
of intervals, r: its size, label, and text: the lines shown when it is pointed at. A rule is a
straight line. Times are in ms or µs here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from typing import Any

from hwmpq.report import words
from hwmpq.report.content import Content
from hwmpq.report.words import part

Chart = dict[str, Any]
Entry = Mapping[str, Any]
#: Colours by number; the style sheet knows as many.
TONES = 12
#: Radius of a mark without a size, and what the largest size adds.
_LEAST_R, _MORE_R = 4.0, 8.0
_FILLS = {"native": "solid", "storage-only": "hatched", "emulated": "hollow"}
MARKS = ("circle", "square", "diamond", "triangle")


def chart(name: str, label: str, x: Chart, y: Chart, series: Iterable[Chart],
          rules: Sequence[Chart] = ()) -> Chart | None:  # fmt: skip
    """None where there is nothing to draw. label: for those who do not see it."""
    shown = [one for one in series if one["points"]]
    if not shown:
        return None
    return {"id": name, "label": label, "x": x, "y": y, "series": shown, "rules": list(rules)}


def axis(title: str, *, log: bool = False, zero: bool = False,
         names: Sequence[str] | None = None) -> Chart:  # fmt: skip
    return {"title": title, "log": log, "zero": zero, "names": names}


def series(name: str, kind: str, tone: str, points: Iterable[Chart], **more: Any) -> Chart:
    return {"name": name, "kind": kind, "tone": tone, "fill": "solid", "mark": None,
            **more, "points": list(points)}  # fmt: skip


def clouds(groups: Mapping[str, Iterable[Chart]], colour: Mapping[str, str]) -> list[Chart]:
    """A series of hollow points for each group, with a colour and a mark of its own."""
    return [
        series(name, "points", colour[name], points, fill="hollow", mark=MARKS[i % len(MARKS)])
        for i, (name, points) in enumerate(groups.items())
    ]


def tones(names: Iterable[str]) -> dict[str, str]:
    """Name -> colour, the same for the same names in the same order."""
    return {name: f"c{i % TONES}" for i, name in enumerate(dict.fromkeys(names))}


def accuracy(content: Content) -> Chart | None:
    """Accuracy against measured time; the larger the mark, the more bytes."""
    result = content.result
    known = result.get("accuracy") or {}
    base = known.get("float")
    points = {name: _baseline(name, one) for name, one in (result.get("baselines") or {}).items()}
    ours = {
        "latency_s": part(result, "latency_s", "measured"),
        "interval": part(result, "latency_s", "measured_interval"),
        "accuracy": known.get("deployed"), "nbytes": part(result, "nbytes", "weights"),
    }  # fmt: skip
    own = _baseline("this plan", ours)
    if own and base is not None and known.get("drop_interval"):
        low, high = (base - drop for drop in reversed(known["drop_interval"]))
        own |= {"yl": low, "yh": high}
        own["text"].append(f"accuracy {words.percent(low)} to {words.percent(high)} (95 %)")
    judged = [
        _place(plan["latency_s"], base - plan["drop"], plan.get("nbytes"), None,
               f"frontier plan, {_mix(plan)}", "time predicted, drop simulated on "
               f"{plan.get('n')} held-out images")
        for plan in content.frontier if base is not None and plan.get("drop") is not None
    ]  # fmt: skip
    peers = [
        _place(part(peer, "latency_s", "median"), base, None,
               part(peer, "latency_s", "interval"), str(peer.get("name")),
               str(peer.get("description") or "the float model"), label=str(peer.get("name")))
        for peer in content.peers if base is not None
    ]  # fmt: skip
    size = [p for p in (own, *points.values(), *judged) if p]
    _sized(size)
    budget = part(result, "latency_s", "budget")
    return chart(
        "accuracy", "accuracy against measured time, larger marks hold more bytes",
        axis("time of a run, ms", zero=True), axis(f"{known.get('metric') or 'accuracy'}, %"),
        [
            series("frontier, predicted and simulated", "points", "soft", judged, mark="circle",
                   fill="hollow"),
            series("uniform artifacts", "points", "c1", [p for p in points.values() if p],
                   mark="square"),
            series("other runtimes, float", "points", "c3", peers, mark="triangle"),
            series("this plan", "points", "c0", [own] if own else [], mark="circle"),
        ],
        [] if budget is None else [rule("x", 1e3 * budget, "budget", "limit")],
    )  # fmt: skip


def frontier(content: Content) -> Chart | None:
    """Least loss for every time, and what was really timed."""
    plans = sorted(content.frontier, key=lambda plan: plan.get("latency_s") or 0.0)
    curve = [
        _place(p["latency_s"], p["loss"], p.get("nbytes"), None, f"loss {words.loss(p['loss'])}",
               _mix(p), _bought(p))
        for p in plans
    ]  # fmt: skip
    timed = [
        _place(a["measured_s"], a["loss"], a.get("nbytes"), None, str(a["name"]),
               f"loss {words.loss(a['loss'])}", f"priced at {words.seconds(a['predicted_s'])}")
        for a in content.evidence.get("artifacts") or () if a.get("loss") is not None
    ]  # fmt: skip
    _sized([*curve, *timed])
    budget = part(content.result, "latency_s", "budget")
    return chart(
        "frontier", "loss against time of the best plans",
        axis("time of a run, ms", zero=True), axis("loss", log=True),
        [series("best plans, by price", "line", "c0", curve, mark="circle", steps=True),
         series("artifacts that were timed", "points", "c1", timed, mark="diamond",
                fill="hollow")] if len(curve) > 1 else [],
        [] if budget is None else [rule("x", 1e3 * budget, "budget", "limit")],
    )  # fmt: skip


def layers(rows: Sequence[Entry]) -> list[Chart]:
    """Per layer: times, losses, bits; a colour per format, a filling per execution."""
    colour = tones(sorted(row["format"] for row in rows))
    names = [row["name"] for row in rows]

    def bars(value: Callable[[Entry], float | None]) -> list[Chart]:
        groups: dict[tuple[str, str], list[Chart]] = {}
        for i, row in enumerate(rows):
            if (y := value(row)) is not None:
                point = {"x": i, "y": y, "text": _layer_text(row)}
                groups.setdefault((row["format"], row["execution"]), []).append(point)
        return [
            series(f"{fmt} {how}".strip(), "bars", colour[fmt], points,
                   fill=_FILLS.get(how, "solid"))
            for (fmt, how), points in sorted(groups.items())
        ]  # fmt: skip

    def taken(row: Entry) -> float | None:
        return _scaled(row["predicted_s"] if row["measured_s"] is None else row["measured_s"], 1e6)

    foretold = [
        {"x": i, "y": 1e6 * row["predicted_s"], "text": _layer_text(row)}
        for i, row in enumerate(rows)
        if row["predicted_s"] is not None and row["measured_s"] is not None
    ]
    across = axis("", names=names)
    return [found for found in (
        chart("layer-times", "time of each layer", across, axis("time, µs", zero=True),
              [*bars(taken), series("predicted", "points", "ink", foretold, mark="tick")]),
        chart("layer-losses", "loss of each layer", across, axis("loss", zero=True),
              bars(lambda row: row["loss"])),
        chart("layer-bits", "bits of each layer's weights", across, axis("weight bits", zero=True),
              bars(lambda row: row["bits"])),
    ) if found]  # fmt: skip


def parity(name: str, title: str, points: Sequence[Entry], key: str) -> Chart | None:
    """Predicted against measured seconds, a colour per value of `key`."""
    usable = [p for p in points if p.get("predicted_s") and p.get("measured_s")]
    colour = tones(sorted(str(p[key]) for p in usable))
    groups: dict[str, list[Chart]] = {group: [] for group in colour}
    for p in usable:
        error = 100 * (p["predicted_s"] / p["measured_s"] - 1)
        groups[str(p[key])].append({
            "x": 1e6 * p["measured_s"], "y": 1e6 * p["predicted_s"], "r": _LEAST_R,
            "text": [
                " ".join(str(p[word]) for word in ("name", "op", "format") if p.get(word)),
                f"measured {words.seconds(p['measured_s'])}",
                f"predicted {words.seconds(p['predicted_s'])} ({error:+.1f} %)",
            ],
        })  # fmt: skip
    return chart(
        name, title, axis("measured, µs", log=True), axis("predicted, µs", log=True),
        [series(group, "points", colour[group], found, mark=MARKS[i % len(MARKS)],
                fill="hollow") for i, (group, found) in enumerate(groups.items())],
        [rule("ratio", 1.0), rule("ratio", 1.1, tone="faint"), rule("ratio", 0.9, tone="faint")],
    )  # fmt: skip


def curves(scalars: Sequence[Entry]) -> list[Chart]:
    """What a search by training recorded, over its steps: one chart per scalar."""
    names = [name for name in (scalars[0] if scalars else ()) if name != "step"]
    found = []
    for i, name in enumerate(names):
        points = [
            {"x": row["step"], "y": row[name],
             "text": [f"step {row['step']:.0f}", f"{name} {row[name]:.4g}"]}
            for row in scalars if row.get(name) is not None
        ]  # fmt: skip
        rules = [rule("y", 1.0, "target", "limit")] if name.endswith("/ target") else []
        found.append(chart(f"curve-{i}", f"{name} over the steps", axis("step", zero=True),
                           axis(name), [series(name, "line", "c0", points)], rules))  # fmt: skip
    return [one for one in found if one]


def rule(kind: str, at: float, text: str = "", tone: str = "ink") -> Chart:
    """kind: x, y, or ratio: y = at · x."""
    return {"kind": kind, "at": at, "text": text, "tone": tone}


def _baseline(name: str, one: Entry) -> Chart | None:
    if not one.get("latency_s") or one.get("accuracy") is None:
        return None
    return _place(one["latency_s"], one["accuracy"], one.get("nbytes"), one.get("interval"), name,
                  f"accuracy {words.percent(one['accuracy'])}", label=name)  # fmt: skip


def _place(
    seconds: float, y: float, nbytes: float | None, interval: Sequence[float] | None, *text: str,
    label: str = "",
) -> Chart:  # fmt: skip
    low, high = (None, None) if interval is None else (1e3 * end for end in interval)
    lines = [*text[:1], words.seconds(seconds), *text[1:]]
    if interval is not None:
        lines.insert(2, f"{words.interval(interval)} (95 %)")
    if nbytes is not None:
        lines.append(f"weights {words.nbytes(nbytes)}")
    return {"x": 1e3 * seconds, "y": y, "xl": low, "xh": high, "nbytes": nbytes, "label": label,
            "text": [line for line in lines if line]}  # fmt: skip


def _sized(points: Sequence[Chart]) -> None:
    """Areas that grow with the bytes."""
    top = max((p["nbytes"] for p in points if p["nbytes"]), default=1.0)
    for p in points:
        p["r"] = _LEAST_R + _MORE_R * sqrt((p["nbytes"] or 0.0) / top)


def _layer_text(row: Entry) -> list[str]:
    lines = [
        row["name"], f"{row['format']} {row['execution']}",
        f"predicted {words.seconds(row['predicted_s'])}",
        f"in the artifact {words.seconds(row['measured_s'])}"
        if row["measured_s"] is not None else "",
        f"loss {words.loss(row['loss'])}", f"{row['op']} {row['shape']}", row["kernel"],
    ]  # fmt: skip
    return [line for line in lines if line.strip()]


def _mix(plan: Entry) -> str:
    return words.mix((plan.get("assignment") or {}).values())


def _bought(plan: Entry) -> str:
    rate = plan.get("loss_per_s")
    return "" if rate is None else f"a ms more saves a loss of {words.loss(1e-3 * rate)}"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value
