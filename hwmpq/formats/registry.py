"""Finds formats: each file of this folder may hold `FORMATS`, a tuple of rows; so may plug-ins.

A plug-in's entry point in the group `hwmpq.formats` names such a tuple: `mine = "pkg.mod:FORMATS"`.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import MappingProxyType

import hwmpq.formats
from hwmpq.errors import InputError, UnknownName
from hwmpq.formats.encoding import Encoding
from hwmpq.formats.format import Format

ENTRY_POINTS = "hwmpq.formats"
_GROUPED = re.compile(r"(?P<base>.+)\.g(?P<size>[1-9]\d*)")


@cache
def format_named(name: str) -> Format:
    """The format of that name; `.gK` after a base name makes weight groups of K elements.

    Raises UnknownName with the nearest names; InputError for a group that cannot be made.
    """
    formats, _ = _known()
    if name in formats:
        return formats[name]
    grouped = _GROUPED.fullmatch(name)
    if grouped and grouped["base"] in formats:
        return formats[grouped["base"]].grouped(int(grouped["size"]))
    raise UnknownName(
        "format", name, formats, "A suffix such as '.g64' makes groups of 64 weights."
    )


def encoding_named(name: str) -> Encoding:
    """The encoding of that name. Raises UnknownName with the nearest names."""
    _, encodings = _known()
    if name not in encodings:
        raise UnknownName("encoding", name, encodings)
    return encodings[name]


@cache
def known_formats() -> tuple[str, ...]:
    """Names of all formats without groups, most precise first."""
    formats, _ = _known()
    return tuple(sorted(formats, key=lambda name: (-formats[name].rank, name)))


def collect(
    families: Iterable[tuple[str, Iterable[Format]]],
) -> tuple[MappingProxyType[str, Format], MappingProxyType[str, Encoding]]:
    """Formats by name, and the encodings they use by name, from (where found, rows) pairs.

    Raises InputError when a format name, or an encoding name for unlike encodings, comes twice.
    """
    formats: dict[str, tuple[str, Format]] = {}
    encodings: dict[str, tuple[str, Encoding]] = {}
    for origin, rows in families:
        for row in rows:
            if row.name in formats:
                raise _twice("format", row.name, formats[row.name][0], origin)
            formats[row.name] = (origin, row)
            for encoding in (row.weight, row.activation):
                first, known = encodings.setdefault(encoding.name, (origin, encoding))
                if known != encoding:
                    raise _twice("encoding", encoding.name, first, origin)
    return (
        MappingProxyType({name: row for name, (_, row) in formats.items()}),
        MappingProxyType({name: encoding for name, (_, encoding) in encodings.items()}),
    )


@cache
def _known() -> tuple[MappingProxyType[str, Format], MappingProxyType[str, Encoding]]:
    return collect(_families())


def _families() -> Iterator[tuple[str, Iterable[Format]]]:
    for item in pkgutil.iter_modules(hwmpq.formats.__path__, "hwmpq.formats."):
        yield item.name, getattr(import_module(item.name), "FORMATS", ())
    for point in entry_points(group=ENTRY_POINTS):
        yield f"entry point {point.name} = {point.value}", point.load()


def _twice(what: str, name: str, first: str, second: str) -> InputError:
    return InputError(
        f"{what} {name!r} is defined twice",
        f"{first} and {second}",
        next="Rename one, or uninstall the package that brings it.",
    )
