"""store compare: what is claimed of two sides, how often it is wrong, and its exit code."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hwmpq.cli
from hwmpq.errors import InputError
from hwmpq.measure.ratio import ratio_interval
from hwmpq.measure.store import Row, Store
from hwmpq.measure.versus import Comparison, chosen, compare_sides
from hwmpq.types import Measurement, Workload


def samples(rng: np.random.Generator, scale: float = 1.0, count: int = 25) -> tuple[float, ...]:
    """Timings as machines give them: a floor, a long tail, some far outliers."""
    tail = rng.lognormal(-4.0, 0.7, count) + (rng.random(count) < 0.05) * 2.0
    return tuple(1e-5 * scale * (1 + tail))


def row(n: int, seconds: tuple[float, ...], kernel: str = "k", **facts: Any) -> Row:
    work = Workload.make("linear", m=1, k=8, n=n)
    error = "" if seconds else "crashed: SIGSEGV"
    name = f"{n}{kernel}{sorted(facts.items())}"
    found = Measurement(name, work, "w8a8", kernel, 1, seconds, error)
    return Row(found, **{"target": "t", "fingerprint": "f", **facts})


def verdicts(found: Comparison) -> list[str]:
    return [pair.word for pair in found.pairs]


def test_the_interval_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    runs, factor = 2000, 1.25
    for confidence in (0.9, 0.95):
        inside = 0
        for _ in range(runs):
            a, b = samples(rng, count=9), samples(rng, factor, count=8)
            _, interval = ratio_interval(a, b, confidence)
            assert interval is not None
            inside += interval[0] <= factor <= interval[1]
        # exact, so a little above; three standard errors of the count below
        assert inside / runs > confidence - 3 * (confidence * (1 - confidence) / runs) ** 0.5
        assert inside / runs < confidence + 0.03


@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 5), (4, 4)])
def test_the_interval_is_exact(m: int, n: int) -> None:
    """All orders of m and n samples from one distribution are equally likely."""
    for confidence in (0.0, 0.3, 0.5, 0.8, 0.9, 0.95):
        outside, total = 0, 0
        for places in itertools.combinations(range(m + n), m):
            # so far apart that each ratio tells the order alone
            a = [100.0**p for p in places]
            b = [100.0**p for p in range(m + n) if p not in places]
            _, interval = ratio_interval(a, b, confidence)
            total += 1
            outside += interval is not None and not interval[0] <= 1 <= interval[1]
        assert outside / total <= 1 - confidence + 1e-12


def test_ratio() -> None:
    ratio, interval = ratio_interval([1.0, 1.0], [2.0, 2.0])
    assert (ratio, interval) == (2.0, None)  # two samples tell nothing at 95 %
    ratio, interval = ratio_interval([1.0] * 9, [2.0] * 9)
    assert (ratio, interval) == (2.0, (2.0, 2.0))
    for bad in ([], [0.0], [-1.0]):
        with pytest.raises(ValueError, match="positive"):
            ratio_interval([1.0], bad)


def test_verdicts() -> None:
    rng = np.random.default_rng(1)
    scales = {1: 1.0, 2: 1.3, 3: 0.7, 4: 1.03}
    a = [row(n, samples(rng)) for n in scales]
    b = [row(n, samples(rng, scale)) for n, scale in scales.items()]
    found = compare_sides(a, b)
    assert verdicts(found) == ["SAME", "SLOWER", "FASTER", "AMBIGUOUS"] and found.regressed
    slower = found.pairs[1]
    assert slower.ratio == pytest.approx(1.3, rel=0.02) and slower.interval is not None
    assert 1.25 < slower.interval[0] < slower.ratio < slower.interval[1] < 1.35
    assert not compare_sides(a[2:], b[2:]).regressed
    few = compare_sides([row(1, (1e-5,) * 3)], [row(1, (9e-5,) * 3)])
    assert verdicts(few) == ["AMBIGUOUS"] and few.pairs[0].interval is None


def test_many_equal_cells_raise_no_alarm() -> None:
    """The intervals of all cells hold together: at most one comparison in twenty errs."""
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(40):
        a, b = ([row(n, samples(rng, count=9)) for n in range(1, 41)] for _ in "ab")
        alarms += any(word in ("SLOWER", "FASTER") for word in verdicts(compare_sides(a, b, 0.0)))
    assert alarms <= 5


def test_failures() -> None:
    good = (1e-5,) * 9
    a = [row(1, good), row(2, ()), row(3, ()), row(4, good)]
    b = [row(1, ()), row(2, good), row(3, ()), row(5, good)]
    found = compare_sides(a, b)
    assert verdicts(found) == ["BROKEN", "MENDED"] and found.regressed
    assert (found.only_a, found.only_b) == (1, 1)
    with pytest.raises(InputError, match="none in both"):
        compare_sides(a[3:], b)


def test_what_is_paired() -> None:
    quick, slow = (1e-5,) * 9, (3e-5,) * 9
    # a kernel that both sides have is compared with itself
    both = compare_sides([row(1, quick), row(1, slow, "l")], [row(1, slow), row(1, slow, "l")])
    assert [(p.kernels, p.word) for p in both.pairs] == [
        (("k", "k"), "SLOWER"), (("l", "l"), "SAME"),
    ]  # fmt: skip
    # boards have kernels of their own: the fastest that works
    b = [row(1, quick, "m", fingerprint="g"), row(1, (), "n", fingerprint="g")]
    (pair,) = compare_sides([row(1, slow), row(1, quick, "l")], b).pairs
    assert (pair.kernels, pair.word) == (("l", "m"), "SAME")
    with pytest.raises(InputError, match=r"machines of side B: got g, h"):
        compare_sides([row(1, slow)], [*b, row(1, slow, fingerprint="h")])
    # the newest row of a kernel counts
    again = [row(1, slow, created=1.0), row(1, quick, created=2.0)]
    assert verdicts(compare_sides([row(1, quick)], again)) == ["SAME"]


def test_filters() -> None:
    rows = [row(1, (1e-5,), toolchain={"codegen": "7"}), row(2, (1e-5,), "l", origin="board")]
    assert chosen(rows, {"codegen": "7"}) == rows[:1]
    assert chosen(rows, {"kernel": "l", "origin": "board"}) == rows[1:]
    assert chosen(rows, {"format": "w4a8"}) == [] and chosen(rows, {}) == rows
    with pytest.raises(InputError, match="codegen"):
        chosen(rows, {"colour": "red"})


@pytest.fixture
def sides(tmp_path: Path) -> Callable[[float], tuple[Path, Path]]:
    """Two stores; the second is slower by the factor, by a new code generator."""

    def make(factor: float) -> tuple[Path, Path]:
        rng = np.random.default_rng(3)
        places = tmp_path / "a.sqlite", tmp_path / "b.sqlite"
        for place, scale, codegen in zip(places, (1.0, factor), "78", strict=True):
            with Store.open(place) as store:
                for n in (1, 2):
                    m = replace(row(n, samples(rng, scale)).measurement, key=f"{n}{codegen}")
                    store.put(m, "t", "f", {"codegen": codegen})
        return places

    return make


def test_command(
    sides: Callable[[float], tuple[Path, Path]], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(*line: object) -> tuple[int, str]:
        capfd.readouterr()
        code = hwmpq.cli.main(["store", "compare", *map(str, line)])
        return code, capfd.readouterr().out

    a, b = sides(1.5)
    code, out = run(a, b, "--json")
    told = json.loads(out)
    assert (code, told["status"], told["counts"]) == (6, "slower", {"SLOWER": 2})
    assert told["cells"][0]["ratio"] == pytest.approx(1.5, rel=0.02)
    assert told["formats"]["w8a8"] == {"cells": 2, "ratio": pytest.approx(1.5, rel=0.02)}
    assert run(b, a, "--json")[0] == 0
    code, out = run(a, b)
    assert code == 6 and "SLOWER" in out and "2 SLOWER" in out
    assert run(a, b, "--tolerance", 60)[0] == 0
    with Store.open(a) as both, Store.open(b) as other:
        both.merge(other)
    assert run("codegen=7", "codegen=8", "--store", a)[0] == 6
    for kind in ("html", "md", "json"):
        sides = (f"{a}#codegen=7", f"{b}#codegen=8,format=w8a8")
        assert run(*sides, "--out", tmp_path / f"beside.{kind}")[0] == 6
    page = (tmp_path / "beside.html").read_text()
    assert "codegen=7 beside codegen=8,format=w8a8" in page and "2 slower" in page
    assert json.loads((tmp_path / "beside.json").read_text())["b"] == "codegen=8,format=w8a8"
    assert run(f"{a}#codegen=7", "codegen=7", "--store", a)[0] == 0
    for line in (
        (a, tmp_path / "none.sqlite"),
        (a, f"{b}#codegen"),
        (a, f"{b}#colour=red"),
        (a, f"{b}#codegen=9"),
        (a, b, "--tolerance", -1),
    ):
        code, out = run(*line, "--json")
        assert (code, json.loads(out)["status"]) == (2, "error")
