"""Nominal cycles of the loops: what is counted where."""

from __future__ import annotations

import pytest

from hwmpq import targets
from hwmpq.formats import format_named
from hwmpq.kernels import best
from hwmpq.predict.analytic import TERMS, work
from hwmpq.types import Workload

AVX2 = targets.load("x86-avx2")


def conv(
    size: int, cin: int, cout: int, kernel: int = 1, epilogue: str = "bias", groups: int = 1
) -> Workload:
    pad = kernel // 2
    return Workload.make(
        "depthwise" if groups == cin else "conv2d", epilogue, n=1, h=size, w=size, cin=cin,
        cout=cout, kh=kernel, kw=kernel, sh=1, sw=1, pt=pad, pl=pad, pb=pad, pr=pad, dh=1, dw=1,
        groups=groups,
    )  # fmt: skip


def terms(workload: Workload, fmt: str = "fp32") -> dict[str, float]:
    kernel = best(workload, format_named(fmt), AVX2.features)
    assert kernel is not None
    done = work(workload, format_named(fmt), kernel, AVX2)
    return dict(zip(TERMS, done.terms, strict=True))


def test_channels_that_fill_no_vector() -> None:
    whole, odd = terms(conv(24, 166, 32)), terms(conv(24, 166, 25))
    assert whole["tail"] == whole["crowded"] == odd["compute"] == 0
    assert odd["tail"] == 24 * 24 and odd["crowded"] == pytest.approx(whole["compute"])
    added = terms(conv(24, 166, 25, epilogue="bias+add"))
    assert added["tail"] == 2 * odd["tail"] and added["epilogue"] > odd["epilogue"]


def test_short_segments_widen_more_often() -> None:
    """Segments of three steps end with sums to widen, however many dots the sums could hold."""
    short, long = terms(conv(28, 4, 64, 3), "w2a8"), terms(conv(28, 64, 64, 3), "w2a8")
    assert 16 * short["compute"] > 1.2 * long["compute"]


def test_depthwise_counts_what_is_loaded() -> None:
    one, two, odd = (terms(conv(14, c, c, 5, groups=c)) for c in (32, 64, 36))
    assert two["compute"] == pytest.approx(2 * one["compute"])
    assert one["tail"] == 0 and odd["tail"] == 14 * 14 * 4
