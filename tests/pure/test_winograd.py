"""The transforms are exact, their operands fit 16 bits, and the kernel is chosen where it pays."""

from __future__ import annotations

import numpy as np
import pytest

from hwmpq import targets
from hwmpq.formats import format_named
from hwmpq.kernels import Kernel, best, candidates
from hwmpq.kernels.nests import toom
from hwmpq.types import Workload

AVX2 = targets.load("x86-avx2").features


def conv(cin: int, size: int, **changed: int) -> Workload:
    dims = {
        "n": 1, "h": size, "w": size, "cin": cin, "cout": cin, "kh": 3, "kw": 3, "sh": 1, "sw": 1,
        "pt": 1, "pl": 1, "pb": 1, "pr": 1, "dh": 1, "dw": 1, "groups": 1,
    }  # fmt: skip
    return Workload.make("conv2d", "bias", **dims | changed)


def winograd(work: Workload, fmt: str = "w8a8") -> Kernel | None:
    found = candidates(work, format_named(fmt), AVX2)
    return next((k for k in found if k.nest.name == "winograd"), None)


def test_a_tile_is_the_convolution_modulo_2_to_the_32() -> None:
    rng = np.random.default_rng(0)
    d = rng.integers(0, 256, (6, 6, 50))
    g = rng.integers(-128, 128, (3, 3, 50))
    data = toom.both(toom.data, [list(row) for row in d])
    weight = toom.both(toom.weight, [list(row) for row in g])
    products = np.array(data) * np.array(weight)
    sums = [list(row) for row in products.sum(-1, keepdims=True).astype(np.int32)]
    with np.errstate(over="ignore"):
        got = [
            [(y * np.int32(toom.INVERSE) >> toom.SHIFT).item() for y in row]
            for row in toom.both(toom.result, sums)
        ]
    right = [[int((d[y : y + 3, x : x + 3] * g).sum()) for x in range(4)] for y in range(4)]
    assert got == right


def test_operands_fit_sixteen_bits_at_the_ends_of_their_range() -> None:
    for step, size, low, high in ((toom.data, 6, 0, 255), (toom.weight, 3, -128, 127)):
        rows = np.array(step(list(np.eye(size, dtype=int))))
        for i, j in np.ndindex(6, 6):
            factors = np.outer(rows[i], rows[j])
            most = np.where(factors > 0, factors * high, factors * low).sum()
            least = np.where(factors > 0, factors * low, factors * high).sum()
            assert -(2**15) <= least <= most < 2**15


@pytest.mark.parametrize(
    ("work", "fmt", "reason"),
    [
        (conv(64, 14, sh=2, sw=2), "w8a8", "3 × 3 windows, stride 1"),
        (conv(64, 14, groups=2), "w8a8", "no groups"),
        (conv(64, 14), "fp32", "multiplies 16-bit integers"),
        (conv(1842, 7), "w8a8", "exactly up to 1841 channels"),
    ],
)
def test_refusals_say_why(work: Workload, fmt: str, reason: str) -> None:
    assert winograd(work, fmt) is None
    kernel = winograd(conv(64, 14))
    assert kernel is not None
    assert reason in (kernel.nest.why_not(work, format_named(fmt), kernel.micro) or "")


def test_it_is_chosen_where_transforms_are_few() -> None:
    chosen = {
        (cin, size): (k := best(conv(cin, size), format_named("w8a8"), AVX2)) and k.nest.name
        for cin, size in ((64, 56), (512, 7), (16, 32), (3, 32), (512, 1))
    }
    assert chosen == {
        (64, 56): "winograd", (512, 7): "winograd", (16, 32): "winograd", (3, 32): "conv2d",
        (512, 1): "conv2d",
    }  # fmt: skip
