"""What an NVIDIA GPU is doing while it is timed: clocks, what throttles them, temperature.

Read only; no setting is changed. Source: NVML API reference, nvml.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
#: NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU.
_SM, _MEMORY, _TEMPERATURE = 1, 2, 0
#: nvmlClocksEventReason*; bit 0, idle, is no reason to doubt a time that is over.
_REASONS = {
    0x2: "clocks set by an application", 0x4: "power cap", 0x8: "hardware slowdown",
    0x10: "sync boost", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
    0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip


class Watch:
    """A device, looked at again and again. told: JSON of all looks: "driver", "sm_hz" and
    "memory_hz" as [least, most], "throttled": reasons, "temperature_c": the highest."""

    def __init__(self, library: Any, device: ctypes.c_void_p):
        self._library, self._device = library, device
        version = ctypes.create_string_buffer(80)
        library.nvmlSystemGetDriverVersion(version, len(version))
        self.told: dict[str, Any] = {"driver": version.value.decode(), "throttled": []}

    def look(self) -> None:
        """Add the state of this moment."""
        for name, which in (("sm_hz", _SM), ("memory_hz", _MEMORY)):
            megahertz = self._number("nvmlDeviceGetClockInfo", ctypes.c_uint(), which)
            if megahertz:
                low, high = self.told.get(name, (megahertz * 1e6, megahertz * 1e6))
                self.told[name] = [min(low, megahertz * 1e6), max(high, megahertz * 1e6)]
        found = self._number("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong())
        reasons = {text for bit, text in _REASONS.items() if found & bit}
        self.told["throttled"] = sorted(reasons.union(self.told["throttled"]))
        degrees = self._number("nvmlDeviceGetTemperature", ctypes.c_uint(), _TEMPERATURE)
        if degrees:
            self.told["temperature_c"] = max(degrees, self.told.get("temperature_c", 0))

    def joules(self) -> float:
        """Energy that the device has counted so far; 0 where it counts none."""
        return self._number("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong()) / 1e3

    def _number(self, function: str, found: Any, *which: int) -> int:
        """0 where the device does not tell."""
        ask: Callable[..., int] = getattr(self._library, function)
        return 0 if ask(self._device, *which, ctypes.byref(found)) else int(found.value)


def watch(bus: str = "") -> Watch | None:
    """Of the device at a place on the PCI bus, '' = the first; None without NVML or the device."""
    library, device = _nvml(), ctypes.c_void_p()
    if library is None:
        return None
    if bus:
        failed = library.nvmlDeviceGetHandleByPciBusId_v2(bus.encode(), ctypes.byref(device))
    else:
        failed = library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
    return None if failed else Watch(library, device)


def _nvml() -> Any:
    """NVML, made ready once more; None where it is not."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library
