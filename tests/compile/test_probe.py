"""`target probe --out`: a file that describes this machine, and is a target."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

import hwmpq.cli
from hwmpq import targets
from hwmpq.formats import Format
from hwmpq.kernels.micro import Micro
from hwmpq.measure.peaks import Level
from hwmpq.side_jobs import probe
from hwmpq.toml_text import dumps


def test_toml_is_read_back() -> None:
    table = {
        "text": 'a "b" \\ c\nd', "list": [1, 2.5, "x"], "yes": True, "tiny": 1e-9, "none": {},
        "table": {"u8.s8": 1, "in": {"deep er": float("inf")}},
    }  # fmt: skip
    assert tomllib.loads(dumps(table)) == table


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is measured; what takes long is not."""

    def peak(micro: Micro, fmt: Format, target: targets.Target) -> float:
        return 4e9 * micro.lanes

    monkeypatch.setattr(probe, "peak_macs_per_s", peak)
    monkeypatch.setattr(probe, "read_bandwidths", lambda target: (Level("L1", 1024, 2e11),))


def test_a_probed_file_is_a_target(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    assert hwmpq.cli.main(["target", "probe", "--out", str(file), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    monkeypatch.setenv("HWMPQ_TARGET_PATH", str(tmp_path))
    target = targets.load("mine")
    assert told["measured"]["clock_hz"] == target.measured.clock_hz
    assert 0.4e9 < target.measured.clock_hz < 8e9
    assert target.measured.bandwidth == {"L1": 2e11}
    assert target.features == targets.host_features()
    assert not targets.satisfied_by_host(target)
    widest = max(m.lanes for m in probe.micros() if m.requires <= target.features)
    assert target.peaks["fp32.fp32"] <= round(4e9 * widest / target.measured.clock_hz, 1)
    assert {"fp32.fp32", "u8.s8"} <= set(target.peaks)
    assert "target probe" in target.sources["peaks"]
    assert 0 < target.caches.l1d <= target.caches.l2
    for command, words in (
        (["--out", str(file)], "a new NAME.toml"),
        (["x86-avx2", "--out", str(tmp_path / "b.toml")], "leave NAME out"),
    ):
        assert hwmpq.cli.main(["target", "probe", *command]) == 2
        assert words in capfd.readouterr().err


def test_what_was_measured_needs_its_source(tmp_path: Path) -> None:
    base = (targets.data_folder("targets") / "x86-avx2.toml").read_text()
    more = "[measured]\nclock_hz = 3e9\nbandwidth = {L1 = 2e11}\n\n[sources]"
    (tmp_path / "a.toml").write_text(base.replace("[sources]", more))
    with pytest.raises(targets.InputError, match=r"sources in target file .*measured"):
        targets.read(tmp_path / "a.toml")


def test_shared_caches_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index: Any = tmp_path / "index3"
    index.mkdir()
    (index / "level").write_text("3\n")
    (index / "shared_cpu_list").write_text("0-3,8,10-11\n")
    monkeypatch.setattr(probe, "_SHARED", tmp_path)
    found = probe._caches({"L1": 32, "L2": 512, "L3": 7000})
    assert found == {"l1d": 32, "l2": 512, "l3": 1000}
    with pytest.raises(targets.InputError, match="caches of this machine"):
        probe._caches({"L1": 32})
