"""Budgets as users write them."""

from __future__ import annotations

import pytest

from hwmpq.errors import InputError
from hwmpq.stages.budget import Latency, parse_bops, parse_latency, parse_size, parse_sums


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("2.5ms", Latency(seconds=2.5e-3)),
        ("800us", Latency(seconds=800e-6)),
        ("1s", Latency(seconds=1.0)),
        ("30ns", Latency(seconds=30e-9)),
        (".5ms", Latency(seconds=0.5e-3)),
        ("p95:2.5ms", Latency(seconds=2.5e-3, statistic="p95")),
        ("p5:1s", Latency(seconds=1.0, statistic="p5")),
        ("0.5x", Latency(ratio=0.5)),
        ("2x", Latency(ratio=2.0)),
        ("0.9x:w8a8", Latency(ratio=0.9, of="w8a8")),
        ("p90:0.9x:bf16", Latency(ratio=0.9, of="bf16", statistic="p90")),
        ("fastest", Latency(fastest=True)),
    ],
)
def test_latency(text: str | None, expected: Latency | None) -> None:
    found = parse_latency(text)
    if found is None or expected is None:
        assert found is expected
        return
    assert (found.of, found.statistic, found.fastest) == (
        expected.of,
        expected.statistic,
        expected.fastest,
    )
    assert found.seconds == pytest.approx(expected.seconds)
    assert found.ratio == pytest.approx(expected.ratio)


BAD_LATENCIES = [
    "", "5", "ms", "-1ms", "0ms", "0x", "1e-3s", "2.5 ms", "2,5ms", "nanms", "infs", "1min", "x",
    "0.5x:", "p95", "p100:1ms", "p95:fastest", "Fastest", "0.5X", "1ms\n",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_LATENCIES)
def test_bad_latency_shows_the_forms(text: str) -> None:
    with pytest.raises(InputError, match=r"latency budget: got .*2\.5ms.*0\.5x.*fastest") as caught:
        parse_latency(text)
    assert caught.value.exit_code == 2
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None), ("4MB", 4_000_000), ("500kB", 500_000), ("500KB", 500_000),
        ("1MiB", 1 << 20), ("2KiB", 2048), ("100B", 100), ("0.5MB", 500_000), ("0.25x", 1000),
    ],
)  # fmt: skip
def test_size(text: str | None, expected: int | None) -> None:
    assert parse_size(text, 4000) == expected


@pytest.mark.parametrize(
    "text", ["", "4", "4mb", "-4MB", "0MB", "0x", "4 MB", "4GBB", "1e6B", "0.25x:w8a8", "nanMB"]
)
def test_bad_size_shows_the_forms(text: str) -> None:
    with pytest.raises(InputError, match=r"size budget: got .*4MB.*0\.25x") as caught:
        parse_size(text, 4000)
    assert caught.value.exit_code == 2


def test_bit_operations() -> None:
    texts = (None, "2.5G", "800M", "1T", "0.25x")
    assert [parse_bops(t, 4000) for t in texts] == [None, 2_500_000_000, 800_000_000, 10**12, 1000]
    for text in ("", "4", "2.5g", "0G", "-1G", "0x", "4GB"):
        with pytest.raises(InputError, match=r"budget of bit operations: got .*2\.5G.*0\.2x"):
            parse_bops(text, 4000)
    assert parse_sums("1kB", "0.5x", 0, 64) == {"nbytes": 1000.0, "bops": 32.0}
    assert parse_sums(None, None) == {}
