"""The report: everything it is told is on the page, nothing that was told runs on it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hwmpq import report
from hwmpq.errors import InputError
from hwmpq.report import words

EVIL = "<script>alert('x')</script>"


@dataclass(frozen=True)
class Row:
    name: str = "layer1.conv"
    op: str = "conv2d"
    shape: str = "3x8x8 > 4, 3x3"
    format: str = "w8a8"
    kernel: str = "conv2d.avx2_madd16.s8"
    execution: str = "native"
    loss: float = 0.0125
    predicted_s: float | None = 1.5e-5
    measured_s: float | None = None
    options: dict[str, float] = field(default_factory=lambda: {"w8a8": 1.5e-5, "fp32": 4e-5})
    why_not: dict[str, str] = field(default_factory=lambda: {"w4a4": "no kernel decodes it"})


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "version": 1, "status": "met", "ambiguous": False, "model": "zoo:digits_cnn",
        "target": "x86-avx2", "device": "local", "threads": 1, "seed": 0,
        "assignment": {"layer1.conv": "w8a8"},
        "kernels": {"layer1.conv": {"kernel": "k", "execution": "native",
                                    "latency_source": "measured"}},
        "latency_s": {
            "budget": 2.1e-3, "statistic": "median", "predicted": 1.9e-3,
            "predicted_interval": [1.8e-3, 2e-3], "measured": 1.98e-3,
            "measured_interval": [1.96e-3, 2.02e-3],
        },
        "baselines": {
            "fp32": {"latency_s": 4.2e-3, "accuracy": 98.5, "nbytes": 220000,
                     "vs_torch_eager": 1.34},
            "w8a8": {"latency_s": 1.7e-3, "accuracy": 98.0, "nbytes": 56000},
        },
        "accuracy": {"metric": "top1", "float": 98.5, "simulated": 98.3, "deployed": 98.33,
                     "n": 540, "drop": 0.17, "drop_interval": [0.0, 0.4]},
        "nbytes": {"weights": 56600, "artifact": 120000, "peak_memory": 40000},
        "failures": {}, "seconds": {"trace": 1.0}, "gap": 0.0, "rounds": 1,
    }  # fmt: skip


@pytest.fixture
def frontier() -> list[dict[str, Any]]:
    return [
        {"loss": 0.2 / k, "latency_s": 1e-3 * k, "nbytes": 5e4 * k,
         "assignment": {"layer1.conv": "w8a8" if k < 3 else "fp32"}}
        for k in range(1, 6)
    ]  # fmt: skip


class Page(HTMLParser):
    """Tags and text of a page; what stands in scripts apart."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data


def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_shows_what_the_result_says(
    tmp_path: Path, result: dict[str, Any], frontier: list[dict[str, Any]]
) -> None:
    path = tmp_path / "report.html"
    report.html(result, [Row()], frontier, path)
    found = page(path)
    text = " ".join(found.text.split())
    for word in (
        "zoo:digits_cnn", "Met: 1.98 ms measured", "1.96 ms to 2.02 ms", "98.33 %", "2.12×",
        "layer1.conv", "conv2d.avx2_madd16.s8", "no kernel decodes it", "15.0 µs", "40.0 µs",
        "1.34× as fast as torch eager", "56.6 kB", "apache-tvm",
    ):  # fmt: skip
        assert word in text, word
    assert sum("Plotly.newPlot" in script for script in found.scripts) == 1
    assert not list(tmp_path.glob("*.part"))


def test_the_page_loads_nothing_from_elsewhere(
    tmp_path: Path, result: dict[str, Any], frontier: list[dict[str, Any]]
) -> None:
    path = tmp_path / "report.html"
    report.html(result, [Row()], frontier, path)
    for tag, attributes in page(path).tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert not {"src", "href", "srcset"} & set(attributes)


def test_everything_is_escaped(
    tmp_path: Path, result: dict[str, Any], frontier: list[dict[str, Any]]
) -> None:
    result |= {"model": EVIL, "device": EVIL, "failures": {EVIL: EVIL}, "data": EVIL}
    result["baselines"][EVIL] = {"latency_s": 1.0}
    rows = [
        Row(name=EVIL, op=EVIL, shape=EVIL, format=EVIL, kernel=EVIL, execution=EVIL,
            why_not={EVIL: EVIL})
    ]  # fmt: skip
    frontier[0]["assignment"] = {EVIL: EVIL}
    path = tmp_path / "report.html"
    report.html(result, rows, frontier, path)
    found = page(path)
    assert EVIL in found.text
    assert not [script for script in found.scripts if "alert('x')" in script]
    assert not [name for _, attributes in found.tags for name in attributes if "on" == name[:2]]
    report.markdown(result, rows, frontier, tmp_path / "report.md")
    assert "<script>" not in (tmp_path / "report.md").read_text()


def test_small_results_make_a_page_too(tmp_path: Path) -> None:
    for status in ("infeasible", "error", "missed", "accuracy", "slower"):
        path = tmp_path / f"{status}.html"
        report.html({"version": 1, "status": status, "model": "m"}, [], [], path)
        assert "None" not in page(path).text
        report.markdown({"version": 1, "status": status}, [], [], path.with_suffix(".md"))


def test_markdown_keeps_its_tables(
    tmp_path: Path, result: dict[str, Any], frontier: list[dict[str, Any]]
) -> None:
    report.markdown(result, [Row(name="a|b"), Row(name="c")], frontier, tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text()
    assert "a\\|b" in text
    lines = [re.sub(r"\\\|", "", line) for line in text.splitlines()]
    blocks = re.findall(r"(?:^\|.*\n)+", "\n".join(lines), re.MULTILINE)
    assert len(blocks) >= 4
    for block in blocks:
        assert len({row.count("|") for row in block.splitlines()}) == 1, block


def test_read_takes_the_rows_beside_the_result(
    tmp_path: Path, result: dict[str, Any], frontier: list[dict[str, Any]]
) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    _, rows, plans = report.read(path)
    assert [row["name"] for row in rows] == ["layer1.conv"] and plans == []
    more = {"version": 1, "rows": [{"name": "x", "format": "fp32"}], "frontier": frontier}
    (tmp_path / "rows.json").write_text(json.dumps(more))
    _, rows, plans = report.read(path)
    assert [row["name"] for row in rows] == ["x"] and len(plans) == 5
    report.html(result, rows, plans, tmp_path / "report.html")


def test_read_refuses_another_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for text in ("{", "[]", '{"version": 2, "status": "met"}'):
        path.write_text(text)
        with pytest.raises(InputError, match="result"):
            report.read(path)


def test_a_report_that_cannot_be_written(tmp_path: Path, result: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="cannot write the report"):
        report.html(result, [], [], tmp_path / "no" / "report.html")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, "Met: 1.98 ms"),
        ({"status": "missed"}, "over the budget of 2.10 ms"),
        ({"status": "missed", "ambiguous": True}, "Undecided"),
        ({"status": "infeasible"}, "no choice of formats"),
        ({"status": "accuracy"}, "Too inaccurate"),
        ({"status": "slower"}, "more than the fp32 model"),
        ({"dry_run": True}, "Planned only"),
    ],
)
def test_verdicts(result: dict[str, Any], change: dict[str, Any], sentence: str) -> None:
    assert sentence in words.verdict(result | change)
    assert "-0.17 points" in words.verdict(result | change)


def test_numbers_in_words() -> None:
    assert words.seconds(1.234e-5) == "12.3 µs"
    assert words.seconds(9.99e-4) == "0.999 ms"
    assert words.seconds(2.5) == "2.50 s"
    assert words.seconds(0) == "0 µs"
    assert words.seconds(None) == words.seconds(float("nan")) == words.NONE
    assert words.nbytes(999) == "999 B" and words.nbytes(4_200_000) == "4.20 MB"
    assert words.nbytes(123_456_789) == "123 MB"
    assert words.points(0.5) == "+0.50" and words.times(2) == "2.00×"
    assert words.interval([1e-3, None]) == words.NONE
