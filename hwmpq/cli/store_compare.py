"""store compare: did a new toolchain, kernel or board make cells faster or slower?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Also write it as FILE.html, .md or .json."),
    ] = None,
) -> Answer:
    """Compare two toolchains, kernels, boards, targets or stores, cell by cell, by raw samples.

    Exit code 6 when B is slower than A somewhere, or fails where A had a time.

    Example: hwmpq store compare before.sqlite after.sqlite

    Two targets: hwmpq store compare target=x86-avx2 target=x86-amx --out beside.html
    """
    from hwmpq.measure.versus import compare_sides
    from hwmpq.report import comparison

    if not 0 <= tolerance < 100:
        raise InputError("--tolerance", tolerance, "0 to 100 percent")
    left, right = _Side.of(a, store), _Side.of(b, store)
    found = compare_sides(left.rows(), right.rows(), tolerance / 100)
    told = {**_json(found), "a": str(left), "b": str(right)}
    if out is not None:
        comparison.write(told, out)
    code = SLOWER if found.regressed else 0
    return Answer(told, lambda console: _show(console, found), code)


@dataclass(frozen=True)
class _Side:
    """where: the store; wanted: field -> value of its rows."""

    where: str
    wanted: Mapping[str, str]

    @staticmethod
    def of(text: str, store: str | None) -> _Side:
        """As the user wrote it; store: that of a mere filter. Raises InputError."""
        where, hash_, filters = text.rpartition("#")
        if not hash_:
            bare = "=" in text and "/" not in text
            where, filters = (store or "", text) if bare else (text, "")
        wanted: dict[str, str] = {}
        for part in [item for item in filters.split(",") if item]:
            name, equals, value = part.partition("=")
            if not equals:
                raise InputError("filter of rows", part, "NAME=VALUE,..")
            wanted[name] = value
        return _Side(where, wanted)

    def __str__(self) -> str:
        """The filter, else the store, without a password."""
        from hwmpq.measure.address import Address

        told = ",".join(f"{name}={value}" for name, value in self.wanted.items())
        return told or str(Address.of(self.where))

    def rows(self) -> list[Row]:
        """Those of the store that pass the filter. Raises InputError."""
        from hwmpq.measure.address import Address
        from hwmpq.measure.store import Store
        from hwmpq.measure.versus import chosen

        file = Address.of(self.where).file
        if file is not None and not file.is_file():
            raise InputError("no such store", file, "a store, NAME=VALUE,.. or STORE#NAME=VALUE,..")
        with Store.open(self.where) as opened:
            return chosen(opened.rows(), self.wanted)


def _json(found: Comparison) -> dict[str, Any]:
    from hwmpq.measure.versus import by_format

    return {
        "version": VERSION, "status": "slower" if found.regressed else "met",
        "counts": dict(Counter(pair.word for pair in found.pairs)),
        "only_a": found.only_a, "only_b": found.only_b,
        "formats": {name: {"cells": count, "ratio": ratio}
                    for name, (count, ratio) in by_format(found.pairs).items()},
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
    from hwmpq.measure.versus import by_format

    order = sorted(found.pairs, key=lambda pair: pair.ratio or float("inf"))
    heads = ["op", "shape", "format", "threads", "kernel", "A", "B", "B/A", "from", "to", "verdict"]
    console.print(table(heads, [_line(pair) for pair in order]))
    formats = [[name, str(count), f"{ratio:.3f}"]
               for name, (count, ratio) in by_format(found.pairs).items()]  # fmt: skip
    console.print(table(["format", "cells", "B/A, geometric mean"], formats))
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
