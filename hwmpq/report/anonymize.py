"""A report without what tells whose model and machine it is.

Kept: what was found: formats, times, accuracies, sizes, shapes, kernels, target and versions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from hwmpq.report.content import Content, Entry
from hwmpq.report.words import part

_KEPT = (
    *("version", "status", "ambiguous", "target", "threads", "assignment", "kernels", "latency_s"),
    *("baselines", "accuracy", "parity", "nbytes", "objective", "bound", "gap", "method", "error"),
    *("seconds", "rounds", "sensitivity", "new_timings", "failures"),
)
#: Options whose values are names that the user gave.
_NAMED = (
    *("weights", "device", "data", "calib_data", "pins", "ties", "metric", "loss", "store", "out"),
    *("train_data", "train_out"),
)
#: What of the conditions of a measurement says how far to trust it.
_CONDITIONS = ("load", "governor", "affinity", "huge_pages", "virtual")
#: Fields that hold our own words, whatever a layer may be called; tables with a key per layer.
_FACTS = frozenset(("op", "kind", "format", "shape", "kernel", "execution", "latency_source"))
_BY_NAME = frozenset(("assignment", "kernels"))
_PATH = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?(?:[/\\][\w.@+-]+){2,}")
HIDDEN = "…"


def anonymized(content: Content) -> Content:
    """The content with new names for model, layers and operators, without the others."""
    result = content.result
    new = _names(content)
    shown = {name: result[name] for name in _KEPT if name in result}
    hide = _Hiding(new, _given(result))
    quality = dict(part(result, "environment", "quality") or {})
    around = quality.pop("environment", None) or {}
    quality["environment"] = {name: around.get(name) for name in _CONDITIONS}
    environment = {"quality": quality, "versions": part(result, "environment", "versions") or {}}
    return replace(
        content,
        result={**hide(shown), "model": "a model", "environment": environment},
        rows=hide(content.rows), frontier=hide(content.frontier), evidence=hide(content.evidence),
        peers=hide([{k: v for k, v in peer.items() if k != "model"} for peer in content.peers]),
    )  # fmt: skip


def _names(content: Content) -> dict[str, str]:
    """Layer or operator -> its new name."""
    layers = [str(row["name"]) for row in content.rows]
    layers += [str(name) for name in content.result.get("assignment") or {}]
    new = {name: f"layer {i}" for i, name in enumerate(dict.fromkeys(layers), 1)}
    others = [str(step["name"]) for step in content.evidence.get("steps") or ()]
    rest = dict.fromkeys(name for name in others if name not in new)
    return {**new, **{name: f"operator {i}" for i, name in enumerate(rest, 1)}}


def _given(result: Entry) -> Iterator[str]:
    """Words of the user that may stand in texts."""
    yield from (str(result[name]) for name in ("model", "device", "data") if result.get(name))
    for name in _NAMED:
        value = part(result, "options", name)
        yield from map(str, value if isinstance(value, list | tuple) else [value] if value else [])


class _Hiding:
    """new: names to be replaced, in keys and texts; given: words to be hidden."""

    def __init__(self, new: Mapping[str, str], given: Iterator[str]):
        words = {word: HIDDEN for word in given if word not in ("local", "native")} | dict(new)
        longest = sorted(filter(None, words), key=len, reverse=True)
        either = "|".join(map(re.escape, longest)) or "(?!)"
        self._words, self._find = words, re.compile(rf"(?<![\w.])(?:{either})(?!\w)")

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            named = self._find.sub(lambda found: self._words[found[0]], value)
            return _PATH.sub(HIDDEN, named)
        if isinstance(value, Mapping):
            return {key: self._entry(key, item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self(item) for item in value]
        return value

    def _entry(self, key: str, value: Any) -> Any:
        if key in _FACTS:
            return value
        if key in _BY_NAME:
            return {self(name): self(item) for name, item in value.items()}
        return self(value)
