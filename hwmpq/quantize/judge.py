"""How much a network loses: outputs over a data set, and the paired comparison with float.

The drop is the mean over samples of float's score minus the simulated one: paired, so that only
samples that differ add noise. Its interval has 95 %. For scores of 0 or 100: the adjusted Wald
interval for paired proportions (Bonett and Price, J. Educ. Behav. Stat. 37(4), 2012), i.e. the
normal approximation with one pseudo sample added to each kind of disagreement, which is no point
when nothing differs. For other scores: mean ± 1.96 standard errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwmpq.data import DataSet
from hwmpq.errors import InputError
from hwmpq.quantize.feed import good_batch
from hwmpq.quantize.scores import METRICS, Batch, Score, default_metric, find_score
from hwmpq.quantize.simulate import Simulator

Real = float  # `Judgement.float` hides the name
F64 = NDArray[np.float64]
_Z = 1.96


@dataclass(frozen=True)
class Judgement:
    """float, simulated: mean scores (percent; dB for sqnr); drop = float − simulated with its 95 %
    interval; n: samples; agreement: percent of samples with float's class."""

    metric: str
    float: Real
    simulated: Real
    n: int
    drop: Real
    drop_interval: tuple[Real, Real]
    agreement: Real


def predict(
    model: Callable[[Tensor], Tensor | list[Tensor]],
    dataset: DataSet,
    batch: int | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """First output of a Simulator or module for each image, in order: [N, ...], on the CPU.

    batch: images at a time; by default what runs fastest. limit: take only the first so many.
    progress: called with (images done, in all).
    """
    if batch is None:
        batch = good_batch(model.graph) if isinstance(model, Simulator) else 16
    count = len(dataset) if limit is None else min(limit, len(dataset))
    found: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, count, batch):
            stop = min(count, start + batch)
            result = model(torch.from_numpy(dataset.batch(range(start, stop))))
            found.append((result if isinstance(result, Tensor) else result[0]).cpu())
            if progress:
                progress(stop, count)
    return torch.cat(found)


def judge(
    reference: Tensor, simulated: Tensor, labels: Tensor | None = None, metric: str | Score = ""
) -> Judgement:
    """Compare outputs [N, ...] with float's on the same samples.

    metric: by default `top1` with labels, `agreement` without. Raises UnknownName for an unknown
    metric, InputError for unequal sizes and as the metric does.
    """
    if reference.shape != simulated.shape or (labels is not None and len(labels) != len(simulated)):
        sizes = [tuple(t.shape) for t in (reference, simulated, labels) if t is not None]
        raise InputError("outputs and labels differ in size", sizes)
    if isinstance(metric, str):
        metric = find_score("metric", metric, METRICS) if metric else default_metric(labels)
    batch = Batch(reference, labels)
    a, b = metric(reference, batch).numpy(), metric(simulated, batch).numpy()
    same = reference.flatten(1).argmax(1) == simulated.flatten(1).argmax(1)
    return Judgement(
        metric=metric.name,
        float=float(a.mean()),
        simulated=float(b.mean()),
        n=len(a),
        drop=float((a - b).mean()),
        drop_interval=_interval(a, b),
        agreement=100 * float(same.double().mean()),
    )


def _interval(a: F64, b: F64) -> tuple[float, float]:
    """95 % interval of mean(a − b)."""
    n = len(a)
    if set(np.unique(np.concatenate([a, b]))) <= {0.0, 100.0}:
        lost, won = ((np.sum(d) + 1) / (n + 2) for d in (a > b, a < b))
        middle, half = lost - won, _Z * np.sqrt((lost + won - (lost - won) ** 2) / (n + 2))
        return float(100 * (middle - half)), float(100 * (middle + half))
    half = _Z * (a - b).std(ddof=1) / np.sqrt(n) if n > 1 else np.inf
    return float((a - b).mean() - half), float((a - b).mean() + half)
