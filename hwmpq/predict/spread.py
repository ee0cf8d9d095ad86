"""How far the time of a cell lies from its prediction: quantile heads, made to hold by conformal
calibration.

Boosted trees learn two quantiles of the residual log(time / prediction) from the features: where
predictions are good they are narrow. Trees promise nothing for new shapes, so their reach is
stretched until it holds on rows that they did not see (Romano, Patterson, Candès, Conformalized
Quantile Regression, NeurIPS 2019; stretched, not shifted: Kivaranovic, Johnson, Leeb, AISTATS
2020). Shapes are dealt into folds and each counts as one: Dunn, Wasserman and Ramdas,
Distribution-Free Prediction Sets for Two-Layer Hierarchical Models, JASA 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hwmpq.predict.features import F32, NAMES
from hwmpq.predict.rows import folds
from hwmpq.types import FloatArray

Groups: TypeAlias = Sequence[str] | NDArray[np.str_]
Band: TypeAlias = tuple[float, float]

#: Quantiles of the residual that the trees learn.
HEADS = (0.05, 0.95)
#: Shares of the times that `Spread.above` is calibrated for.
LEVELS = tuple(round(0.01 * k, 2) for k in range(50, 100))
#: Least reach of a head (of a logarithm): no prediction is known better than that.
_LEAST = 0.1
#: Shallow and few: the reach is a smooth thing, and a residual is a noisy witness of it.
_TREES, _DEPTH, _RATE, _LEAF = 40, 3, 0.1, 30.0


@dataclass(frozen=True, eq=False)
class Spread:
    """booster: the heads; below, above: so many times the reach of the lower head holds the lower
    end of the band, and of the upper one 50, 51, ... 99 % of the times of new shapes."""

    booster: Any
    below: float
    above: tuple[float, ...]
    coverage: float

    @staticmethod
    def fit(
        x: F32, residual: FloatArray, groups: Groups, seed: int, count: int, coverage: float,
        prior: Spread | None = None,
    ) -> Spread:  # fmt: skip
        """Heads of the residuals [n] (out of fold) of rows x [n, features], calibrated on `count`
        folds of the groups. prior: of another target, whose heads are taken as they are and whose
        calibration is not gone below."""
        if prior is not None:
            low, high = _reach(prior.booster, x)
            own = _calibrated(prior.booster, residual, low, high, groups, coverage)
            above = tuple(map(max, own.above, prior.above))
            return replace(own, below=max(own.below, prior.below), above=above)
        low, high = np.empty(len(residual)), np.empty(len(residual))
        fold = folds(list(groups), count, seed)
        names = np.asarray(groups)
        for held in range(count):
            known = fold != held
            heads = _heads(x[known], residual[known], names[known], seed)
            low[~known], high[~known] = _reach(heads, x[~known])
        booster = _heads(x, residual, names, seed)
        return _calibrated(booster, residual, low, high, groups, coverage)

    def band(self, x: F32) -> FloatArray:
        """[n, 2]: log(time / prediction) at both ends of the band."""
        low, high = _reach(self.booster, x)
        return np.column_stack([-self.below * low, self._times((1 + self.coverage) / 2) * high])

    def upper(self, x: F32, q: float) -> FloatArray:
        """[n]: log(time / prediction) that a share q of the times stays below."""
        _, high = _reach(self.booster, x)
        return self._times(q) * high

    def _times(self, q: float) -> float:
        """Reaches up to the first of LEVELS that is no less than q."""
        return self.above[int(np.searchsorted(np.array(LEVELS), q - 1e-9))]


def _heads(x: F32, residual: FloatArray, groups: NDArray[np.str_], seed: int) -> Any:
    import xgboost

    _, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    weight = sizes.mean() / sizes[index]
    data = xgboost.DMatrix(x, residual, weight=weight, feature_names=list(NAMES), nthread=1)
    options = {
        "objective": "reg:quantileerror", "quantile_alpha": list(HEADS), "tree_method": "hist",
        "nthread": 1, "seed": seed, "eta": _RATE, "max_depth": _DEPTH, "subsample": 0.8,
        "colsample_bynode": 0.4, "min_child_weight": _LEAF, "verbosity": 0,
    }  # fmt: skip
    return xgboost.train(options, data, _TREES)


def _reach(booster: Any, x: F32) -> tuple[FloatArray, FloatArray]:
    """How far the heads reach below and above the prediction, both positive: [n], [n]."""
    import xgboost

    data = xgboost.DMatrix(x, feature_names=list(NAMES), nthread=1)
    found = np.asarray(booster.predict(data), np.float64)
    return np.maximum(-found[:, 0], _LEAST), np.maximum(found[:, 1], _LEAST)


def _calibrated(
    booster: Any, residual: FloatArray, low: FloatArray, high: FloatArray, groups: Groups,
    coverage: float,
) -> Spread:  # fmt: skip
    """Heads with what their reaches [n] on rows that they did not see must be stretched by."""
    side = (1 + coverage) / 2
    scaled = residual / high
    return Spread(
        booster, above(-residual / low, groups, side),
        tuple(above(scaled, groups, q) for q in LEVELS), coverage,
    )  # fmt: skip


def band(residual: FloatArray, groups: Groups, coverage: float) -> Band:
    """Both ends of the central band of residuals (nan: left out), each group counting as one.

    Half of what may lie outside lies on each side.
    """
    side = (1 + coverage) / 2
    return -above(-residual, groups, side), above(residual, groups, side)


def above(residual: FloatArray, groups: Groups, q: float) -> float:
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
