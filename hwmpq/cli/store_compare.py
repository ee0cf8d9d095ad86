"""store compare: did a new toolchain, kernel or board make cells faster or slower?"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hwmpq.cli.output import VERSION, Answer
from hwmpq.errors import InputError
from hwmpq.report import words

if TYPE_CHECKING:
    from hwmpq.measure.store import Row
    from hwmpq.measure.versus import Comparison, Pair

#: Exit code: slower than it should be.
SLOWER = 6
Side = Annotated[
    str,
    typer.Argument(
        help="A store (file or URL), a filter such as codegen=7,kernel=NAME, or STORE#FILTER. "
        "Filters: target, fingerprint, kernel, format, origin, source, toolchain entries.",
    ),
]


def compare(
    a: Side,
    b: Side,
    tolerance: Annotated[
        float, typer.Option("--tolerance", metavar="PERCENT", help="Changes below are none.")
    ] = 3.0,
    store: Annotated[
        str | None,
        typer.Option("--store", metavar="URL", help="Of a side that is only a filter."),
    ] = None,
) -> Answer:
    """Compare two toolchains, kernels, boards or stores, cell by cell, from the raw samples.

    Exit code 6 when B is slower than A somewhere, or fails where A had a time.

    Example: hwmpq store compare before.sqlite after.sqlite
    """
    from hwmpq.measure.versus import compare_sides

    if not 0 <= tolerance < 100:
        raise InputError("--tolerance", tolerance, "0 to 100 percent")
    found = compare_sides(_rows(a, store), _rows(b, store), tolerance / 100)
    code = SLOWER if found.regressed else 0
    return Answer(_json(found), lambda console: _show(console, found), code)


def _rows(side: str, store: str | None) -> list[Row]:
    """Of the store, or the default one, those that pass the filter. Raises InputError."""
    from hwmpq.measure.address import Address
    from hwmpq.measure.store import Store
    from hwmpq.measure.versus import chosen

    where, hash_, text = side.rpartition("#")
    if not hash_:
        where, text = (store or "", side) if "=" in side and "/" not in side else (side, "")
    wanted: dict[str, str] = {}
    for part in [item for item in text.split(",") if item]:
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError("filter of rows", part, "NAME=VALUE,..")
        wanted[name] = value
    file = Address.of(where).file
    if file is not None and not file.is_file():
        raise InputError("no such store", file, "a store, NAME=VALUE,.. or STORE#NAME=VALUE,..")
    with Store.open(where) as opened:
        return chosen(opened.rows(), wanted)


def _json(found: Comparison) -> dict[str, Any]:
    return {
        "version": VERSION, "status": "slower" if found.regressed else "met",
        "counts": dict(Counter(pair.word for pair in found.pairs)),
        "only_a": found.only_a, "only_b": found.only_b,
        "cells": [
            {
                "workload": pair.workload.to_json(), "format": pair.format,
                "threads": pair.threads, "kernels": list(pair.kernels),
                "latency_s": list(pair.latency_s), "ratio": pair.ratio,
                "interval": pair.interval, "verdict": pair.word,
            }
            for pair in found.pairs
        ],
    }  # fmt: skip


def _show(console: Any, found: Comparison) -> None:
    """Every pair, the slowest last, where it is seen; then the counts."""
    from hwmpq.cli.tables import table

    order = sorted(found.pairs, key=lambda pair: pair.ratio or float("inf"))
    heads = ["op", "shape", "format", "threads", "kernel", "A", "B", "B/A", "from", "to", "verdict"]
    console.print(table(heads, [_line(pair) for pair in order]))
    counts = Counter(pair.word for pair in found.pairs)
    told = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
    rest = f"; only in A: {found.only_a}, only in B: {found.only_b}"
    console.print(f"{told}{rest if found.only_a or found.only_b else ''}", markup=False)


def _line(pair: Pair) -> list[str]:
    dims = "×".join(str(size) for _, size in pair.workload.dims)
    kernel = " → ".join(dict.fromkeys(pair.kernels))
    numbers = (pair.ratio, *(pair.interval or (None, None)))
    return [
        pair.workload.op, dims, pair.format, str(pair.threads), kernel,
        *map(words.seconds, pair.latency_s),
        *(words.NONE if number is None else f"{number:.3f}" for number in numbers), pair.word,
    ]  # fmt: skip
