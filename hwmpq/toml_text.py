"""TOML of plain values and tables, for the files that we write; Python only reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any


def dumps(table: Mapping[str, Any]) -> str:
    """Plain values come before tables; numbers are read back exactly."""
    return "\n".join(_lines(table, "")).lstrip("\n") + "\n"


def _lines(table: Mapping[str, Any], place: str) -> Iterator[str]:
    plain = {name: value for name, value in table.items() if not isinstance(value, Mapping)}
    if place and (plain or not table):
        yield from ("", f"[{place}]")
    yield from (f"{_key(name)} = {_value(value)}" for name, value in plain.items())
    for name, inner in table.items():
        if isinstance(inner, Mapping):
            yield from _lines(inner, f"{place}.{_key(name)}" if place else _key(name))


def _key(name: object) -> str:
    text = str(name)
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else json.dumps(text, ensure_ascii=False)


def _value(value: Any) -> str:
    """JSON's strings are TOML's; nan and inf are written as TOML spells them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(float(value)) if isinstance(value, float) else str(int(value))
