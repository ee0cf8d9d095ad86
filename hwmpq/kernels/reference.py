"""What an operator means, in numpy: accumulators and the numbers that a right kernel may store.

`accumulate` gives the accumulator that `requantize.apply` continues from. Sums are taken in fp64,
which is exact for integers: they stay far below 2^53.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.formats import encoding_named
from hwmpq.requantize import INV_OUT, M_RES, Z_RES, Epilogue, apply
from hwmpq.storage import is_integer
from hwmpq.types import Workload

Array = NDArray[Any]
#: Half a unit in the last place of fp32, relative.
_EPS = 2.0**-24


def accumulate(workload: Workload, x: Array, weight: Array, zero: int) -> Array:
    """The accumulator before its bias: int64 when both operands are integers, else float64.

    x: codes or values, NHWC, [m, k] or [b, m, k]; weight: codes or values in torch's layout, or
    operand b of a matmul. zero: x's zero point: it fills the padding of an image, and a matmul
    takes it off (a layer with weights has it folded into its bias).
    """
    wide = x.astype(np.float64)
    by = weight.astype(np.float64)
    if workload.op == "linear":
        acc = wide @ by.T
    elif workload.op == "matmul":
        acc = (wide - zero) @ (by.transpose(0, 2, 1) if workload["trans_b"] else by)
    else:
        acc = _convolution(workload, wide, by, zero)
    exact = x.dtype.kind in "iu" and weight.dtype.kind in "iu"
    return acc.astype(np.int64) if exact else acc


def _convolution(w: Workload, x: Array, weight: Array, zero: int) -> Array:
    """Sum over the taps of the kernel; every tap is a product of matrices per group."""
    pads = ((0, 0), (w["pt"], w["pb"]), (w["pl"], w["pr"]), (0, 0))
    x = np.pad(x, pads, constant_values=zero)
    (oh, ow), groups = w.out_hw, w["groups"]
    gin, gout = w["cin"] // groups, w["cout"] // groups
    weight = weight.reshape(groups, gout, gin, w["kh"], w["kw"])
    acc = np.zeros((groups, w["n"] * oh * ow, gout))
    for i in range(w["kh"]):
        for j in range(w["kw"]):
            top, left = i * w["dh"], j * w["dw"]
            bottom, right = top + (oh - 1) * w["sh"] + 1, left + (ow - 1) * w["sw"] + 1
            pixels = x[:, top : bottom : w["sh"], left : right : w["sw"]]
            pixels = pixels.reshape(-1, groups, gin).transpose(1, 0, 2)
            acc += pixels @ weight[..., i, j].transpose(0, 2, 1)
    return acc.transpose(1, 0, 2).reshape(w["n"], oh, ow, w["cout"])


def depth(workload: Workload) -> int:
    """Products in one sum."""
    return workload.macs // int(np.prod(workload.out_shape))


@dataclass(frozen=True, eq=False)
class Answer:
    """Stored elements as a kernel may write them: low ≤ right ≤ high, all equal where the sums
    are exact. Codes or values of the result's encoding, float64, in the accumulator's shape."""

    low: Array
    right: Array
    high: Array

    def wrong(self, got: Array) -> str | None:
        """None when `got` lies within, else how many elements do not, and the first of them."""
        bad = np.flatnonzero(~((got >= self.low) & (got <= self.high)))
        if not bad.size:
            return None
        at = int(bad[0])
        where = tuple(map(int, np.unravel_index(at, got.shape)))
        return (
            f"{bad.size} of {got.size} elements differ, the first at {where}: {got.flat[at]:.9g} "
            f"for {self.right.flat[at]:.9g} (allowed {self.low.flat[at]:.9g} to "
            f"{self.high.flat[at]:.9g})"
        )


def answer(acc: Array, e: Epilogue, residual: Array | None, terms: int, magnitude: Array) -> Answer:
    """What the epilogue makes of the accumulators, and how far rounding may move it.

    residual: codes or values. terms: products in one sum; magnitude: Σ|x·w| of a float
    accumulator. The epilogue is monotone in the accumulator, so the error of a sum,
    terms · 2^-24 · Σ|x·w| at most (Higham, Accuracy and Stability, section 4.2), and the few
    roundings behind it are put there and carried through it. An integer accumulator has one right
    result.
    """
    slack = _slack(acc, e, residual, terms, magnitude)
    sums = acc if e.integer else acc.astype(np.float32)
    low, right, high = (
        held(e.out, apply(a, e, residual)) for a in (acc - slack, sums, acc + slack)
    )
    return Answer(np.minimum(low, right), right, np.maximum(high, right))


def held(encoding: str, values: Array) -> Array:
    """fp32 values or fp32-held codes as the encoding keeps them, as float64."""
    if not is_integer(encoding):
        values = encoding_named(encoding).fake(values.astype(np.float32))
    return np.asarray(values, np.float64)


def _slack(acc: Array, e: Epilogue, residual: Array | None, terms: int, magnitude: Array) -> Array:
    """Error of the sum and of the epilogue, in units of the accumulator."""
    if e.integer:
        return np.zeros(acc.shape)
    factor = e.multiplier.astype(np.float64)
    offset = np.abs(e.bias) / factor
    added = np.zeros(())
    if residual is not None:
        r = residual.astype(np.float64)
        if is_integer(e.residual):
            r = (r - e.scalars[Z_RES]) * e.scalars[M_RES]
        added = np.abs(r) / factor
    # A code is rint(y / s): the rounding of y · (1/s) counts as one of y.
    assert e.scalars[INV_OUT] > 0
    slack: Array = terms * _EPS * magnitude + 8 * _EPS * (np.abs(acc) + offset + added)
    return slack
