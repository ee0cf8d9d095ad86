"""Statistics of noisy timings: medians, exact sign-test intervals, paired comparison, drift.

No distribution is assumed: timings on shared machines are skewed, with several modes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hwmpq.types import FloatArray

Verdict = Literal["faster", "slower", "same", "ambiguous"]
Values = Sequence[float] | NDArray[np.float64]

#: Fewest samples for which a 95 % sign interval exists: 2 · 2⁻⁶ = 3.1 %, 2 · 2⁻⁵ = 6.3 %.
MIN_SAMPLES = 6


def median(samples: Values) -> float:
    """The median. Raises ValueError when there is no sample."""
    if len(samples) == 0:
        raise ValueError("median of no samples")
    return float(np.median(samples))


def mad(samples: Values) -> float:
    """Median absolute deviation from the median, in the samples' unit (not scaled to a sigma)."""
    return median(np.abs(np.asarray(samples, dtype=np.float64) - median(samples)))


def median_interval(samples: Values, confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free interval for the median from two order statistics (inverted sign test).

    The k-th smallest and k-th largest sample, with the largest k for which the exact binomial
    P(X < k), X ~ Bin(n, ½), is at most (1 − confidence)/2. Too few samples: (min, max).
    Source: Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2.
    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    n = len(ordered)
    if n == 0:
        raise ValueError("interval of no samples")
    k, tail = 0, 0.0
    while (tail := tail + math.comb(n, k) * 0.5**n) <= (1 - confidence) / 2:
        k += 1
    k = max(k, 1)
    return float(ordered[k - 1]), float(ordered[n - k])


@dataclass(frozen=True)
class Comparison:
    """a against b from paired samples: the median of a/b, its interval, and what may be claimed."""

    ratio: float
    interval: tuple[float, float]
    verdict: Verdict
    pairs: int


def compare(a_s: Values, b_s: Values, tolerance: float = 0.03) -> Comparison:
    """Is a faster than b? a_s[i] and b_s[i] were timed next to each other.

    'faster' or 'slower' only if the interval of the paired log ratio excludes 1; 'same' if it
    contains 1 and lies within ± `tolerance`; else, and below MIN_SAMPLES pairs, 'ambiguous'.
    Raises ValueError for unpaired or non-positive samples.
    """
    a, b = np.asarray(a_s, dtype=np.float64), np.asarray(b_s, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(f"samples are not paired: {a.shape} and {b.shape}")
    if not (np.all(a > 0) and np.all(b > 0)):
        raise ValueError("samples must be positive seconds")
    logs = np.log(a / b)
    low, high = median_interval(logs)
    verdict: Verdict = "ambiguous"
    if len(logs) >= MIN_SAMPLES:
        if high < 0:
            verdict = "faster"
        elif low > 0:
            verdict = "slower"
        elif max(-low, high) <= math.log1p(tolerance):
            verdict = "same"
    interval = (math.exp(low), math.exp(high))
    return Comparison(math.exp(median(logs)), interval, verdict, len(logs))


def drift(sentinel_s: Values) -> float:
    """How much slower the fixed workload ran in the second half of a block: 0.03 = 3 % slower."""
    values = np.asarray(sentinel_s, dtype=np.float64)
    half = len(values) // 2
    if half == 0:
        return 0.0
    return median(values[-half:]) / median(values[:half]) - 1


def correct_drift(
    samples_s: Values, sentinel_s: Values, reference_s: float | None = None
) -> FloatArray:
    """Seconds as they would have been at the machine's reference speed.

    sentinel_s[i]: the fixed workload's time in the round of samples_s[i]; reference_s: its time in
    the reference session (default: its median here). The correction is multiplicative.
    """
    samples = np.asarray(samples_s, dtype=np.float64)
    sentinel = np.asarray(sentinel_s, dtype=np.float64)
    if samples.shape != sentinel.shape:
        raise ValueError(f"one sentinel per sample: {samples.shape} and {sentinel.shape}")
    reference = median(sentinel) if reference_s is None else reference_s
    corrected: FloatArray = samples * (reference / sentinel)
    return corrected
