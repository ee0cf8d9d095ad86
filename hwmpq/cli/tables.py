"""Results as tables on a terminal (rich). Seconds and bytes become ms and MB here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hwmpq.report import words

_COLOURS = {"met": "bold green", "infeasible": "bold red", "error": "bold red"}
#: Columns that hold words; all others hold numbers and are aligned to the right.
_WORDS = frozenset(
    "layer format kernel execution op shape model target source origin fingerprint features "
    "device cores formats status stage why".split()
)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """A plain table; cells are shown as they are, never read as markup."""
    found = Table(title=title or None, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for head in heads:
        right = head.split(" ")[0] not in _WORDS and head not in ("what it is", "runs here")
        found.add_column(head, justify="right" if right else "left", overflow="fold")
    for row in rows:
        found.add_row(*(Text(str(cell)) for cell in row))
    return found


def quantized(console: Console, result: Any) -> None:
    """The whole result of quantize: layers, totals, baselines, verdict."""
    told = result.json
    cache(console, told)
    if told.get("dry_run"):
        planned(console, told)
        return
    elif result.rows:
        layers(console, result.rows)
    totals(console, told)
    baselines(console, told)
    console.print()
    console.print(Text(words.verdict(told), style=_COLOURS.get(told.get("status"), "bold yellow")))
    for name in ("artifact", "report"):
        if told.get(name):
            console.print(Text(f"{name}: {told[name]}"))


def cache(console: Console, told: Mapping[str, Any]) -> None:
    """What the store had for each stage, and why not the rest, where that was asked."""
    rows: list[list[str]] = []
    for stage in told.get("cache") or []:
        first, *others = [f"{n}: {why}" for why, n in stage["why"].items()] or [""]
        rows.append([stage["stage"], str(stage["reused"]), str(stage["new"]), first])
        rows += [["", "", "", why] for why in others]
    if rows:
        console.print(table(["stage", "reused", "new", "why"], rows))
        console.print()


def planned(console: Console, told: Mapping[str, Any]) -> None:
    """What a run would do, and how long each part of it takes."""
    rows = [
        [part, *(f"{n} {what.replace('_', ' ')}" for what, n in step.items() if what != "seconds"),
         words.seconds(step["seconds"])]
        for part, step in told["forecast"].items()
    ]  # fmt: skip
    console.print(table(["part", "work", "about"], rows))
    console.print(Text(f"formats: {' '.join(told['formats'])}"))
    console.print(
        Text(f"Planned only: about {told['minutes']:.1f} minutes, right to a factor of two.")
    )


def layers(console: Console, rows: Sequence[Any]) -> None:
    """One line per layer: what it takes, how it runs, what it costs alone."""
    columns: dict[str, list[Any]] = {
        "predicted": [r.predicted_s for r in rows],
        "measured": [getattr(r, "measured_s", None) for r in rows],
        "in fp32": [r.options.get("fp32") for r in rows],
    }
    shown = {name: values for name, values in columns.items() if any(values)}
    lines = [
        [
            r.name, r.format, r.kernel, r.execution, words.loss(r.loss),
            *(words.seconds(values[i]) for values in shown.values()),
        ]
        for i, r in enumerate(rows)
    ]  # fmt: skip
    sums = [_sum(words.seconds, values) for values in shown.values()]
    lines.append(["", "", "", "", _sum(words.loss, [r.loss for r in rows]), *sums])
    heads = ["layer", "format", "kernel", "execution", "loss", *shown]
    console.print(table(heads, lines))


def totals(console: Console, told: Mapping[str, Any]) -> None:
    """The plan as a whole, against its budget."""
    times = told.get("latency_s") or {}
    accuracy, sizes = told.get("accuracy") or {}, told.get("nbytes") or {}
    measured = words.seconds(times.get("measured"))
    if words.interval(times.get("measured_interval")) != words.NONE:
        measured += f" ({words.interval(times['measured_interval'])})"
    predicted = words.seconds(times.get("predicted"))
    if words.interval(times.get("predicted_interval")) != words.NONE:
        predicted += f" ({words.interval(times['predicted_interval'])})"
    drop = f"{words.points(accuracy.get('drop'))} points on {accuracy.get('n')} samples"
    rows = [
        ["budget", words.seconds(times.get("budget"))],
        ["whole model, predicted", predicted],
        ["whole model, measured", measured],
        ["accuracy float", words.percent(accuracy.get("float"))],
        ["accuracy deployed", words.percent(accuracy.get("deployed"))],
        ["accuracy drop", drop if accuracy.get("drop") is not None else words.NONE],
        ["weights", words.nbytes(sizes.get("weights"))],
        ["artifact", words.nbytes(sizes.get("artifact"))],
        ["optimality gap", words.loss(told.get("gap"))],
    ]
    console.print()
    for name, value in rows:
        if value != words.NONE:
            console.print(Text(f"{name:<24}{value}"))


def baselines(console: Console, told: Mapping[str, Any]) -> None:
    """Uniform models on the same machine, in the same run."""
    found = told.get("baselines") or {}
    if not found:
        return
    measured = words.part(told, "latency_s", "measured")
    ours = measured or words.part(told, "latency_s", "predicted")
    rows = []
    for name, base in found.items():
        seconds = base.get("latency_s")
        ratio = seconds / ours if seconds and ours else None
        rows.append(
            [
                name, words.seconds(seconds), words.times(ratio),
                words.percent(base.get("accuracy")), words.nbytes(base.get("nbytes")),
                words.times(base.get("vs_torch_eager")),
            ]
        )  # fmt: skip
    heads = ["format", "latency", "times ours", "accuracy", "weights", "vs torch eager"]
    console.print()
    where = "same machine, same run" if measured else "estimated"
    console.print(table(heads, rows, f"Every layer alike, {where}"))


def frontier(console: Console, found: Mapping[str, Any]) -> None:
    """One line per plan."""
    cache(console, found)
    plans = found.get("frontier") or found.get("plans") or []
    rows = []
    for plan in plans:
        counts: dict[str, int] = {}
        for fmt in (plan.get("assignment") or {}).values():
            counts[fmt] = counts.get(fmt, 0) + 1
        mix = " ".join(f"{n}×{fmt}" for fmt, n in counts.items())
        rows.append(
            [
                words.seconds(plan.get("latency_s")), words.loss(plan.get("loss")),
                _per_ms(plan.get("loss_per_s")), words.percent(plan.get("accuracy")),
                words.nbytes(plan.get("nbytes")), mix,
            ]
        )  # fmt: skip
    heads = ["latency", "loss", "one ms more saves", "accuracy", "weights", "formats"]
    console.print(table(heads, rows))


def _per_ms(per_s: float | None) -> str:
    return words.NONE if per_s is None else words.loss(per_s * 1e-3)


def grid(console: Console, found: Mapping[str, Any], key: str) -> None:
    """A value per layer and format: [[...]] in the order of layers and formats, or nested."""
    cache(console, found)
    show = words.seconds if key == "latency_s" else words.loss
    cells, names = found.get(key), list(found.get("formats") or [])
    layers = [x if isinstance(x, str) else x.get("name", "") for x in found.get("layers") or []]
    if isinstance(cells, Mapping):
        names = names or list(dict.fromkeys(f for row in cells.values() for f in row))
        rows = [[layer, *(show(row.get(f)) for f in names)] for layer, row in cells.items()]
    else:
        rows = [[layer, *map(show, row)] for layer, row in zip(layers, cells or [], strict=False)]
    if rows:
        console.print(table(["layer", *names], rows))
    hidden = {key, "layers", "formats", "version", "loss_error", "pair_loss", "pair_error"}
    rest = {k: v for k, v in found.items() if k not in hidden}
    pairs(console, rest)


def inspected(console: Console, found: Mapping[str, Any]) -> None:
    """Layers with sizes and legal formats, then the reasons against the others."""
    rows: list[list[str]] = []
    reasons: dict[tuple[str, str], list[str]] = {}
    for layer in found.get("layers") or []:
        legal = layer.get("formats") or layer.get("legal") or []
        rows.append(
            [
                layer.get("name", ""), layer.get("op", ""), str(layer.get("shape", "")),
                f"{(layer.get('macs') or 0) / 1e6:.3f}", words.nbytes(layer.get("nbytes")),
                " ".join(legal),
            ]
        )  # fmt: skip
        for fmt, reason in (layer.get("why_not") or {}).items():
            reasons.setdefault((fmt, reason), []).append(layer.get("name", ""))
    console.print(table(["layer", "op", "shape", "MMAC", "fp32", "formats"], rows))
    for (fmt, reason), names in reasons.items():
        count = f"{len(names)} layers" if len(names) > 3 else ", ".join(names)
        console.print(Text(f"no {fmt} for {count}: {reason}"))
    pairs(console, {k: v for k, v in found.items() if k not in ("layers", "version")})


def searched(console: Console, found: Mapping[str, Any], explain: bool) -> None:
    """A solution; with explain what else every layer could have taken."""
    cache(console, found)
    hidden = ("prices", "conflict", "error")  # an error is told on stderr
    pairs(console, {key: value for key, value in found.items() if key not in hidden})
    for line in facts(found):
        console.print(Text(line))
    for row in (found.get("rows") or []) if explain else []:
        console.print(Text(f"{row['name']}: {row['format']}", style="bold"))
        for fmt, seconds in (row.get("options") or {}).items():
            change = _change((row.get("marginal") or {}).get(fmt) or {})
            console.print(Text(f"    {fmt:<10} {words.seconds(seconds):<10}{change}".rstrip()))
        for fmt, reason in (row.get("why_not") or {}).items():
            console.print(Text(f"    {fmt:<10} not possible: {reason}"))
        for step in row.get("steps") or []:
            console.print(Text(f"    {step['fmt']:<10} {solved_again(step)}"))


#: What a price is told per: unit, and how many units of the problem it is.
_PER = {"latency_s": ("ms", 1e-3), "nbytes": ("MB", 1e6), "bops": ("G bit operations", 1e9)}


def facts(found: Mapping[str, Any]) -> list[str]:
    """In words: what the budgets are worth, and which of them contradict."""
    lines = []
    for name, price in (found.get("prices") or {}).items():
        unit, size = _PER.get(name, (name, 1.0))
        less = "cannot be had" if price["less"] is None else f"costs {price['less'] * size:.3g}"
        line = f"price of {name}: one {unit} more saves {price['more'] * size:.3g}, less {less}"
        lines.append(line if price["proven"] else f"{line} (not proven)")
    conflict = found.get("conflict") or {}
    for group in conflict.get("groups") or []:
        lines.append(f"cannot be met{' together' if len(group) > 1 else ''}: {', '.join(group)}")
    for name, value in (conflict.get("relaxed") or {}).items():
        if value is not None:
            lines.append(f"enough alone: {name} raised to {_unit(name, value)}")
    return lines


def solved_again(step: Mapping[str, Any]) -> str:
    """What the best plan would be with a layer in this format."""
    if step["cost"] is None:
        return f"all else solved again: {step['status']}"
    others = f", with {', '.join(step['changed'])} changed" if step["changed"] else ""
    return f"all else solved again: {step['cost']:+.3g}{others}"


def _change(change: Mapping[str, float]) -> str:
    """What the whole plan would gain and lose with this format in this layer."""
    if not change:
        return ""
    quicker = change["latency_s"] < 0
    seconds = words.seconds(abs(change["latency_s"]))
    return f"loss {change['loss']:+.3g}, {seconds} {'faster' if quicker else 'slower'}"


def pairs(console: Console, found: Mapping[str, Any], prefix: str = "") -> None:
    """Every plain value with its name; tables of layers one line each."""
    for key, value in found.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            pairs(console, value, f"{name}.")
        elif isinstance(value, str | int | float) and key != "version":
            console.print(Text(f"{name}: {_unit(name, value)}"))


def _unit(name: str, value: Any) -> str:
    if isinstance(value, float) and ("latency" in name or "seconds" in name):
        return words.seconds(value)
    if "nbytes" in name and not isinstance(value, str):
        return words.nbytes(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _sum(show: Callable[[Any], str], values: Sequence[Any]) -> str:
    """The total, or a dash where one value is missing."""
    return words.NONE if any(v is None for v in values) else f"Σ {show(sum(values))}"
