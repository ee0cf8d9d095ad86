"""The two halves of the point model: factors of the static terms, and boosted trees on the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hwmpq.predict.features import F32, NAMES
from hwmpq.predict.rows import Table
from hwmpq.types import FloatArray

#: Least share of its nominal cost that a term keeps: the estimate never loses sight of a term.
_FLOOR = 0.02


@dataclass(frozen=True)
class Settings:
    """trees, depth, rate: of the boosting; folds: of the out-of-fold predictions; coverage: share
    of times that the band should hold; forest: trees of the random forest, a baseline."""

    trees: int = 300
    depth: int = 5
    rate: float = 0.07
    folds: int = 5
    coverage: float = 0.9
    forest: int = 100


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
    """Seconds per nominal cycle of each term [TERMS], by relative least squares, all positive."""
    scale = float(np.median(table.y / table.terms.sum(axis=1)))
    root = np.sqrt(table.weight)
    a = table.terms * (scale * root / table.y)[:, None]
    return scale * (_FLOOR + nonnegative(a, root - _FLOOR * a.sum(axis=1)))


def train(
    x: F32, y: FloatArray, weight: FloatArray, seed: int, settings: Settings,
    names: Sequence[str] = NAMES,
) -> Any:  # fmt: skip
    """An xgboost.Booster of y on x, on one thread, the same for the same input."""
    import xgboost

    data = xgboost.DMatrix(x, y, weight=weight, feature_names=list(names), nthread=1)
    options = {
        "objective": "reg:squarederror", "tree_method": "hist", "nthread": 1, "seed": seed,
        "eta": settings.rate, "max_depth": settings.depth, "subsample": 0.8,
        "colsample_bytree": 0.6, "min_child_weight": 1.0, "lambda": 2.0, "verbosity": 0,
    }  # fmt: skip
    return xgboost.train(options, data, settings.trees)


def ratios(booster: Any, x: F32, names: Sequence[str] = NAMES) -> FloatArray:
    """What the trees say for x [n, features]: [n]."""
    import xgboost

    data = xgboost.DMatrix(x, feature_names=list(names), nthread=1)
    return np.asarray(booster.predict(data), np.float64)


@dataclass(frozen=True, eq=False)
class Point:
    """time = Σ factors · terms · exp(trees(features)).  factors: seconds per cycle, [TERMS]."""

    factors: FloatArray
    booster: Any

    @staticmethod
    def fit(table: Table, seed: int, settings: Settings) -> Point:
        found = factors(table)
        ratio = np.log(table.y / (table.terms @ found))
        return Point(found, train(table.x, ratio, table.weight, seed, settings))

    def seconds(self, x: F32, terms: FloatArray) -> FloatArray:
        """x: [n, features], terms: [n, TERMS] -> [n]."""
        return np.asarray((terms @ self.factors) * np.exp(ratios(self.booster, x)))
