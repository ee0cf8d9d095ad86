"""Statistics of noisy timings: medians, exact sign-test intervals, paired comparison, drift.

No distribution is assumed: timings on shared machines are skewed, with several modes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["faster", "slower", "same", "ambiguous"]
Values = Sequence[float] | NDArray[np.float64]

#: Fewest samples for which a 95 % sign interval exists: 2 · 2⁻⁶ = 3.1 %, 2 · 2⁻⁵ = 6.3 %.
MIN_SAMPLES = 6
#: A machine whose sentinel moved by no more than this ran at one speed ...
STEADY = 0.03
#: ... and one whose sentinel moved by more than this is timed again.
UNSTEADY = 0.10
#: Relative standard error of a median for which there were too few quiet epochs.
NOISY = 0.05


def median(samples: Values) -> float:
    """The median. Raises ValueError when there is no sample."""
    if len(samples) == 0:
        raise ValueError("median of no samples")
    return float(np.median(samples))


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
    most = Fraction((1 - confidence) / 2) * 2**n  # whole numbers: 2**-n is 0 for many samples
    k, tail, ways = 0, 0, 1
    while (tail := tail + ways) <= most:
        ways = ways * (n - k) // (k + 1)
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


def speed_factor(sentinel_s: Values, reference_s: float) -> float:
    """Factor that turns a block's seconds into those at the session's reference speed.

    sentinel_s: the fixed workload's seconds in each round; reference_s: in the session. 1 where
    they differ by no more than STEADY: less is the sentinel's own noise.
    """
    factor = reference_s / median(sentinel_s)
    return factor if abs(math.log(factor)) > math.log1p(STEADY) else 1.0


def disturbance(noisy: bool, factor: float, spread: float = 0.0) -> float:
    """Relative standard error that the quality flags of a timing stand for, 0 for a quiet one.

    noisy: not enough quiet epochs; factor: of `speed_factor`, half of which is doubted; spread:
    between the medians of several processes, as (largest / smallest) − 1.
    """
    return math.hypot(NOISY * noisy, abs(math.log(factor)) / 2, spread / 2)
