"""Two sides of measured rows, cell by cell: what got faster, what slower, what cannot be told.

A cell is (workload with its epilogue, format, threads). Where both sides timed it on the same
machine, target and kernel, these are compared one by one; otherwise the fastest of either side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Literal

from hwmpq.errors import InputError
from hwmpq.measure.ratio import ratio_interval
from hwmpq.measure.store import Row
from hwmpq.types import Workload

Word = Literal["FASTER", "SLOWER", "SAME", "AMBIGUOUS", "BROKEN", "MENDED"]
#: Over all pairs together: where nothing changed, one comparison in twenty may say otherwise.
CONFIDENCE = 0.95
#: What a filter may name besides the toolchain's own entries.
FIELDS = ("target", "fingerprint", "kernel", "format", "origin", "source")

_Cell = tuple[str, str, int]
_Variant = tuple[str, str, str]


@dataclass(frozen=True)
class Pair:
    """A cell on both sides. ratio: seconds of b over a, the median over all pairs of samples.

    BROKEN, MENDED: only a, or only b, has a time, the other one failed.
    """

    workload: Workload
    format: str
    threads: int
    kernels: tuple[str, str]
    latency_s: tuple[float | None, float | None]
    ratio: float | None
    interval: tuple[float, float] | None
    word: Word


@dataclass(frozen=True)
class Comparison:
    """only_a, only_b: cells that the other side does not have."""

    pairs: tuple[Pair, ...]
    only_a: int
    only_b: int

    @property
    def regressed(self) -> bool:
        """Is a cell slower, or does one fail that had a time?"""
        return any(pair.word in ("SLOWER", "BROKEN") for pair in self.pairs)


def by_format(pairs: Iterable[Pair]) -> dict[str, tuple[int, float]]:
    """Format -> cells with a time on both sides, and the geometric mean of b over a."""
    found: dict[str, list[float]] = defaultdict(list)
    for pair in pairs:
        if pair.ratio is not None:
            found[pair.format].append(pair.ratio)
    return {name: (len(group), geometric_mean(group)) for name, group in found.items()}


def chosen(rows: Iterable[Row], wanted: Mapping[str, str]) -> list[Row]:
    """The rows whose fields, or entries of the toolchain, have the given values.

    Raises InputError for a name that is neither.
    """
    found = list(rows)
    entries = {name for row in found for name in row.toolchain}
    for name in wanted:
        if name not in FIELDS and name not in entries:
            raise InputError("name in a filter of rows", name, sorted({*FIELDS, *entries}))
    return [row for row in found if all(_field(row, k) == v for k, v in wanted.items())]


def compare_sides(a: Iterable[Row], b: Iterable[Row], tolerance: float = 0.03) -> Comparison:
    """Is b slower than a? tolerance: a change of the seconds by this share is none.

    FASTER, SLOWER: the whole interval of the ratio is beyond the tolerance; SAME: all of it is
    within; else AMBIGUOUS. The intervals hold at once with CONFIDENCE (Bonferroni). Cells that
    failed on both sides are left out. Raises InputError where no cell is on both sides, or where
    the fastest of a side would mix machines.
    """
    left, right = _cells(a), _cells(b)
    shared = [cell for cell in left if cell in right]
    matched = [pair for cell in shared for pair in _matched(left[cell], right[cell])]
    if not matched:
        raise InputError(
            "cells to compare", f"{len(left)} in A, {len(right)} in B, none in both",
            "equal workload, format and threads",
        )  # fmt: skip
    confidence = 1 - (1 - CONFIDENCE) / len(matched)
    pairs = tuple(_judged(x, y, tolerance, confidence) for x, y in matched)
    return Comparison(pairs, len(left) - len(shared), len(right) - len(shared))


def _field(row: Row, name: str) -> str:
    if name in ("kernel", "format", "source"):
        return str(getattr(row.measurement, name))
    return str(getattr(row, name) if name in FIELDS else row.toolchain.get(name, ""))


def _cells(rows: Iterable[Row]) -> dict[_Cell, dict[_Variant, Row]]:
    """The newest row of every variant of every cell; times and failures alike."""
    found: dict[_Cell, dict[_Variant, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row.created):
        m = row.measurement
        if m.samples_s or m.error:
            variant = (row.fingerprint, row.target, m.kernel)
            found[m.workload.key, m.format, m.threads][variant] = row
    return found


def _matched(left: Mapping[_Variant, Row], right: Mapping[_Variant, Row]) -> list[tuple[Row, Row]]:
    both = [variant for variant in left if variant in right]
    if both:
        pairs = [(left[variant], right[variant]) for variant in both]
        return [(a, b) for a, b in pairs if not (a.measurement.error and b.measurement.error)]
    for side, variants in (("A", left), ("B", right)):
        machines = sorted({fingerprint for fingerprint, _, _ in variants})
        if len(machines) > 1:
            raise InputError(
                f"machines of side {side}", ", ".join(machines), "one",
                "Name it: fingerprint=NAME.",
            )  # fmt: skip
    a, b = _fastest(left.values()), _fastest(right.values())
    return [] if a.measurement.error and b.measurement.error else [(a, b)]


def _fastest(rows: Iterable[Row]) -> Row:
    """The least median; failures come last."""
    return min(rows, key=lambda row: _seconds(row) or float("inf"))


def _seconds(row: Row) -> float | None:
    return None if row.measurement.error else row.measurement.latency_s


def _judged(a: Row, b: Row, tolerance: float, confidence: float) -> Pair:
    x, y = a.measurement, b.measurement
    ratio, interval = None, None
    if not (x.error or y.error):
        ratio, interval = ratio_interval(x.steady_s, y.steady_s, confidence)
    word: Word = "AMBIGUOUS"
    if x.error or y.error:
        word = "BROKEN" if y.error else "MENDED"
    elif interval is not None:
        word = _word(interval, tolerance)
    return Pair(
        x.workload, x.format, x.threads, (x.kernel, y.kernel), (_seconds(a), _seconds(b)),
        ratio, interval, word,
    )  # fmt: skip


def _word(interval: tuple[float, float], tolerance: float) -> Word:
    low, high = interval
    if low > 1 + tolerance:
        return "SLOWER"
    if high < 1 / (1 + tolerance):
        return "FASTER"
    return "SAME" if low >= 1 / (1 + tolerance) and high <= 1 + tolerance else "AMBIGUOUS"
