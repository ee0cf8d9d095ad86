"""How far predictions are off: nn-Meter's measures, so that figures compare, and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.types import FloatArray

Labels = Sequence[str] | NDArray[np.str_]
#: Unit and meaning. tau and spearman: over all rows; tau_format: over the formats of one shape,
#: averaged: what a choice between formats needs. bias_pct: above 0 where predictions are too long.
METRICS = (
    "rmspe_pct", "mape_pct", "within_5_pct", "within_10_pct", "within_15_pct", "p90_pct",
    "bias_pct", "tau", "tau_format", "spearman", "r2_log",
)  # fmt: skip
#: Those that are means over rows: a bootstrap needs only their sums per group.
MEANS = (
    "rmspe_pct", "mape_pct", "within_5_pct", "within_10_pct", "within_15_pct", "bias_pct",
)  # fmt: skip


def errors(y: FloatArray, p: FloatArray) -> dict[str, float]:
    """The measures of the relative error (p − y) / y, in percent (nn-Meter, MobiSys 2021)."""
    relative = (p - y) / y
    size = np.abs(relative)
    return {
        "rmspe_pct": 100.0 * float(np.sqrt(np.mean(relative**2))),
        "mape_pct": 100.0 * float(np.mean(size)),
        **{f"within_{k}_pct": 100.0 * float(np.mean(size <= k / 100)) for k in (5, 10, 15)},
        "p90_pct": 100.0 * float(np.quantile(size, 0.9)),
        "bias_pct": 100.0 * float(np.mean(relative)),
    }


def metrics(y: FloatArray, p: FloatArray, groups: Labels) -> dict[str, float]:
    """All METRICS of predictions p of times y (seconds, positive); nan where undefined."""
    taus = []
    names = np.asarray(groups)
    for name in np.unique(names):
        same = names == name
        if same.sum() > 1:
            taus.append(kendall_tau_b(y[same], p[same]))
    taus = [tau for tau in taus if not np.isnan(tau)]
    log_y, log_p = np.log(y), np.log(np.maximum(p, 1e-12))
    spread = float(np.sum((log_y - log_y.mean()) ** 2))
    left = float(np.sum((log_y - log_p) ** 2))
    return {
        **errors(y, p),
        "tau": kendall_tau_b(y, p),
        "tau_format": float(np.mean(taus)) if taus else float("nan"),
        "spearman": spearman(y, p),
        "r2_log": 1.0 - left / spread if spread > 0 else float("nan"),
    }


def kendall_tau_b(a: FloatArray, b: FloatArray) -> float:
    """Kendall's τ-b, ties counted as neither (Kendall 1945); nan where one side is constant."""
    agree = ties_a = ties_b = 0.0
    for i in range(1, len(a)):
        one, two = np.sign(a[i] - a[:i]), np.sign(b[i] - b[:i])
        agree += float(np.sum(one * two))
        ties_a += float(np.sum(one == 0))
        ties_b += float(np.sum(two == 0))
    pairs = len(a) * (len(a) - 1) / 2
    below = np.sqrt((pairs - ties_a) * (pairs - ties_b))
    return agree / float(below) if below > 0 else float("nan")


def spearman(a: FloatArray, b: FloatArray) -> float:
    """Pearson's correlation of the ranks, ties sharing their mean rank; nan where constant."""
    one, two = _ranks(a), _ranks(b)
    one, two = one - one.mean(), two - two.mean()
    below = float(np.sqrt(np.sum(one**2) * np.sum(two**2)))
    return float(np.sum(one * two)) / below if below > 0 else float("nan")


def _ranks(values: FloatArray) -> FloatArray:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2.0)[index], np.float64)


def interval(
    y: FloatArray, p: FloatArray, groups: Labels, seed: int, draws: int = 500
) -> dict[str, tuple[float, float]]:
    """95 % intervals of the MEANS: whole groups are drawn again (percentile bootstrap)."""
    relative = (p - y) / y
    size = np.abs(relative)
    near = [(size <= k / 100).astype(np.float64) for k in (5, 10, 15)]
    columns = np.column_stack([relative**2, size, *near, relative, np.ones(len(y))])
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((len(names), columns.shape[1]))
    np.add.at(sums, index, columns)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    drawn = times @ sums
    means = drawn[:, :-1] / drawn[:, -1:]
    means[:, 0] = np.sqrt(means[:, 0])
    low, high = np.quantile(100.0 * means, (0.025, 0.975), axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(MEANS)}


def over_seeds(first: dict[str, Any], more: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the first and more judgements, with the 'spread' of each value, its standard
    deviation; intervals and counts are those of the first."""
    if not more:
        return first
    keys = [key for key in first if key not in ("interval", "rows", "sums")]
    values = np.array([[one[key] for key in keys] for one in (first, *more)])
    spread = dict(zip(keys, values.std(axis=0, ddof=1).tolist(), strict=True))
    return {**first, **dict(zip(keys, values.mean(axis=0).tolist(), strict=True)), "spread": spread}
