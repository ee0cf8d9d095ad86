"""Rows: measured cells a predictor is trained and judged on, and the table of their numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError, in_words
from hwmpq.formats import Format, format_named
from hwmpq.predict.analytic import Work, resolve, work
from hwmpq.predict.features import F32, of_work
from hwmpq.targets import Target
from hwmpq.types import FloatArray, Workload, digest, reject_unknown


@dataclass(frozen=True)
class Row:
    """One measured cell. latency_s: seconds of a call; weight: how far it is trusted, in (0, 1];
    networks: families of those that hold this workload; samples_s: the seconds, at the session's
    speed, that latency_s is the median of; again_s: what it was when the cell was timed before.
    """

    workload: Workload
    format: str
    kernel: str
    threads: int
    latency_s: float
    weight: float = 1.0
    networks: tuple[str, ...] = ()
    samples_s: tuple[float, ...] = ()
    again_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not (isfinite(self.latency_s) and self.latency_s > 0):
            raise InputError(f"latency_s of {self.kernel}", self.latency_s, "positive seconds")
        if not 0 < self.weight <= 1:
            raise InputError(f"weight of {self.kernel}", self.weight, "above 0, at most 1")

    @property
    def quiet_s(self) -> float:
        """Seconds when nothing disturbed: the least sample."""
        return min(self.samples_s, default=self.latency_s)

    def to_json(self) -> dict[str, Any]:
        return {
            "workload": self.workload.to_json(),
            "format": self.format,
            "kernel": self.kernel,
            "threads": self.threads,
            "latency_s": self.latency_s,
            "weight": self.weight,
            "networks": list(self.networks),
            "samples_s": list(self.samples_s),
            "again_s": list(self.again_s),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Row:
        """Raises InputError for an unknown or missing key, or a value that cannot be one."""
        reject_unknown("row of a cost model", data, set(Row.__dataclass_fields__))
        try:
            return Row(
                Workload.from_json(data["workload"]), str(data["format"]), str(data["kernel"]),
                int(data["threads"]), float(data["latency_s"]), float(data["weight"]),
                tuple(map(str, data["networks"])), tuple(map(float, data["samples_s"])),
                tuple(map(float, data.get("again_s", ()))),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("row of a cost model", in_words(error)) from None


def group_of(workload: Workload) -> str:
    """Key of the shape: all formats, kernels, threads and epilogues of it are on one side of a
    split."""
    return digest([workload.op, [list(item) for item in workload.dims]])


def folds(groups: Sequence[str], count: int, seed: int) -> NDArray[np.int64]:
    """Fold 0 .. count − 1 of every row: the groups in the order of their hash, dealt in turn.

    Depends on group keys and seed only, never on the order or the values of the rows.
    """
    names = sorted(
        set(groups), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
    )
    place = {name: index % count for index, name in enumerate(names)}
    return np.array([place[name] for name in groups], np.int64)


@dataclass(frozen=True, eq=False)
class Table:
    """Rows with their numbers. x: [n, features]; terms: [n, TERMS]; y, quiet, weight: [n], seconds
    as they are judged, seconds as they are learnt, trust; group: [n]."""

    rows: tuple[Row, ...]
    formats: tuple[Format, ...]
    done: tuple[Work, ...]
    x: F32
    terms: FloatArray
    y: FloatArray
    quiet: FloatArray
    weight: FloatArray
    group: NDArray[np.str_]

    @staticmethod
    def of(rows: Sequence[Row], target: Target) -> Table:
        """Raises InputError when there is no row, or a row's kernel or format is unknown."""
        if not rows:
            raise InputError("rows of a cost model", 0, "measured cells", "Measure some first.")
        formats, done, x = [], [], []
        for row in rows:
            fmt = format_named(row.format)
            kernel = resolve(row.kernel, row.workload, fmt, target)
            counted = work(row.workload, fmt, kernel, target, row.threads)
            formats.append(fmt)
            done.append(counted)
            x.append(of_work(row.workload, fmt, kernel, target, row.threads, counted))
        return Table(
            tuple(rows), tuple(formats), tuple(done), np.stack(x),
            np.stack([item.terms for item in done]),
            np.array([row.latency_s for row in rows]), np.array([row.quiet_s for row in rows]),
            np.array([row.weight for row in rows]),
            np.array([group_of(row.workload) for row in rows]),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, keep: NDArray[np.bool_]) -> Table:
        """The rows where `keep` is True."""
        return self.rows_at(np.flatnonzero(keep))

    def rows_at(self, index: NDArray[np.int64]) -> Table:
        """The rows at these places; a place may come more than once."""
        return Table(
            tuple(self.rows[i] for i in index), tuple(self.formats[i] for i in index),
            tuple(self.done[i] for i in index), self.x[index], self.terms[index],
            self.y[index], self.quiet[index], self.weight[index], self.group[index],
        )  # fmt: skip
