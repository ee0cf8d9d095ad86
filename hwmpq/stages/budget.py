"""Budgets as users write them: `2.5ms`, `800us`, `p95:2.5ms`, `0.5x`, `0.9x:w8a8`, `fastest`;
sizes `4MB`, `0.25x`; bit operations `2.5G`, `0.2x`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hwmpq.errors import InputError

_TIME = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_SIZE = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "KiB": 2**10, "MiB": 2**20}
_COUNT = {"M": 10**6, "G": 10**9, "T": 10**12}
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"


@dataclass(frozen=True)
class Latency:
    """An upper limit: seconds, or `ratio` of the uniform artifact `of`.

    statistic: 'median' or 'p95' and the like. fastest: no limit, the fastest plan is wanted.
    """

    seconds: float | None = None
    ratio: float | None = None
    of: str = "fp32"
    statistic: str = "median"
    fastest: bool = False


def parse_latency(text: str | None) -> Latency | None:
    """Raises InputError showing the allowed forms."""
    if text is None:
        return None
    if text == "fastest":
        return Latency(fastest=True)
    statistic, rest = "median", text
    if found := re.fullmatch(r"p(\d{1,2}):(.+)", text):
        statistic, rest = f"p{int(found[1])}", found[2]
    if found := re.fullmatch(rf"{_NUMBER}(ns|us|ms|s)", rest):
        seconds = float(found[1]) * _TIME[found[2]]
        if seconds > 0:
            return Latency(seconds=seconds, statistic=statistic)
    if found := re.fullmatch(rf"{_NUMBER}x(?::([\w.]+))?", rest):
        if float(found[1]) > 0:
            return Latency(ratio=float(found[1]), of=found[2] or "fp32", statistic=statistic)
    raise InputError(
        "latency budget", repr(text),
        ("2.5ms", "800us", "p95:2.5ms", "0.5x", "0.9x:w8a8", "fastest"),
    )  # fmt: skip


def parse_size(text: str | None, fp32_bytes: int) -> int | None:
    """Bytes. `0.25x` is relative to the fp32 parameters. Raises InputError."""
    if text is None:
        return None
    if (found := re.fullmatch(rf"{_NUMBER}x", text)) and float(found[1]) > 0:
        return int(float(found[1]) * fp32_bytes)
    if (found := re.fullmatch(rf"{_NUMBER}({'|'.join(_SIZE)})", text)) and float(found[1]) > 0:
        return int(float(found[1]) * _SIZE[found[2]])
    raise InputError("size budget", repr(text), ("4MB", "500kB", "0.25x"))


def parse_bops(text: str | None, fp32_bops: int) -> int | None:
    """Bit operations. `0.2x` is relative to the fp32 model. Raises InputError."""
    if text is None:
        return None
    if (found := re.fullmatch(rf"{_NUMBER}x", text)) and float(found[1]) > 0:
        return int(float(found[1]) * fp32_bops)
    if (found := re.fullmatch(rf"{_NUMBER}({'|'.join(_COUNT)})", text)) and float(found[1]) > 0:
        return int(float(found[1]) * _COUNT[found[2]])
    raise InputError("budget of bit operations", repr(text), ("2.5G", "800M", "0.2x"))


def parse_sums(
    max_size: str | None, max_bops: str | None, fp32_bytes: int = 0, fp32_bops: int = 0
) -> dict[str, float]:
    """The budgets that are sums of known cells, under their names in a Problem."""
    given = {"nbytes": parse_size(max_size, fp32_bytes), "bops": parse_bops(max_bops, fp32_bops)}
    return {name: float(limit) for name, limit in given.items() if limit is not None}
