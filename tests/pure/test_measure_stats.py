"""Statistics of timings, against closed forms and simulation."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hwmpq.measure import CellTiming, stats
from hwmpq.measure.replicate import joined
from hwmpq.types import Measurement, Workload

WORKLOAD = Workload.make("linear", m=1, k=1, n=1)


def test_median() -> None:
    assert stats.median([3.0, 1.0, 2.0, 100.0]) == 2.5
    with pytest.raises(ValueError, match="no samples"):
        stats.median([])
    with pytest.raises(ValueError, match="no samples"):
        stats.median_interval([])


@pytest.mark.parametrize(
    ("n", "low", "high"),  # ranks from a table of the sign test, 95 %; many: scipy's binom
    [
        (6, 1, 6), (8, 1, 8), (9, 2, 8), (12, 3, 10), (20, 6, 15), (25, 8, 18), (50, 18, 33),
        (3001, 1447, 1555),
    ],
)  # fmt: skip
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
    assert stats.speed_factor([1.02, 1.0, 1.02], 1.0) == 1.0  # a steady machine is not corrected
    assert stats.speed_factor([1.2, 1.25, 1.3], 1.0) == pytest.approx(0.8)


def test_flags_widen_the_doubt() -> None:
    assert stats.disturbance(False, 1.0) == 0
    noisy, slow = stats.disturbance(True, 1.0), stats.disturbance(False, 0.9)
    assert noisy == stats.NOISY and slow == pytest.approx(math.log(1 / 0.9) / 2)
    both = stats.disturbance(True, 0.9, spread=0.04)
    assert both == pytest.approx(math.sqrt(noisy**2 + slow**2 + 0.02**2))


def _part(samples: list[float], factor: float = 1.0, error: str = "") -> CellTiming:
    quality = {
        "rounds": [*range(len(samples))], "sentinel_s": [1.0 / factor] * len(samples),
        "speed_factor": factor, "noisy": False, "switches": 2, "core": 1, "drift": 0.0,
        "steal": 0.0, "away": 0.001, "pressure": 0.1, "block_steal": 0.0, "calibration_ratio": 1.1,
    }  # fmt: skip
    return CellTiming("a", tuple(samples), inner_count=3, quality={} if error else quality,
                      error=error)  # fmt: skip


def test_processes_are_joined_at_one_speed() -> None:
    """The second process ran on a machine that was a quarter slower, and said so."""
    found = joined([_part([1.0, 1.01, 0.99]), _part([1.25, 1.26, 1.24], factor=0.8)], 3)
    assert found.samples_s == (1.0, 1.01, 0.99, 1.25, 1.26, 1.24)
    assert found.quality["rounds"] == [0, 1, 2, 3, 4, 5] and found.quality["processes"] == 2
    assert found.quality["spread"] == pytest.approx(0) and found.quality["switches"] == 4
    steady = Measurement("a", WORKLOAD, "fp32", "k", 1, found.samples_s, quality=found.quality)
    assert steady.latency_s == pytest.approx(1.0, rel=0.02)
    apart = joined([_part([1.0]), _part([1.1])], 1).quality
    assert apart["spread"] == pytest.approx(0.1) and apart["disturbance"] == pytest.approx(0.05)
    assert joined([_part([1.0]), _part([], error="crashed")], 1).error == "crashed"


def test_a_disturbed_process_does_not_count_beside_quiet_ones() -> None:
    wild = replace(_part([9.0] * 3), quality={**_part([9.0] * 3).quality, "noisy": True})
    found = joined([_part([1.0] * 3), wild, _part([1.0] * 3)], 3)
    assert found.samples_s == (1.0,) * 6 and found.rejected_s == (9.0,) * 3
    assert found.quality["rounds"] == [0, 1, 2, 6, 7, 8] and not found.quality["noisy"]
    alone = joined([_part([1.0] * 3), wild], 3)  # three quiet epochs are too few for an interval
    assert alone.quality["noisy"] and len(alone.samples_s) == 6


def test_importing_measure_is_light() -> None:
    code = (
        "import sys, hwmpq.measure; print([m for m in ('tvm', 'sqlalchemy') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.stdout.strip() == "[]", run.stderr
