"""The epilogue: numpy and torch give equal bits; each combination means what is written."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from hwmpq.requantize import (
    HI,
    INV_OUT,
    LO,
    M_RES,
    Z_IN,
    Z_OUT,
    Z_RES,
    Epilogue,
    Quantizer,
    apply,
    constants,
    reciprocal,
)

CHANNELS = 5
OUT, RESIDUAL, X = Quantizer(0.037, 11), Quantizer(0.021, 100), Quantizer(0.013, 7)
SCALES = np.array([0.002, 0.01, 0.0003, 0.05, 0.007], np.float32)
SUMS = np.array([10, -4, 0, 300, -77], np.int64)
BIAS = np.array([0.5, -1.0, 0.0, 3.0, -0.01], np.float32)
RANGES = ((None, None), (0.0, None), (0.0, 6.0), (-1.0, 1.0))


def epilogue(
    integer: bool, out: str, residual: str, act: Any = (None, None), **more: Any
) -> Epilogue:
    top = {"u8": 255, "u4": 15}.get(out, 0)
    return constants(
        **{
            "integer": integer, "channels": CHANNELS, "bias": BIAS, "x": X,
            "weight_scale": SCALES if integer else 1.0, "weight_sum": SUMS if integer else None,
            "out": out, "out_quantizer": OUT, "out_range": (0, top), "residual": residual,
            "residual_quantizer": RESIDUAL, "act_range": act, **more,
        }
    )  # fmt: skip


def samples(integer: bool, residual: str) -> tuple[np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(3)
    shape = (64, CHANNELS)
    if integer:
        acc = rng.integers(-40000, 40000, shape).astype(np.int32)
        acc[0], acc[1] = 2**30 - 1, -(2**30)
    else:
        acc = rng.normal(0, 4, shape).astype(np.float32)
        acc[0], acc[1] = 1e30, -1e30
    if not residual:
        return acc, None
    if residual in ("u8", "u4"):
        return acc, rng.integers(0, 256 if residual == "u8" else 16, shape).astype(np.float32)
    return acc, rng.normal(0, 3, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("integer", "out", "residual", "act"),
    list(product((True, False), ("u8", "u4", "fp32", "bf16"), ("", "u8", "fp32"), RANGES)),
)
def test_numpy_and_torch_give_equal_bits(
    integer: bool, out: str, residual: str, act: tuple[float | None, float | None]
) -> None:
    e = epilogue(integer, out, residual, act)
    acc, r = samples(integer, residual)
    mine = apply(acc, e, r)
    theirs = apply(torch.from_numpy(acc), e, None if r is None else torch.from_numpy(r))
    assert mine.dtype == np.float32 and theirs.dtype == torch.float32
    assert mine.tobytes() == theirs.numpy().tobytes()
    if e.to_code:
        top = 255 if out == "u8" else 15
        assert np.array_equal(mine, np.rint(mine)) and mine.min() >= 0 and mine.max() <= top
    elif act[1] is not None:
        assert mine.max() == np.float32(act[1])


@pytest.mark.parametrize("residual", ["", "u8", "fp32"])
def test_codes_follow_the_formula(residual: str) -> None:
    """Every product is one fp32 product, written out number by number."""
    e = epilogue(True, "u8", residual, (0.0, None))
    acc, r = samples(True, residual)
    s = e.scalars
    scaled = (X.scale * SCALES.astype(np.float64)) / np.float64(np.float32(OUT.scale))
    assert np.array_equal(e.multiplier, scaled.astype(np.float32))
    for row in range(len(acc)):
        for c in range(CHANNELS):
            q = np.rint(np.float32(acc[row, c] + e.bias[c]) * e.multiplier[c])
            if residual == "u8":
                assert r is not None
                q += np.rint((np.float32(r[row, c]) - s[Z_RES]) * s[M_RES])
            elif residual:
                assert r is not None
                q += np.rint(np.float32(r[row, c]) * s[INV_OUT])
            want = min(max(q + OUT.zero, OUT.zero), 255)  # relu: nothing below the zero point
            assert apply(acc, e, r)[row, c] == want, (row, c)


def test_the_zero_point_of_the_input_goes_into_the_bias() -> None:
    e = epilogue(True, "u8", "")
    want = np.rint(BIAS.astype(np.float64) / (X.scale * SCALES.astype(np.float64))) - X.zero * SUMS
    assert e.bias.dtype == np.int32 and np.array_equal(e.bias, want)
    assert (e.scalars[Z_IN], e.scalars[Z_OUT]) == (X.zero, OUT.zero)


def test_a_huge_bias_stays_in_int32() -> None:
    e = epilogue(True, "u8", "", bias=np.full(CHANNELS, 1e12, np.float32), weight_sum=None)
    assert np.array_equal(e.bias, np.full(CHANNELS, 2**30, np.int32))
    assert np.array_equal(apply(np.full((1, CHANNELS), 2**30 - 1, np.int32), e)[0, 1:2], [255])


@pytest.mark.parametrize(
    ("act", "low", "high"),
    [
        ((None, None), 0, 255), ((0.0, None), 11, 255), ((0.0, 6.0), 11, 173),
        ((-100.0, 100.0), 0, 255), ((-0.2, 0.2), 6, 16),
    ],
)  # fmt: skip
def test_bounds_of_activations_as_codes(act: Any, low: int, high: int) -> None:
    e = epilogue(True, "u8", "", act)
    assert (e.scalars[LO], e.scalars[HI]) == (low, high)


def test_clamping_codes_is_clamping_values() -> None:
    """rint is monotone: relu6 on codes = relu6 on values, then rounding."""
    values = np.linspace(-3, 9, 4001, dtype=np.float32).reshape(-1, 1)
    inverse = reciprocal(OUT.scale)
    e = constants(
        integer=False, channels=1, bias=None, x=Quantizer(), weight_scale=1.0, weight_sum=None,
        out="u8", out_quantizer=OUT, act_range=(0.0, 6.0),
    )  # fmt: skip
    want = np.clip(np.rint(np.clip(values, 0, np.float32(6)) * inverse) + OUT.zero, 0, 255)
    assert np.array_equal(apply(values, e), want)


def test_the_factor_of_an_attention() -> None:
    plain, scaled = (epilogue(True, "fp32", "", scale=s) for s in (1.0, 0.125))
    assert np.array_equal(scaled.multiplier, plain.multiplier * np.float32(0.125))
    floats = epilogue(False, "fp32", "", scale=0.125, bias=None)
    acc = np.full((1, CHANNELS), 8.0, np.float32)
    # the input's scale belongs to the codes of an integer; a float input has the identity
    assert np.allclose(apply(acc, floats), 8.0 * 0.125 * X.scale)


def test_channels_on_another_axis() -> None:
    e = epilogue(True, "u8", "u8")
    acc, r = samples(True, "u8")
    assert r is not None
    want = apply(acc, e, r).T
    assert np.array_equal(apply(acc.T, e, r.T, channel_axis=0), want)
    image = torch.from_numpy(acc.T.copy()).reshape(1, CHANNELS, 8, 8)
    found = apply(image, e, torch.from_numpy(r.T.copy()).reshape(image.shape), channel_axis=1)
    assert np.array_equal(found.reshape(CHANNELS, 64).numpy(), want)


def test_halves_go_to_even() -> None:
    e = constants(
        integer=True, channels=1, bias=None, x=Quantizer(0.5), weight_scale=1.0, weight_sum=None,
        out="u8", out_quantizer=Quantizer(1.0, 10),
    )  # fmt: skip
    acc = np.array([[1], [3], [5], [-1], [-3]], np.int32)
    assert apply(acc, e).ravel().tolist() == [10, 12, 12, 10, 8]
    assert apply(torch.from_numpy(acc), e).ravel().tolist() == [10, 12, 12, 10, 8]
