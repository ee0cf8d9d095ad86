"""Counters of energy: who is read, what is made of it; without one there is no figure."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hwmpq import targets
from hwmpq.measure import energy
from hwmpq.measure.energy import Counter, counters, energy_of


def zone(folder: Path, name: str, uj: str, label: str) -> Path:
    place = folder / name
    place.mkdir()
    for file, text in (("energy_uj", uj), ("max_energy_range_uj", "9000000"), ("name", label)):
        (place / file).write_text(text + "\n")
    return place


def test_packages_are_read_and_their_parts_are_not(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "2500000", "package-0")
    zone(tmp_path, "intel-rapl:0:0", "1", "core")
    zone(tmp_path, "intel-rapl:1", "locked", "package-1")
    [counter] = energy.rapl(tmp_path)
    assert (counter.read(), counter.wraps, counter.source) == (2.5, 9.0, "RAPL package-0")
    (package / "energy_uj").write_text("500000")
    assert counter.since(2.5) == pytest.approx(7.0)  # it began again at nine joules
    assert energy.rapl(tmp_path / "none") == []


def test_joules_of_a_run() -> None:
    spent = iter(range(0, 100, 6))
    runs: list[int] = []
    counting = [Counter(lambda: float(next(spent)), 0.0, "a"), Counter(lambda: 1.0, 0.0, "b")]
    found = energy_of(lambda: runs.append(1), counting, seconds=0.0)
    assert len(runs) == 2 and found == energy.Energy(6.0, "a + b")  # the first warms up


class Library:
    """NVML of a device that has used 7 J; missing: the function that fails."""

    def __init__(self, missing: str = ""):
        self.missing = missing

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> int:
            if name == "nvmlDeviceGetTotalEnergyConsumption":
                given[1]._obj.value = 7000  # what ctypes.byref refers to
            return int(name == self.missing)

        return call


def test_nvml_counts_for_cuda_targets_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "rapl", lambda: [])
    cpu = targets.load("x86-avx2")
    gpu = replace(cpu, tvm={"kind": "cuda"})
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    [counter] = counters(gpu)
    assert counter.read() == 7.0 and counters(cpu) == []
    for failing in ("nvmlInit_v2", "nvmlDeviceGetHandleByIndex_v2",
                    "nvmlDeviceGetTotalEnergyConsumption"):  # fmt: skip
        monkeypatch.setattr(ctypes, "CDLL", lambda name, failing=failing: Library(failing))
        assert counters(gpu) == []

    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert counters(gpu) == []
