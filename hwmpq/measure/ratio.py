"""How many times as long b takes as a, from two independent sets of samples.

No shape of the distributions is assumed, only that b's is a's times a factor.
"""

from __future__ import annotations

from functools import cache
from math import comb

import numpy as np

from hwmpq.measure.stats import Values


def ratio_interval(
    a_s: Values, b_s: Values, confidence: float = 0.95
) -> tuple[float, tuple[float, float] | None]:
    """The median of b/a over all pairs of samples (Hodges and Lehmann), and its exact interval.

    The interval lies between the k-th smallest and the k-th largest of these ratios, with the
    largest k for which P(U < k) of the Mann–Whitney statistic is at most (1 − confidence)/2.
    None where there are too few samples for one. Raises ValueError for non-positive samples.
    Source: Conover, Practical Nonparametric Statistics, 3rd ed., section 5.4.
    """
    a, b = np.asarray(a_s, dtype=np.float64), np.asarray(b_s, dtype=np.float64)
    if not (a.size and b.size and np.all(a > 0) and np.all(b > 0)):
        raise ValueError("samples must be positive seconds")
    ratios = np.sort((b[None, :] / a[:, None]).ravel())
    k = _rank(*sorted((a.size, b.size)), (1 - confidence) / 2)
    interval = (float(ratios[k - 1]), float(ratios[len(ratios) - k])) if k else None
    return float(np.median(ratios)), interval


@cache
def _rank(m: int, n: int, tail: float) -> int:
    """The largest k with P(U < k) ≤ tail, for samples of m and n from one distribution."""
    below, total = 0, comb(m + n, m)
    for k, count in enumerate(_orders(m, n)):
        below += count
        if below > tail * total:
            return k
    raise AssertionError("all orders together are more than any tail below 1")


def _orders(m: int, n: int) -> list[int]:
    """orders[u]: arrangements of m and n samples with U = u; the Gaussian binomial coefficient."""
    size = m * n + 1
    orders = [1] + [0] * (size - 1)
    for i in range(1, m + 1):
        for u in range(size - 1, n + i - 1, -1):  # times 1 − q^(n+i)
            orders[u] -= orders[u - n - i]
        for u in range(i, size):  # over 1 − q^i
            orders[u] += orders[u - i]
    return orders
