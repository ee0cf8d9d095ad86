"""An artifact under load for minutes: does the machine keep its speed, and how warm does it get?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hwmpq.measure.protocol import CellTiming, Protocol

_MINUTE_S = 60.0
#: One request to the worker: between two it reads the artifact again, a pause of milliseconds.
_REQUEST_S = 5.0
_EPOCH_S = 0.02
#: Parts of the names that Linux's drivers give to sensors of a processor.
_PROCESSORS = ("cpu", "pkg", "core", "k10temp", "zenpower", "soc")


@dataclass(frozen=True)
class Part:
    """A minute, or less of a short load. samples_s: seconds per call of every epoch, the disturbed
    ones too; begin_s: since the load began; temperature_c: at its end, None where none is shown."""

    begin_s: float
    samples_s: tuple[float, ...]
    temperature_c: float | None


def sustained(
    measure: Callable[[Protocol], CellTiming], seconds: float, threads: int, seed: int
) -> Iterator[Part]:
    """The parts of a load, each as soon as it is over; two at least.

    measure: times what is loaded once more, in a worker that stays warm.
    """
    count = max(2, math.ceil(seconds / _MINUTE_S))
    part_s = seconds / count
    rounds = max(1, round(min(_REQUEST_S, part_s) / _EPOCH_S))
    protocol = Protocol(rounds=rounds, epoch_s=_EPOCH_S, threads=threads, seed=seed)
    began = time.monotonic()
    for number in range(count):
        begin_s = time.monotonic() - began
        samples: list[float] = []
        while not samples or time.monotonic() - began < (number + 1) * part_s:
            timing = measure(protocol)
            samples += [*timing.samples_s, *timing.rejected_s]
        yield Part(begin_s, tuple(samples), temperature_c())


def temperature_c(system: Path = Path("/sys/class")) -> float | None:
    """Of the warmest sensor of a processor, in degrees Celsius; None where the system shows none.

    Source: Linux Documentation/driver-api/thermal/sysfs-api.rst, Documentation/hwmon/
    sysfs-interface.rst; both in thousandths of a degree.
    """
    found = []
    for name, readings in (("thermal/*/type", "temp"), ("hwmon/*/name", "temp*_input")):
        for file in system.glob(name):
            try:
                if any(word in file.read_text().lower() for word in _PROCESSORS):
                    found += [int(r.read_text()) / 1000 for r in file.parent.glob(readings)]
            except (OSError, ValueError):  # a sensor that is asleep or unplugged
                continue
    return max(found, default=None)
