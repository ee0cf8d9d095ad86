"""Statistics of timings, against closed forms and simulation."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hwmpq.measure import stats


def test_median_and_mad() -> None:
    assert stats.median([3.0, 1.0, 2.0, 100.0]) == 2.5
    assert stats.mad([1.0, 1.0, 2.0, 3.0, 100.0]) == 1.0
    with pytest.raises(ValueError, match="no samples"):
        stats.median([])
    with pytest.raises(ValueError, match="no samples"):
        stats.median_interval([])


@pytest.mark.parametrize(
    ("n", "low", "high"),  # ranks from a table of the sign test, 95 %
    [(6, 1, 6), (8, 1, 8), (9, 2, 8), (12, 3, 10), (20, 6, 15), (25, 8, 18), (50, 18, 33)],
)
def test_interval_ranks(n: int, low: int, high: int) -> None:
    values = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))
    assert stats.median_interval(values) == (low, high)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_interval_of_few_samples_is_the_range(n: int) -> None:
    assert stats.median_interval(np.arange(float(n))) == (0.0, n - 1.0)


@pytest.mark.parametrize("n", [6, 12, 40])
def test_interval_covers_the_median(n: int) -> None:
    """At least 95 % of the intervals hold the true median, here of a skewed distribution."""
    rng = np.random.default_rng(0)
    intervals = [stats.median_interval(rng.exponential(size=n)) for _ in range(2000)]
    share = np.mean([low <= math.log(2) <= high for low, high in intervals])
    assert share >= 0.94  # 0.95 less three standard errors of 2000 trials


def test_compare_verdicts() -> None:
    rng = np.random.default_rng(1)
    base = rng.lognormal(0.0, 0.5, 12)  # the machine's mood, common to both
    noise = rng.normal(1.0, 0.002, 12)
    assert stats.compare(base * noise * 0.9, base).verdict == "faster"
    assert stats.compare(base * noise * 1.1, base).verdict == "slower"
    flip = np.where(np.arange(12) % 2, 1.005, 0.995)
    assert stats.compare(base * flip, base).verdict == "same"
    wild = np.where(np.arange(12) % 2, 1.5, 0.7)
    assert stats.compare(base * wild, base).verdict == "ambiguous"
    few = stats.compare([0.5] * 5, [1.0] * 5)
    assert few.verdict == "ambiguous" and few.ratio == pytest.approx(0.5) and few.pairs == 5


def test_compare_is_antisymmetric() -> None:
    a, b = np.random.default_rng(2).lognormal(size=(2, 13))
    one, other = stats.compare(a, b), stats.compare(b, a)
    assert one.ratio * other.ratio == pytest.approx(1)
    assert one.interval[0] * other.interval[1] == pytest.approx(1)


def test_compare_refuses() -> None:
    with pytest.raises(ValueError, match="not paired"):
        stats.compare([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="positive"):
        stats.compare([1.0, 0.0], [1.0, 1.0])


def test_drift() -> None:
    assert stats.drift([1.0] * 6 + [1.1] * 6) == pytest.approx(0.1)
    assert stats.drift([1.0]) == 0.0
    sentinel = np.linspace(1.0, 1.3, 12)
    flat = stats.correct_drift(5e-6 * sentinel, sentinel, reference_s=1.0)
    assert flat == pytest.approx(np.full(12, 5e-6))
    assert stats.correct_drift([2.0, 2.0], [1.0, 1.0]) == pytest.approx([2.0, 2.0])
    with pytest.raises(ValueError, match="one sentinel per sample"):
        stats.correct_drift([1.0], [1.0, 2.0])


def test_importing_measure_is_light() -> None:
    code = (
        "import sys, hwmpq.measure; print([m for m in ('tvm', 'sqlalchemy') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.stdout.strip() == "[]", run.stderr
