"""The point model: factors of the static terms, boosted trees on the rest, and the usual load.

The trees learn the quiet time, the least sample of a cell: what disturbs a time only adds to it,
and comes in bursts that last for a block, so the medians of a shape are wrong together. One factor,
the middle ratio of a median to its least sample, then leads to the time that is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hwmpq.predict.features import F32, NAMES
from hwmpq.predict.rows import Table
from hwmpq.types import FloatArray

#: Least share of its nominal cost that a term keeps: the estimate never loses sight of a term.
_FLOOR = 0.02
#: Residual (of a logarithm) beyond which a row pulls no harder: disturbed blocks are no shapes.
_SLOPE = 0.1
#: A model that starts from a prior gets this part of the trees of one that starts from nothing.
_FURTHER = 4


@dataclass(frozen=True)
class Settings:
    """trees, depth, rate, penalty (on the square of a leaf): of the boosting; folds: of the
    out-of-fold predictions; coverage: share of times that the band should hold; forest: trees of
    the random forest, a baseline."""

    trees: int = 300
    depth: int = 6
    rate: float = 0.06
    folds: int = 5
    coverage: float = 0.9
    forest: int = 100
    penalty: float = 2.0


DEFAULTS = Settings()


def nonnegative(a: FloatArray, b: FloatArray, sweeps: int = 300) -> FloatArray:
    """x ≥ 0 of least |a x − b|²: a [n, k], b [n] → [k], by coordinate descent on the normal
    equations (Franc, Hlaváč, Navara 2005, Sequential coordinate-wise algorithm for NNLS)."""
    gram, right = a.T @ a, a.T @ b
    x = np.zeros(a.shape[1])
    for _ in range(sweeps):
        for k in np.flatnonzero(np.diag(gram) > 0):
            x[k] = max(0.0, x[k] + (right[k] - gram[k] @ x) / gram[k, k])
    return x


def factors(table: Table) -> FloatArray:
    """Quiet seconds per nominal cycle of each term [TERMS], by relative least squares, all
    positive."""
    scale = float(np.median(table.quiet / table.terms.sum(axis=1)))
    root = np.sqrt(table.weight)
    a = table.terms * (scale * root / table.quiet)[:, None]
    return scale * (_FLOOR + nonnegative(a, root - _FLOOR * a.sum(axis=1)))


def train(
    x: F32, y: FloatArray, weight: FloatArray, seed: int, settings: Settings,
    names: Sequence[str] = NAMES, after: Any = None,
) -> Any:  # fmt: skip
    """An xgboost.Booster of y on x, on one thread, the same for the same input. weight: of rows, in
    (0, 1]; its root counts, for even the steadiest row is off by what the features do not say.
    after: a Booster whose trees come first."""
    import xgboost

    data = xgboost.DMatrix(x, y, weight=np.sqrt(weight), feature_names=list(names), nthread=1)
    options = {
        "objective": "reg:pseudohubererror", "huber_slope": _SLOPE, "base_score": 0.0,
        "tree_method": "hist", "nthread": 1, "seed": seed, "eta": settings.rate,
        "max_depth": settings.depth, "subsample": 0.8, "colsample_bynode": 0.4,
        "min_child_weight": 3.0, "lambda": settings.penalty, "verbosity": 0,
    }  # fmt: skip
    return xgboost.train(options, data, settings.trees, xgb_model=after)


def ratios(booster: Any, x: F32, names: Sequence[str] = NAMES) -> FloatArray:
    """What the trees say for x [n, features]: [n]."""
    import xgboost

    data = xgboost.DMatrix(x, feature_names=list(names), nthread=1)
    return np.asarray(booster.predict(data), np.float64)


@dataclass(frozen=True, eq=False)
class Point:
    """time = load · Σ factors · terms · exp(trees(features)).  factors: quiet seconds per cycle,
    [TERMS]; load: measured over quiet time."""

    factors: FloatArray
    booster: Any
    load: float

    @staticmethod
    def fit(table: Table, seed: int, settings: Settings) -> Point:
        found = factors(table)
        ratio = np.log(table.quiet / (table.terms @ found))
        booster = train(table.x, ratio, table.weight, seed, settings)
        return Point(found, booster, load(table))

    def scaled(self, table: Table) -> Point:
        """This model at the speed of other rows: one factor, whatever they are."""
        known = np.log(table.quiet / (table.terms @ self.factors))
        scale = float(np.exp(np.median(known - ratios(self.booster, table.x))))
        return replace(self, factors=self.factors * scale, load=load(table))

    def stacked(self, table: Table, seed: int, settings: Settings) -> Point:
        """`scaled`, and new trees for what is left of other rows: shallow ones, held back."""
        base = self.scaled(table)
        left = np.log(table.quiet / (table.terms @ base.factors))
        trees = settings.trees // _FURTHER
        further = replace(settings, trees=trees, depth=3, penalty=5 * settings.penalty)
        booster = train(table.x, left, table.weight, seed, further, after=self.booster)
        return replace(base, booster=booster)

    def seconds(self, x: F32, terms: FloatArray) -> FloatArray:
        """x: [n, features], terms: [n, TERMS] -> [n]."""
        return np.asarray(self.load * (terms @ self.factors) * np.exp(ratios(self.booster, x)))


def load(table: Table) -> float:
    """The middle ratio of a measured time to the quiet time."""
    return float(np.median(table.y / table.quiet))
