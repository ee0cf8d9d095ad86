"""Prices fitted on whole artifacts: what a call costs beside its kernel, how fast cells run here.

Where prices so fitted miss by more than ADDITIVE, the sum of a network's cells is not its time.
Then the network is the unit that is measured: every kernel call inside the artifacts was timed, in
the state in which the one before it leaves the caches, together what the artifact takes; such a
time stands for the cell wherever an artifact has the same layer in the same format. (A factor for
every block was tried on SqueezeNet: formats and layers of a block stray in different directions.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import ceil

import numpy as np

from hwmpq.kernels import CODEGEN_VERSION
from hwmpq.lower.steps import Step
from hwmpq.stages.job import Job
from hwmpq.stages.latency import LatencyFacts
from hwmpq.stages.pricing import place, step_seconds
from hwmpq.stages.walks import calling, schedule_of
from hwmpq.types import Assignment, FloatArray, digest

#: No price is thought to be closer to the time than this share.
LEAST_RESIDUAL = 0.02
#: Above this residual steps take the time that they took inside artifacts, if that lowers it.
ADDITIVE = 0.05


@dataclass(frozen=True)
class Whole:
    """A timed artifact. seconds: of one run; calls_s: of every kernel call inside one, in order."""

    assignment: Assignment
    seconds: float
    calls_s: tuple[float, ...]


def fit_prices(job: Job, facts: LatencyFacts, measured: Sequence[Whole]) -> LatencyFacts:
    """The overhead per call and the speed that explain measured artifacts best, and how well; where
    that is not well enough, the seconds of steps inside them.

    measured: uniform and random mixed artifacts. speed is a common factor on all cells: clocks and
    neighbours differ between the hour of the profile and this one, and a cell alone does not find
    the caches as its network leaves them. The overhead is at least 0.
    """
    plain = replace(facts, overhead_s=0.0, speed=1.0, inside={})
    known = []
    for whole in measured:
        steps = calling(schedule_of(job, whole.assignment))
        cells = [step_seconds(step, plain) for step in steps]
        if np.isfinite(cells).all():
            known.append((whole, steps, cells))
    if not known:
        return facts
    calls, sums, seconds = np.array(
        [(float(len(steps)), sum(cells), whole.seconds) for whole, steps, cells in known]
    ).T
    overhead, speed, residual = fitted(calls, sums, seconds)
    common = replace(plain, overhead_s=overhead, speed=speed, residual=residual)
    if residual <= ADDITIVE:
        return common
    inside = [_inside(whole, steps) for whole, steps, _ in known]
    errors = []
    for out, (whole, steps, _) in enumerate(known):
        rest = replace(common, inside=_medians(inside[:out] + inside[out + 1 :]))
        found = sum(step_seconds(step, rest) for step in steps)
        errors.append(abs(found / whole.seconds - 1))
    if bound(errors) >= residual:
        return common
    return replace(common, inside=_medians(inside), residual=bound(errors))


def _inside(whole: Whole, steps: Sequence[Step]) -> dict[str, float]:
    """Place -> seconds there; together what the whole took."""
    scale = whole.seconds / sum(whole.calls_s)
    return {place(s): scale * took for s, took in zip(steps, whole.calls_s, strict=True)}


def _medians(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Place -> the median of its seconds."""
    seen: dict[str, list[float]] = {}
    for one in found:
        for name, seconds in one.items():
            seen.setdefault(name, []).append(seconds)
    return {name: float(np.median(times)) for name, times in seen.items()}


def fitted(calls: FloatArray, cells: FloatArray, seconds: FloatArray) -> tuple[float, float, float]:
    """(overhead, speed, residual): with an overhead if rows left out are foretold better so, which
    few plans of one network, that all make about as many calls, do not always show."""
    found = []
    for free in (False, True):
        errors = left_out_errors(calls, cells, seconds, free)
        found.append((sum(errors), *least_deviation(calls, cells, seconds, free), bound(errors)))
    _, overhead, speed, residual = min(found)
    return overhead, speed, residual


def least_deviation(
    calls: FloatArray, cells: FloatArray, seconds: FloatArray, free: bool
) -> tuple[float, float]:
    """(a, s) of the least Σ |a · calls + s · cells − seconds| / seconds: s > 0, a ≥ 0, and a = 0
    where it is not free.

    The absolute error, so that one disturbed artifact does not move the fit. Some two rows, or one
    with a = 0, are met exactly by an optimum, so all of those are tried.
    """
    tries = [(0.0, float(t / c)) for c, t in zip(cells, seconds, strict=True)]
    for i, j in combinations(range(len(seconds)), 2) if free else ():
        pair = np.array([[calls[i], cells[i]], [calls[j], cells[j]]])
        if abs(np.linalg.det(pair)) > 1e-9 * calls[i] * cells[j]:
            a, s = np.linalg.solve(pair, seconds[[i, j]])
            if a >= 0 and s > 0:
                tries.append((float(a), float(s)))
    return min(tries, key=lambda t: np.abs((t[0] * calls + t[1] * cells) / seconds - 1).sum())


def left_out_errors(
    calls: FloatArray, cells: FloatArray, seconds: FloatArray, free: bool
) -> list[float]:
    """The relative error of every row by a fit on the others."""
    errors = []
    for out in range(len(seconds)):
        rest = np.arange(len(seconds)) != out
        if rest.any():
            a, s = least_deviation(calls[rest], cells[rest], seconds[rest], free)
            errors.append(float(abs((a * calls[out] + s * cells[out]) / seconds[out] - 1)))
    return errors


def bound(errors: Sequence[float]) -> float:
    """What the error of a further plan is thought to be at most: the 90 % quantile, the largest
    below 10 rows (the jackknife's interval, Barber et al., Annals of Statistics 49, 2021). At least
    LEAST_RESIDUAL."""
    rank = min(ceil(0.9 * (len(errors) + 1)), len(errors))
    return max(sorted(errors)[rank - 1] if errors else 0.0, LEAST_RESIDUAL)


def overhead_key(job: Job) -> str:
    """Under which the store keeps what `fit_prices` found for a network on a device."""
    return digest(["overhead, speed, inside", CODEGEN_VERSION, job.key, dict(job.target.tvm),
                   job.options.threads, job.fingerprint])  # fmt: skip
