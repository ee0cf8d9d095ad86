"""The report: everything it is told is on the page, nothing that was told runs on it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser, browser

from hwmpq import report
from hwmpq.cli import options
from hwmpq.errors import InputError
from hwmpq.pipeline import Options
from hwmpq.report import Content, account, learning, words
from hwmpq.report.view import command
from hwmpq.stages.result import changed

EVIL = "<script>alert('x')</script>"


def row(**changed: Any) -> dict[str, Any]:
    return {
        "name": "layer1.conv", "op": "conv2d", "shape": "3x8x8 > 4, 3x3", "format": "w8a8",
        "kernel": "conv2d.avx2_madd16.s8", "execution": "native", "loss": 0.0125,
        "predicted_s": 1.5e-5, "measured_s": 1.4e-5, "options": {"w8a8": 1.5e-5, "fp32": 4e-5},
        "why_not": {"w4a4": "no kernel decodes it"}, **changed,
    }  # fmt: skip


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
        "options": {"data": "digits", "latency": "2.1ms", "pins": ["fc=fp32"], "store": "/mine"},
        "environment": {
            "quality": {"noisy": True, "environment": {"virtual": False, "kernel": "Linux 6"}},
            "fingerprint": "x86_64-2c-1f0c", "versions": {"apache-tvm": "0.27"},
            "machine": {"model": "A CPU", "cores": 2, "caches": {"L1": 32768}},
            "date": "2026-11-21 12:00",
        },
    }  # fmt: skip


@pytest.fixture
def frontier() -> list[dict[str, Any]]:
    return [
        {"loss": 0.2 / k, "latency_s": 1e-3 * k, "nbytes": 5e4 * k,
         "assignment": {"layer1.conv": "w8a8" if k < 3 else "fp32"}}
        for k in range(1, 6)
    ]  # fmt: skip


@pytest.fixture
def content(result: dict[str, Any], frontier: list[dict[str, Any]]) -> Content:
    times = {"predicted_s": 1.5e-5, "measured_s": 1.4e-5}
    steps = [
        {"name": "layer1.conv", "kind": "layer", "op": "conv2d", "format": "w8a8", **times},
        {"name": "input", "kind": "encode", "op": "encode", "format": "u8", **times},
        {"name": "crown.mean", "kind": "glue", "op": "mean", "format": "fp32", **times},
    ]
    evidence = {
        "steps": steps,
        "artifacts": [{"name": "fp32", "predicted_s": 4e-3, "measured_s": 4.2e-3, "fitted": True,
                       "loss": 0.0, "nbytes": 2e5}],
        "cells": [{"op": "conv2d", "format": "w8a8", "predicted_s": 2e-5, "measured_s": 1e-5}],
        "policy": {"rows": ["layer1.conv"], "options": [["w8a8", "fp32"]], "steps": [0, 9],
                   "probabilities": [[[0.5, 0.5]], [[0.75, 0.25]]]},
        "scalars": [{"step": 0, "entropy": 0.7}, {"step": 9, "entropy": 0.5}],
    }  # fmt: skip
    return Content(result, [row()], frontier, evidence)


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


def test_the_page_shows_what_the_result_says(tmp_path: Path, content: Content) -> None:
    path = tmp_path / "report.html"
    report.write(content, path)
    text = " ".join(page(path).text.split())
    for word in (
        "zoo:digits_cnn", "Met: 1.98 ms measured", "1.96 ms to 2.02 ms", "98.33 %", "2.12×",
        "layer1.conv", "conv2d.avx2_madd16.s8", "no kernel decodes it", "15.0 µs", "40.0 µs",
        "1.34× as fast as torch eager", "56.6 kB", "apache-tvm 0.27", "A CPU", "14.0 µs",
        "re-encoding between formats", "outside of kernels 1.94 ms", "w8a8 75 %",
        "by estimate, not tuned", "too few quiet epochs",
        "hwmpq quantize zoo:digits_cnn --data digits --latency 2.1ms",
    ):  # fmt: skip
        assert word in text, word
    assert text.index("Met:") < text.index("Budget and measurement")
    assert path.stat().st_size < 200_000
    assert not list(tmp_path.glob("*.part"))


def test_the_page_loads_nothing_from_elsewhere(tmp_path: Path, content: Content) -> None:
    path = tmp_path / "report.html"
    report.write(content, path)
    for tag, attributes in page(path).tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert not {"src", "href", "srcset"} & set(attributes)


def test_everything_is_escaped(tmp_path: Path, content: Content) -> None:
    result, frontier = dict(content.result), list(content.frontier)
    result |= {"model": EVIL, "device": EVIL, "failures": {EVIL: EVIL}, "data": EVIL}
    result["baselines"][EVIL] = {"latency_s": 1.0, "accuracy": 1.0}
    words_of = dict.fromkeys(("name", "op", "shape", "format", "kernel", "execution"), EVIL)
    steps = [{**step, "name": EVIL, "op": EVIL} for step in content.evidence["steps"]]
    policy = content.evidence["policy"] | {"rows": [EVIL], "options": [[EVIL, "fp32"]]}
    evidence = {**content.evidence, "steps": steps, "policy": policy}
    frontier[0]["assignment"] = {EVIL: EVIL}
    evil = Content(
        result, [row(**words_of, why_not={EVIL: EVIL})], frontier, evidence,
        [{"name": EVIL, "description": EVIL, "latency_s": {"median": 1.0, "interval": None}}],
    )  # fmt: skip
    path = tmp_path / "report.html"
    report.write(evil, path)
    found = page(path)
    assert EVIL in found.text
    assert not [script for script in found.scripts if EVIL in script]
    assert not [name for _, attributes in found.tags for name in attributes if "on" == name[:2]]
    report.write(evil, tmp_path / "report.md")
    lines = (tmp_path / "report.md").read_text().splitlines()
    code = "    "  # is shown as it is
    assert not [line for line in lines if "<script>" in line and not line.startswith(code)]


def test_small_results_make_a_page_too(tmp_path: Path) -> None:
    for status in ("infeasible", "error", "missed", "accuracy", "slower"):
        path = tmp_path / f"{status}.html"
        for kind in report.KINDS:
            report.write(Content({"version": 1, "status": status}), path.with_suffix(f".{kind}"))
        assert "None" not in page(path).text


def test_calls_may_take_longer_than_the_run(tmp_path: Path, content: Content) -> None:
    """Disturbed while they were timed one by one: no bar leaves the page, and it is said."""
    steps = [{**step, "measured_s": 1e-3} for step in content.evidence["steps"]]
    report.write(
        replace(content, evidence={**content.evidence, "steps": steps}), tmp_path / "r.html"
    )
    found = page(tmp_path / "r.html")
    styles = [attributes.get("style") or "" for _, attributes in found.tags]
    places = [re.fullmatch(r"left:([\d.]+)%;width:([\d.]+)%", style) for style in styles]
    bars = [(float(place[1]), float(place[2])) for place in places if place]
    assert len(bars) >= 4 and all(left + width < 100.1 for left, width in bars)
    text = " ".join(found.text.split())
    assert "outside of kernels -1.02 ms" in text and "It is below zero here" in text


def test_markdown_keeps_its_tables(tmp_path: Path, content: Content) -> None:
    report.write(replace(content, rows=[row(name="a|b"), row(name="c")]), tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text()
    assert "a\\|b" in text
    lines = [re.sub(r"\\\|", "", line) for line in text.splitlines()]
    blocks = re.findall(r"(?:^\|.*\n)+", "\n".join(lines), re.MULTILINE)
    assert len(blocks) >= 7
    for block in blocks:
        assert len({row.count("|") for row in block.splitlines()}) == 1, block


def test_json_says_it_in_numbers(tmp_path: Path, content: Content) -> None:
    report.write(content, tmp_path / "r.json")
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["verdict"].startswith("Met: 1.98 ms") and told["result"] == content.result
    assert [group["name"] for group in told["waterfall"]] == [
        "conv2d layers", account.ENCODE, "mean", account.OUTSIDE,
    ]  # fmt: skip
    assert sum(group["measured_s"] for group in told["waterfall"]) == pytest.approx(1.98e-3)
    assert told["waterfall"][2]["start_s"] == pytest.approx(2.8e-5)
    assert told["parity"]["cells"] == {"n": 1, "median": 1.0, "worst": 1.0, "within": 0.0}
    assert told["parity"]["artifacts"]["within"] == 1.0


def test_an_anonymous_report_names_nobody(tmp_path: Path, content: Content) -> None:
    result = dict(content.result)
    result |= {
        "model": "secret.models:net", "device": "lab-7", "data": "npz:/home/zelda/faces.npz [9]",
        "failures": {"conv2d w4a4 k": "died in /home/zelda/build/x.so at layer1.conv"},
        "artifact": "/home/zelda/out/artifact",
        "assignment": {"layer1.conv": "w8a8", "conv2d": "fp32"},
    }  # fmt: skip
    result["options"] |= {"pins": ["layer1.*=w8a8"], "data": "npz:/home/zelda/faces.npz"}
    reason = "pinned by 'layer1.*=w8a8'"
    rows = [row(why_not={"w4a4": reason}), row(name="conv2d")]
    hidden = report.anonymized(replace(content, result=result, rows=rows))
    for kind in report.KINDS:
        report.write(hidden, tmp_path / f"r.{kind}")
        text = (tmp_path / f"r.{kind}").read_text()
        for word in ("layer1", "zelda", "secret", "lab-7", "faces", "A CPU", "1f0c", "12:00",
                     "Linux 6", "crown"):  # fmt: skip
            assert word not in text, (kind, word)
        assert "1.98 ms" in text or kind == "json"
    assert hidden.result["assignment"] == {"layer 1": "w8a8", "layer 2": "fp32"}
    assert [item["op"] for item in hidden.rows] == ["conv2d", "conv2d"]
    assert hidden.frontier[0]["assignment"] == {"layer 1": "w8a8"}


def test_the_command_asks_for_the_same_options() -> None:
    asked = Options(
        "zoo:digits_cnn", input_shape=(1, 1, 16, 16), calib_data="digits#train", latency="p95:2ms",
        max_drop=0.5, formats=("fp32", "w8a8"), pins=("fc=fp32|bf16", "conv*=w8a8"), ties=("c*",),
        ptq=(), max_time=90.0, allow_estimates=True, train=("steps=3", "decide=block"),
    )  # fmt: skip
    line = command({"model": asked.model, "options": changed(asked)})
    flags = {kind.__metadata__[0].default: name for name, (kind, _) in options.TABLE.items()}
    program, verb, model, *rest = shlex.split(line)
    given: dict[str, Any] = {"model": model}
    while rest:
        name = flags[rest.pop(0)]
        value = True if name == "allow_estimates" else rest.pop(0)
        if name in ("pins", "ties"):
            value = [*given.get(name, []), value]
        given[name] = float(value) if name == "max_drop" else value
    assert (program, verb) == ("hwmpq", "quantize") and options.options(**given) == asked
    assert command({"model": "Net", "options": {"latency": "2ms"}}) == ""


def test_read_takes_what_lies_beside_the_result(tmp_path: Path, content: Content) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(content.result))
    bare = report.read(path)
    assert [item["name"] for item in bare.rows] == ["layer1.conv"] and not bare.frontier
    more = {"version": 1, "rows": [{"name": "x", "format": "fp32"}], "frontier": content.frontier,
            "evidence": content.evidence}  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(more))
    found = report.read(path)
    assert [item["name"] for item in found.rows] == ["x"] and len(found.frontier) == 5
    assert found.evidence == content.evidence
    (tmp_path / "bench.json").write_text(
        '{"against": {"name": "onnxruntime", "accuracy": {"top1": 71.25}, "latency_s": '
        '{"median": 0.003, "interval": [0.0029, 0.0031]}}}'
    )
    with_peer = report.with_peers(found, [tmp_path / "bench.json"])
    report.write(with_peer, tmp_path / "report.html")
    text = " ".join(page(tmp_path / "report.html").text.split())
    assert "onnxruntime, float 3.00 ms · 71.25 %" in text
    with pytest.raises(InputError, match="tells of no other runtime"):
        report.with_peers(found, [path])


def test_a_policy_is_thinned_out(tmp_path: Path) -> None:
    shots = 100
    policy = {"rows": ["a"], "options": [["w8a8", "fp32"]], "steps": list(range(shots)),
              "probabilities": [[[i / shots, 1 - i / shots]] for i in range(shots)]}  # fmt: skip
    (tmp_path / "p.json").write_text(json.dumps(policy))
    lines = ["step,entropy", *(f"{i},{i % 2}" for i in range(1000))]
    (tmp_path / "s.csv").write_text("\n".join(lines))
    found = learning.recorded(tmp_path / "p.json", tmp_path / "s.csv")
    steps = found["policy"]["steps"]
    assert len(steps) == 48 and (steps[0], steps[-1]) == (0, shots - 1)
    assert len(found["scalars"]) == 200
    assert found["scalars"][0] == {"step": 2.0, "entropy": 0.4}
    strips = learning.strips(found["policy"])
    assert strips and strips["rows"][0]["last"] == "w8a8 99 %"
    assert strips["rows"][0]["cells"][0]["tone"] == strips["legend"]["fp32"]


def test_read_refuses_another_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for text in ("{", "[]", '{"version": 2, "status": "met"}'):
        path.write_text(text)
        with pytest.raises(InputError, match="result"):
            report.read(path)


def test_a_report_that_cannot_be_written(tmp_path: Path, content: Content) -> None:
    with pytest.raises(InputError, match="cannot write the report"):
        report.write(content, tmp_path / "no" / "report.html")
    with pytest.raises(InputError, match=r"report file: got .*NAME\.md"):
        report.write(content, tmp_path / "report.pdf")


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
    assert (
        words.points(0.5) == "+0.50" and words.points(-0.0) == "+0.00" and words.times(2) == "2.00×"
    )
    assert words.interval([1e-3, None]) == words.NONE


def test_in_a_browser(tmp_path: Path, content: Content) -> None:
    names = [EVIL, *(f"layer{i}.conv" for i in range(30))]
    rows = [row(name=name, measured_s=1e-5 * (i + 1)) for i, name in enumerate(names)]
    path = tmp_path / "report.html"
    report.write(replace(content, rows=rows), path)
    with browser(tmp_path / "profile") as seen:
        for width, mobile in ((390, True), (1280, False)):
            seen.open(path, width, mobile=mobile)
            wide, charts = seen.run(
                "[document.documentElement.scrollWidth, document.querySelectorAll('figure').length]"
            )
            assert wide <= width  # what is wider scrolls in a frame of its own
            assert charts == seen.run("document.querySelectorAll('figure svg[role=img]').length")
            assert charts >= 8
        hover_and_zoom(seen)
        assert {*seen.loads} == {path.as_uri()} and seen.problems == []


def hover_and_zoom(seen: Browser) -> None:
    """On the layers' times, whose bars get wider."""
    chart = "document.getElementById('layer-times')"
    seen.run(f"{chart}.scrollIntoView({{block: 'center'}})")
    seen.frames()

    def bar(number: int) -> dict[str, float]:
        found: dict[str, float] = seen.run(
            f"[...{chart}.querySelectorAll('.frame g.tone > path')].map(p => p."
            f"getBoundingClientRect().toJSON())[{number}]"
        )
        return found

    box = bar(30)
    seen.mouse("mouseMoved", box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    told = f"{chart}.querySelector('.tip').innerText"
    assert "layer29.conv" in seen.run(told) and "0.310 ms" in seen.run(told)
    seen.mouse("mouseMoved", 5, 5)
    assert seen.run(f"{chart}.querySelector('.tip').hidden")
    begin, end = bar(10), bar(20)
    seen.mouse("mousePressed", begin["x"], end["y"], "left")
    seen.mouse("mouseMoved", end["x"], end["y"] + 40, "left")
    seen.mouse("mouseReleased", end["x"], end["y"] + 40, "left")
    seen.frames()
    assert bar(15)["width"] > 2 * box["width"]
    seen.run(f"{chart}.querySelectorAll('.zoom button')[2].click()")
    assert bar(15)["width"] == pytest.approx(box["width"], rel=0.01)
