"""Predictor: seconds of a cell that was not measured, with an interval.

The point is the geometric centre of the time. The band comes from residuals of predictions made
without any format of the same shape (out of fold by group; `spread`). It holds for new shapes like
those measured. A format or kernel not trained on, or a cell outside the trained range of times,
gets a second band, from residuals of predictions made without that format as well: that one
promises no coverage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.formats import Format
from hwmpq.kernels import Kernel
from hwmpq.predict.analytic import resolve, work
from hwmpq.predict.boost import DEFAULTS, Point, Settings
from hwmpq.predict.features import F32, of_work
from hwmpq.predict.metrics import metrics
from hwmpq.predict.rows import Row, Table, folds
from hwmpq.predict.spread import LEVELS, Band, Spread, band
from hwmpq.predict.transfer import fitter
from hwmpq.targets import Target
from hwmpq.types import FloatArray, Workload

#: Fewer shapes than this give no 90 % band: its ends would lie beyond the outermost residual.
MIN_GROUPS = 20
#: How far outside the trained range of static estimates a cell may lie and still count as known.
_BEYOND = 2.0

#: Trains the point model on a table.
Fit: TypeAlias = Callable[[Table], Point]
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
    """point: the model; spread: the band of cells like those measured; novel: log(time /
    prediction) at both ends of that of others, None where one format is all there was. errors:
    split -> metric -> value, as in the card. prior: target whose model it started from."""

    target: Target
    point: Point
    spread: Spread
    novel: Band | None
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
        fit = fitter(table, seed, settings, None if prior is None else prior.point)
        point = fit(table)
        out = out_of_fold(table, seed, settings.folds, fit)
        unseen = _without_format(table, seed, settings.folds, fit)
        estimate = table.terms @ point.factors
        found = Predictor(
            target, point,
            Spread.fit(
                table.x, np.log(table.y / out), table.group, seed, settings.folds,
                settings.coverage, None if prior is None else prior.spread,
            ),
            None if np.isnan(unseen).all()
            else band(np.log(table.y / unseen), table.group, settings.coverage),
            Scope(
                frozenset(row.workload.op for row in rows),
                frozenset(row.threads for row in rows), frozenset(row.format for row in rows),
                frozenset(row.kernel for row in rows),
                (float(estimate.min()), float(estimate.max())),
            ),
            tuple(rows), seed, settings, fingerprint, dict(toolchain or {}),
            {"S1": metrics(table.y, out, table.group)},
        )  # fmt: skip
        return found if prior is None else found._with_prior(prior)

    def _with_prior(self, prior: Predictor) -> Predictor:
        """As wide as the prior in what it knows, and in its band of what it does not."""
        own, other = self.scope, prior.scope
        novel = [item for item in (self.novel, prior.novel) if item]
        return replace(
            self,
            novel=_around(novel[0], novel[-1]) if novel else None,
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
        centre, x, fresh = self._centre(cells)
        bands = self.spread.band(x)
        if self.novel is not None:
            bands[fresh, 0] = np.minimum(bands[fresh, 0], self.novel[0])
            bands[fresh, 1] = np.maximum(bands[fresh, 1], self.novel[1])
        return np.column_stack([centre, centre[:, None] * np.exp(bands)])

    def upper(self, cells: Sequence[Cell], q: float = 0.8) -> FloatArray:
        """[cells]: seconds that a share q of the times of such cells stays below, from 0.5 to 0.99.

        For a search: it picks the cells whose times are predicted too short, so it must not be
        given their centre. A cell unlike those that were measured gets at least the upper end of
        its band. Raises as `predict_many`; InputError for another q.
        """
        if not LEVELS[0] <= q <= LEVELS[-1]:
            raise InputError("share of an upper time", q, f"{LEVELS[0]} to {LEVELS[-1]}")
        if not cells:
            return np.zeros(0)
        centre, x, fresh = self._centre(cells)
        held = self.spread.upper(x, q)
        if self.novel is not None:
            held[fresh] = np.maximum(held[fresh], self.novel[1])
        return np.asarray(centre * np.exp(held))

    def _centre(self, cells: Sequence[Cell]) -> tuple[FloatArray, F32, NDArray[np.bool_]]:
        """Of each cell: predicted seconds, features, and whether it is unlike those measured."""
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
        low, high = self.scope.estimate_s
        estimate = np.stack(terms) @ self.point.factors
        new = [
            fmt.name not in self.scope.formats or name not in self.scope.kernels
            for (_, fmt, _, _), name in zip(cells, names, strict=True)
        ]
        outside = (estimate < low / _BEYOND) | (estimate > high * _BEYOND)
        rows = np.stack(x)
        return self.point.seconds(rows, np.stack(terms)), rows, np.array(new) | outside

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


def out_of_fold(table: Table, seed: int, count: int, fit: Fit) -> FloatArray:
    """Every row's seconds by a model that saw no row of its group: [n]. count: folds."""
    found = np.full(len(table), np.nan)
    fold = folds(table.group.tolist(), count, seed)
    for held in range(count):
        point = fit(table.part(fold != held))
        found[fold == held] = point.seconds(table.x[fold == held], table.terms[fold == held])
    return found


def _without_format(table: Table, seed: int, count: int, fit: Fit) -> FloatArray:
    """Seconds by models that saw neither the row's group nor its format: [n]. nan for the rows
    not asked (each fold leaves out one part of the groups and one of the formats), and everywhere
    when there is but one format."""
    found = np.full(len(table), np.nan)
    names = [row.format for row in table.rows]
    if len(set(names)) == 1:
        return found
    fold = folds(table.group.tolist(), count, seed)
    kinds = min(count, len(set(names)))
    kind = folds(names, kinds, seed)
    for held in range(count):
        test = (fold == held) & (kind == held % kinds)
        train = (fold != held) & (kind != held % kinds)
        if test.any() and train.any():
            point = fit(table.part(train))
            found[test] = point.seconds(table.x[test], table.terms[test])
    return found
