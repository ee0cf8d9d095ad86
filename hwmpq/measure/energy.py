"""Energy of runs, where the machine counts it: RAPL of x86 packages, NVML of NVIDIA devices.

A counter tells of everything on its package, idle power included. Sources: Linux
Documentation/power/powercap/powercap.rst; NVML API reference, nvmlDeviceGetTotalEnergyConsumption.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hwmpq.measure.nvml import watch
from hwmpq.targets import Target

_POWERCAP = Path("/sys/class/powercap")
#: Counters step about once a millisecond: a second makes that a thousandth.
_SECONDS = 1.0


@dataclass(frozen=True)
class Energy:
    """Joules of one run, idle power included, and what counted them."""

    joules: float
    source: str


@dataclass(frozen=True)
class Counter:
    """read: joules so far; wraps: how many until it begins again, 0 where it never does."""

    read: Callable[[], float]
    wraps: float
    source: str

    def since(self, before: float) -> float:
        spent = self.read() - before
        return spent + self.wraps if spent < 0 else spent


def counters(target: Target) -> list[Counter]:
    """What counts the energy of the target's programs on this machine; [] where nothing does."""
    return nvml() if target.gpu else rapl()


def energy_of(
    run: Callable[[], object], counting: Sequence[Counter], seconds: float = _SECONDS
) -> Energy:
    """Joules of one call, the mean over so many seconds of calls."""
    run()
    before, began, count = [counter.read() for counter in counting], time.perf_counter(), 0
    while not count or time.perf_counter() - began < seconds:
        run()
        count += 1
    spent = sum(c.since(b) for c, b in zip(counting, before, strict=True))
    return Energy(spent / count, " + ".join(counter.source for counter in counting))


def rapl(folder: Path = _POWERCAP) -> list[Counter]:
    """The packages whose counters this user may read."""
    return list(_packages(folder))


def _packages(folder: Path) -> Iterator[Counter]:
    for zone in sorted(folder.glob("intel-rapl:*")):
        if zone.name.count(":") > 1:  # a part of a package, counted with it
            continue
        with contextlib.suppress(OSError, ValueError):  # not for this user
            file = zone / "energy_uj"
            wraps = float((zone / "max_energy_range_uj").read_text())
            _joules(file)
            name = f"RAPL {(zone / 'name').read_text().strip()}"
            yield Counter(partial(_joules, file), wraps / 1e6, name)


def _joules(file: Path) -> float:
    return float(file.read_text()) / 1e6


def nvml() -> list[Counter]:
    """The first NVIDIA device, if it counts."""
    device = watch()
    if device is None or not device.joules():
        return []
    return [Counter(device.joules, 0.0, "NVML device 0")]
