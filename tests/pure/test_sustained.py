"""A load by minutes, on a clock of its own, and sensors of a made-up system."""

from __future__ import annotations

from pathlib import Path

import pytest

from hwmpq.measure import CellTiming, Protocol, sustained


def test_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def measure(protocol: Protocol) -> CellTiming:
        nonlocal now
        now += protocol.rounds * protocol.epoch_s
        return CellTiming("artifact", samples_s=(now,), rejected_s=(-now,))

    monkeypatch.setattr(sustained.time, "monotonic", lambda: now)
    parts = list(sustained.sustained(measure, 150.0, 1, 0))
    assert [part.begin_s for part in parts] == [0.0, 50.0, 100.0]
    assert all(len(part.samples_s) == 2 * 10 for part in parts)  # also what a gate refused
    assert len(list(sustained.sustained(measure, 3.0, 1, 0))) == 2


def test_the_warmest_sensor_of_a_processor(tmp_path: Path) -> None:
    assert sustained.temperature_c(tmp_path) is None
    sensors = {
        "thermal/thermal_zone0": {"type": "x86_pkg_temp", "temp": "61500"},
        "thermal/thermal_zone1": {"type": "acpitz", "temp": "90000"},
        "hwmon/hwmon2": {"name": "k10temp", "temp1_input": "58000", "temp2_input": "63250"},
        "hwmon/hwmon3": {"name": "coretemp", "temp1_input": "asleep"},
    }
    for folder, files in sensors.items():
        (tmp_path / folder).mkdir(parents=True)
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text + "\n")
    assert sustained.temperature_c(tmp_path) == 63.25
