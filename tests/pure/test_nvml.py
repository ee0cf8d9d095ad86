"""What a GPU did while it was timed, from a stand-in for NVML."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from hwmpq.measure import nvml


class Library:
    """NVML of a device whose clock falls under a power cap at the second look."""

    def __init__(self) -> None:
        self.sm_mhz, self.reasons = 1980, 0x1

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: bytes, device: Any) -> int:
        return int(bus != b"0000:01:00.0")

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:
        text.value = b"580.1"
        return 0

    def nvmlDeviceGetClockInfo(self, device: Any, which: int, found: Any) -> int:
        found._obj.value = {1: self.sm_mhz, 2: 2619}[which]
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: Any, found: Any) -> int:
        found._obj.value = self.reasons
        return 0

    def nvmlDeviceGetTemperature(self, device: Any, which: int, found: Any) -> int:
        return 3  # not supported


def test_clocks_and_what_throttled_them_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert nvml.watch("0000:02:00.0") is None
    watch = nvml.watch("0000:01:00.0")
    assert watch is not None
    watch.look()
    library.sm_mhz, library.reasons = 1410, 0x4
    watch.look()
    assert watch.told == {
        "driver": "580.1", "throttled": ["power cap"], "sm_hz": [1410e6, 1980e6],
        "memory_hz": [2619e6, 2619e6],
    }  # fmt: skip
