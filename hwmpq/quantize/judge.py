"""How much a network loses: outputs over a data set, and the paired comparison with float.

Metrics give one score per sample, higher is better: `top1` (100 if the label is hit), `agreement`
(100 if the class is float's), `sqnr` (dB of signal over noise of the outputs, at most 120: about
the resolution of fp32, and what float has by definition).

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
from hwmpq.errors import InputError, UnknownName
from hwmpq.quantize.feed import good_batch
from hwmpq.quantize.simulate import Simulator

Real = float  # `Judgement.float` hides the name
F64 = NDArray[np.float64]
#: (outputs [N, ...], float outputs, labels [N] or None) -> scores [N], higher is better.
Metric = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_Z = 1.96
_SQNR_CAP = 120.0


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
    reference: Tensor, simulated: Tensor, labels: Tensor | None = None, metric: str | Metric = ""
) -> Judgement:
    """Compare outputs [N, ...] with float's on the same samples.

    metric: a name or a function; by default `top1` with labels, `agreement` without.
    Raises UnknownName for an unknown metric, InputError for unequal sizes or missing labels.
    """
    if reference.shape != simulated.shape or (labels is not None and len(labels) != len(simulated)):
        sizes = [tuple(t.shape) for t in (reference, simulated, labels) if t is not None]
        raise InputError("outputs and labels differ in size", sizes)
    metric = metric or ("agreement" if labels is None else "top1")
    if isinstance(metric, str) and metric not in METRICS:
        raise UnknownName("metric", metric, METRICS)
    score = METRICS[metric] if isinstance(metric, str) else metric
    a = score(reference, reference, labels).double().numpy()
    b = score(simulated, reference, labels).double().numpy()
    same = reference.flatten(1).argmax(1) == simulated.flatten(1).argmax(1)
    return Judgement(
        metric=metric if isinstance(metric, str) else getattr(metric, "__name__", "custom"),
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


def _top1(outputs: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise InputError("metric top1 without labels", next="Use the metric agreement.")
    return 100.0 * (outputs.flatten(1).argmax(1) == labels)


def _agreement(outputs: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
    return 100.0 * (outputs.flatten(1).argmax(1) == reference.flatten(1).argmax(1))


def _sqnr(outputs: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
    signal = reference.double().flatten(1).square().sum(1)
    noise = (outputs.double() - reference.double()).flatten(1).square().sum(1)
    ratio = signal / noise.clamp(min=1e-300)
    return (10 * torch.log10(ratio.clamp(min=1e-300))).clamp(max=_SQNR_CAP)


METRICS: dict[str, Metric] = {"top1": _top1, "agreement": _agreement, "sqnr": _sqnr}
