"""From the values of a tensor to its scale and zero point."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwmpq.formats import Encoding, encoding_named, reciprocal
from hwmpq.requantize import Quantizer

Method = Literal["mse", "minmax", "percentile", "entropy"]
METHODS: tuple[Method, ...] = ("mse", "minmax", "percentile", "entropy")
BINS = 2048
F64 = NDArray[np.float64]

#: Parts of each end of the range that 'mse' tries: fine near 1, then geometrically.
_RATIOS = np.unique(np.concatenate([np.linspace(0.5, 1, 51), np.geomspace(0.01, 0.5, 40)]))[::-1]
_SWEEPS = 2


@dataclass(eq=False)
class Histogram:
    """Values in BINS equal bins over [low, high], low ≤ 0 ≤ high. Exact zeros, which every
    quantizer keeps, are counted apart."""

    low: float
    high: float
    counts: F64 = field(default_factory=lambda: np.zeros(BINS))
    zeros: int = 0

    def add(self, x: Tensor) -> None:
        """Count the values of a tensor; those outside the range are not."""
        zeros = x.numel() - int(torch.count_nonzero(x))
        self.zeros += zeros
        if self.high > self.low:
            self.counts += self._count(x)
            if zeros:
                self.counts -= zeros * self._count(torch.zeros(1))

    def _count(self, x: Tensor) -> F64:
        counts = torch.histc(x.detach().cpu().flatten(), BINS, self.low, self.high)
        return counts.numpy().astype(np.float64)

    @property
    def centers(self) -> F64:
        """The value that stands for each bin."""
        width = (self.high - self.low) / BINS
        return self.low + width * (np.arange(BINS, dtype=np.float64) + 0.5)


def quantizer_of(
    histogram: Histogram, encoding_name: str, method: Method, percentile: float
) -> Quantizer:
    """Scale and zero point of the values in an integer encoding.

    mse: both ends of the range are cut to the parts that minimise Σ counts · (x − fake(x))²; ends
    are searched together, then in turn. percentile: so many percent lie below the upper end, and
    above the lower one. entropy: both ends are cut to the part that loses least information
    (`_divergence`).
    """
    encoding = encoding_named(encoding_name)
    low, high = histogram.low, histogram.high
    if method == "percentile":
        low, high = _percentiles(histogram, percentile)
    if method not in ("mse", "entropy") or high == low:
        scale, zero = _affine(np.array([low]), np.array([high]), encoding)
        return Quantizer(float(scale[0]), int(zero[0]))
    used = histogram.counts > 0
    x, counts = histogram.centers[used], histogram.counts[used]

    def best(lows: F64, highs: F64) -> int:
        return int(np.argmin(_errors(x, counts, *_affine(lows, highs, encoding), encoding)))

    if method == "entropy":
        scales, zeros = _affine(low * _RATIOS, high * _RATIOS, encoding)
        lost = [_divergence(x, counts, *q, encoding) for q in zip(scales, zeros, strict=True)]
        best_one = int(np.argmin(lost))
        return Quantizer(float(scales[best_one]), int(zeros[best_one]))
    one = np.ones_like(_RATIOS)
    pick = best(low * _RATIOS, high * _RATIOS)
    lower = upper = _RATIOS[pick]
    if encoding.qmin == 0 and low < 0 < high:
        for _ in range(_SWEEPS):
            lower = _RATIOS[best(low * _RATIOS, high * upper * one)]
            upper = _RATIOS[best(low * lower * one, high * _RATIOS)]
    scale, zero = _affine(np.array([low * lower]), np.array([high * upper]), encoding)
    return Quantizer(float(scale[0]), int(zero[0]))


def _affine(low: F64, high: F64, encoding: Encoding) -> tuple[NDArray[np.float32], F64]:
    """fp32 scales and zero points for ranges [n] that hold 0; scale 1 for an empty range."""
    if encoding.qmin < 0:
        exact, low = np.maximum(-low, high) / encoding.qmax, np.zeros_like(low)
    else:
        exact = (high - low) / encoding.qmax
    scale = exact.astype(np.float32)
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
    zero = np.clip(np.rint(-low.astype(np.float32) * reciprocal(scale)), 0, encoding.qmax)
    return scale, zero.astype(np.float64)


def _errors(x: F64, counts: F64, scale: NDArray[np.float32], zero: F64, encoding: Encoding) -> F64:
    """Σ counts · (x − fake(x))² for n quantizers; x, counts: [bins]; result [n]."""
    z, s = zero[:, None], scale.astype(np.float64)[:, None]
    codes = np.clip(np.rint(x / s) + z, encoding.qmin, encoding.qmax)
    error: F64 = ((codes - z) * s - x) ** 2 @ counts
    return error


def _divergence(x: F64, counts: F64, scale: np.float32, zero: float, encoding: Encoding) -> float:
    """KL(p ‖ q) in nats of n bins and what is left of them in the encoding, [bins].

    p: the counts, with those outside the range added to its first and last bin; q: the counts
    inside, spread evenly over the bins that share a code (Migacz, 8-bit inference with TensorRT,
    GTC 2017).
    """
    codes = np.rint(x / np.float64(scale)) + zero
    inside = (codes >= encoding.qmin) & (codes <= encoding.qmax)
    if not inside.any():
        return np.inf
    p = counts[inside].copy()
    first = int(np.argmax(inside))
    p[0] += counts[:first].sum()
    p[-1] += counts[first + len(p) :].sum()
    _, group, shared = np.unique(codes[inside], return_inverse=True, return_counts=True)
    q = (np.bincount(group, counts[inside]) / shared)[group]
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum(p * np.log(p / q)))


def _percentiles(histogram: Histogram, percentile: float) -> tuple[float, float]:
    """Ends of the range that leave (100 − percentile) % of all values outside, on each side."""
    if histogram.high == histogram.low:
        return histogram.low, histogram.high
    width = (histogram.high - histogram.low) / BINS
    counts = histogram.counts.copy()
    counts[min(BINS - 1, int(-histogram.low / width))] += histogram.zeros
    below = np.cumsum(counts) / counts.sum()
    outside = 1 - percentile / 100
    first = int(np.searchsorted(below, outside, "right"))
    last = int(np.searchsorted(below, 1 - outside, "left"))
    low = histogram.low + width * first
    high = histogram.low + width * (min(last, BINS - 1) + 1)
    return min(low, 0.0), max(high, 0.0)
