"""Predictor: seconds of a cell that was not measured, with an interval.

The point is the geometric centre of the time. The band comes from residuals of predictions made
without any format of the same shape (out of fold by group), pooled with equal weight per group:
Dunn, Wasserman and Ramdas, Distribution-Free Prediction Sets for Two-Layer Hierarchical Models,
JASA 2022. It holds for new shapes like those measured. A format or kernel not trained on, or a cell
outside the trained range of times, gets a second band, from residuals of predictions made without
that format as well: that one promises no coverage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import TypeAlias

import numpy as np

from hwmpq.errors import InputError
from hwmpq.formats import Format
from hwmpq.kernels import Kernel
from hwmpq.predict.analytic import resolve, work
from hwmpq.predict.boost import DEFAULTS, Point, Settings
from hwmpq.predict.features import of_work
from hwmpq.predict.metrics import metrics
from hwmpq.predict.rows import Row, Table, folds
from hwmpq.targets import Target
from hwmpq.types import FloatArray, Workload

#: Fewer shapes than this give no 90 % band: its ends would lie beyond the outermost residual.
MIN_GROUPS = 20
#: How far outside the trained range of static estimates a cell may lie and still count as known.
_BEYOND = 2.0

#: Shares of the times that `Predictor.above` states an upper end for.
LEVELS = tuple(round(0.01 * k, 2) for k in range(50, 100))

Band: TypeAlias = tuple[float, float]
Cell: TypeAlias = tuple[Workload, Format, Kernel | str, int]


@dataclass(frozen=True)
class Scope:
    """What a predictor was trained on. estimate_s: least and greatest static estimate."""

    ops: frozenset[str]
    threads: frozenset[int]
    formats: frozenset[str]
    kernels: frozenset[str]
    estimate_s: Band


@dataclass(frozen=True, eq=False)
class Predictor:
    """point: the model; known, novel: log(time / prediction) at both ends of the band; novel is
    None where one format is all there was. above: log(time / prediction) that 50, 51, ... 99 % of
    the times of new shapes stay below. errors: split -> metric -> value, as in the card. prior:
    target whose model it started from."""

    target: Target
    point: Point
    known: Band
    novel: Band | None
    above: tuple[float, ...]
    scope: Scope
    rows: tuple[Row, ...]
    seed: int = 0
    settings: Settings = DEFAULTS
    fingerprint: str = ""
    toolchain: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    prior: str = ""

    @staticmethod
    def fit(
        rows: Sequence[Row], target: Target, seed: int = 0, settings: Settings = DEFAULTS,
        fingerprint: str = "", toolchain: Mapping[str, str] | None = None,
        prior: Predictor | None = None,
    ) -> Predictor:  # fmt: skip
        """Train on all rows, the band out of fold. The same rows and seed give the same predictor.

        prior: another target's predictor to start from; the bands then reach as far as its own.
        Raises InputError when there are fewer than MIN_GROUPS shapes (two with a prior).
        """
        table = Table.of(rows, target)
        shapes = len(set(table.group))
        needed = MIN_GROUPS if prior is None else 2
        if shapes < needed:
            raise InputError(
                "different shapes among the rows of a cost model", shapes,
                f"at least {needed}", "Measure more layers, or more networks, on this target.",
            )  # fmt: skip
        start = None if prior is None else prior.point
        point = Point.fit(table, seed, settings, start)
        out = out_of_fold(table, seed, settings, start)
        unseen = _without_format(table, seed, settings, start)
        formats = frozenset(row.format for row in rows)
        estimate = table.terms @ point.factors
        residual = np.log(table.y / out)
        found = Predictor(
            target, point, band(residual, table.group, settings.coverage),
            None if np.isnan(unseen).all()
            else band(np.log(table.y / unseen), table.group, settings.coverage),
            tuple(above(residual, table.group, q) for q in LEVELS),
            Scope(
                frozenset(row.workload.op for row in rows),
                frozenset(row.threads for row in rows), formats,
                frozenset(row.kernel for row in rows),
                (float(estimate.min()), float(estimate.max())),
            ),
            tuple(rows), seed, settings, fingerprint, dict(toolchain or {}),
            {"S1": metrics(table.y, out, table.group)},
        )  # fmt: skip
        return found if prior is None else found._with_prior(prior)

    def _with_prior(self, prior: Predictor) -> Predictor:
        """As wide in its bands as the prior, and as wide in what it knows."""
        novel = prior.novel or prior.known
        own, other = self.scope, prior.scope
        return replace(
            self,
            known=_around(self.known, prior.known),
            novel=_around(self.novel or self.known, novel),
            above=tuple(map(max, self.above, prior.above)),
            scope=replace(
                own, ops=own.ops | other.ops, formats=own.formats | other.formats,
                kernels=own.kernels | other.kernels,
                estimate_s=_around(own.estimate_s, other.estimate_s),
            ),
            prior=prior.target.name,
        )  # fmt: skip

    def predict(
        self, workload: Workload, fmt: Format, kernel: Kernel | str, threads: int = 1
    ) -> tuple[float, float, float]:
        """Seconds of one call: (centre, lower end, upper end). Raises as `predict_many`."""
        centre, low, high = self.predict_many([(workload, fmt, kernel, threads)])[0]
        return float(centre), float(low), float(high)

    def predict_many(self, cells: Sequence[Cell]) -> FloatArray:
        """[cells, 3]: as `predict`, in one go.

        Raises InputError for an operator or a thread count that was never measured, a kernel that
        the target does not have for the cell, or a new format where one was all there was.
        """
        if not cells:
            return np.zeros((0, 3))
        x, terms, names = [], [], []
        for workload, fmt, kernel, threads in cells:
            reason = self.why_not(workload, fmt, threads)
            if reason:
                raise InputError(reason, next="Measure the cell instead, or train with such rows.")
            found = resolve(kernel, workload, fmt, self.target)
            done = work(workload, fmt, found, self.target, threads)
            x.append(of_work(workload, fmt, found, self.target, threads, done))
            terms.append(done.terms)
            names.append(found.name)
        table = np.stack(terms)
        centre = self.point.seconds(np.stack(x), table)
        low, high = self.scope.estimate_s
        estimate = table @ self.point.factors
        bands = [
            self._band(fmt.name, name, low / _BEYOND <= static <= high * _BEYOND)
            for (_, fmt, _, _), name, static in zip(cells, names, estimate, strict=True)
        ]
        return np.column_stack([centre, centre[:, None] * np.exp(np.array(bands))])

    def upper(self, cells: Sequence[Cell], q: float = 0.8) -> FloatArray:
        """[cells]: seconds that a share q of the times of such cells stays below, from 0.5 to 0.99.

        For a search: it picks the cells whose times are predicted too short, so it must not be
        given their centre. A cell unlike those that were measured gets at least the upper end of
        its band. Raises as `predict_many`; InputError for another q.
        """
        if not LEVELS[0] <= q <= LEVELS[-1]:
            raise InputError("share of an upper time", q, f"{LEVELS[0]} to {LEVELS[-1]}")
        found = self.predict_many(cells)
        if not cells:
            return found[:, 0]
        level = int(np.searchsorted(np.array(LEVELS), q - 1e-9))
        # a wider band than the usual one marks a cell that is new in kind
        usual = found[:, 0] * np.exp(self.known[1])
        fresh = found[:, 2] > usual * (1 + 1e-9)
        held = found[:, 0] * np.exp(self.above[level])
        return np.asarray(np.where(fresh, np.maximum(held, found[:, 2]), held))

    def why_not(self, workload: Workload, fmt: Format, threads: int = 1) -> str | None:
        """None when the cell can be predicted, else the reason."""
        scope = self.scope
        if workload.op not in scope.ops:
            return f"the cost model of {self.target.name} has seen no {workload.op}"
        if threads not in scope.threads:
            seen = ", ".join(map(str, sorted(scope.threads)))
            return f"the cost model of {self.target.name} has seen {seen} threads, not {threads}"
        if fmt.name not in scope.formats and self.novel is None:
            return f"the cost model of {self.target.name} has seen one format, not {fmt.name}"
        return None

    def _band(self, fmt: str, kernel: str, inside: bool) -> Band:
        fresh = fmt not in self.scope.formats or kernel not in self.scope.kernels or not inside
        if not fresh or self.novel is None:
            return self.known
        return _around(self.known, self.novel)

    def save(self, folder: str | Path) -> None:
        """Write model.ubj, card.toml and rows.jsonl into the folder, which is made."""
        from hwmpq.predict.files import save

        save(self, Path(folder))

    @staticmethod
    def load(folder: str | Path, target: Target | None = None) -> Predictor:
        """What `save` wrote. target: default, the one that the card names.

        Raises InputError for a damaged folder and for features, kernels or target facts that are
        not those it was trained with.
        """
        from hwmpq.predict.files import load

        return load(Path(folder), target)


def _around(a: Band, b: Band) -> Band:
    return min(a[0], b[0]), max(a[1], b[1])


def out_of_fold(
    table: Table, seed: int, settings: Settings, prior: Point | None = None
) -> FloatArray:
    """Every row's seconds by a model that saw no row of its group: [n]."""
    found = np.full(len(table), np.nan)
    fold = folds(table.group.tolist(), settings.folds, seed)
    for held in range(settings.folds):
        point = Point.fit(table.part(fold != held), seed, settings, prior)
        found[fold == held] = point.seconds(table.x[fold == held], table.terms[fold == held])
    return found


def _without_format(
    table: Table, seed: int, settings: Settings, prior: Point | None = None
) -> FloatArray:
    """Seconds by models that saw neither the row's group nor its format: [n]. nan for the rows
    not asked (each fold leaves out one part of the groups and one of the formats), and everywhere
    when there is but one format."""
    found = np.full(len(table), np.nan)
    names = [row.format for row in table.rows]
    if len(set(names)) == 1:
        return found
    fold = folds(table.group.tolist(), settings.folds, seed)
    count = min(settings.folds, len(set(names)))
    kind = folds(names, count, seed)
    for held in range(settings.folds):
        test = (fold == held) & (kind == held % count)
        train = (fold != held) & (kind != held % count)
        if test.any() and train.any():
            point = Point.fit(table.part(train), seed, settings, prior)
            found[test] = point.seconds(table.x[test], table.terms[test])
    return found


def band(residual: FloatArray, groups: Sequence[str] | np.ndarray, coverage: float) -> Band:
    """Both ends of the central band of residuals (nan: left out), each group counting as one.

    Half of what may lie outside lies on each side.
    """
    side = (1 + coverage) / 2
    return -above(-residual, groups, side), above(residual, groups, side)


def above(residual: FloatArray, groups: Sequence[str] | np.ndarray, q: float) -> float:
    """What a share q of the residuals (nan: left out) of a new group stays below, each group
    counting as one: at the level ceil((G + 1) · q) / G of G groups, at most the outermost."""
    use = ~np.isnan(residual)
    names, index, sizes = np.unique(
        np.asarray(groups)[use], return_inverse=True, return_counts=True
    )
    share = 1.0 / (sizes[index] * len(names))
    level = min(1.0, ceil((len(names) + 1) * q) / len(names))
    return _quantile(residual[use], share, level)


def _quantile(values: FloatArray, share: FloatArray, level: float) -> float:
    """The least value with at least `level` of the weight at or below it."""
    order = np.argsort(values, kind="stable")
    reached = np.searchsorted(np.cumsum(share[order]), level - 1e-12)
    return float(values[order][min(int(reached), len(values) - 1)])
