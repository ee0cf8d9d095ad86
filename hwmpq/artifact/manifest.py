"""What a manifest must hold before anything of an artifact is used: its JSON, entry by entry."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

VERSION = 1
KIND = "hwmpq-artifact"
LIBRARY, PARAMETERS, GOLDEN = "model.so", "parameters.safetensors", "golden.safetensors"
#: Types that a tensor at the border of the network may have.
DTYPES = frozenset(
    "float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool".split()
)
_MOST_THREADS = 1024
_MOST_ELEMENTS = 2**31


def parse(raw: bytes) -> Any:
    """JSON in UTF-8, strictly: a name twice in one object, NaN and half a character (a lone
    surrogate) are no JSON here. Raises ValueError, RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands twice in one object")
        return found

    def no_number(text: str) -> None:
        raise ValueError(f"{text} is no number")

    found = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=no_number)
    json.dumps(found, ensure_ascii=False).encode()
    return found


def interface(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a caller relies on: a line for each input, output, call and parameter, in
    order. It stands in the manifest itself and finds entries that were changed or exchanged."""
    lines = []
    for kind in ("inputs", "outputs"):
        for entry in manifest[kind]:
            shape = ",".join(map(str, entry["shape"]))
            lines.append(f"{kind} {entry['name']} {entry['dtype']} {shape}\n")
    for kind in ("calls", "parameters"):
        lines += [f"{kind} {name}\n" for name in manifest[kind]]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def wrong(manifest: Mapping[str, Any]) -> list[str]:
    """The entries that are missing though needed, of another type or out of range."""
    told = {key: good for key, good in _TOLD.items() if key in manifest}
    return [key for key, good in {**_NEEDED, **told}.items() if not good(manifest.get(key))]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and min(value) >= " "


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_name, value))


def _are_different(names: Iterable[str]) -> bool:
    listed = list(names)
    return len(set(listed)) == len(listed)


def _is_tensor(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_name(value.get("name")):
        return False
    shape = value.get("shape")
    if not isinstance(shape, list) or value.get("dtype") not in DTYPES:
        return False
    count = 1
    for extent in shape:
        if type(extent) is not int or not 0 < extent <= _MOST_ELEMENTS:
            return False
        count *= extent
    return count <= _MOST_ELEMENTS


def _are_tensors(value: Any) -> bool:
    good = isinstance(value, list) and bool(value) and all(map(_is_tensor, value))
    return good and _are_different(entry["name"] for entry in value)


def _is_target(value: Any) -> bool:
    return (
        isinstance(value, dict) and _is_name(value.get("name"))
        and _are_names(value.get("cpu_flags"))
    )  # fmt: skip


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


_NEEDED: dict[str, Callable[[Any], bool]] = {
    "target": _is_target,
    "threads": lambda value: type(value) is int and 0 < value <= _MOST_THREADS,
    "inputs": _are_tensors,
    "outputs": _are_tensors,
    "assignment": lambda value: isinstance(value, dict) and all(map(_is_name, value.values())),
    "calls": _are_names,
    "parameters": lambda value: _are_names(value) and _are_different(value),
    "files": lambda value: isinstance(value, dict),
    "interface": _is_hash,
}
#: Not needed, but shown where they are.
_TOLD: dict[str, Callable[[Any], bool]] = {
    "versions": lambda value: isinstance(value, dict),
    "kernels": lambda value: (
        isinstance(value, dict) and all(isinstance(told, dict) for told in value.values())
    ),
}
