"""Timing on an NVIDIA GPU, by its own events: kernels and whole artifacts, as graphs.

A kernel's calls are captured once, each with the next copy of the weights, and replayed as an
artifact is: nothing waits for the host between two of them. Clocks and what throttled them are read
after every epoch and kept with the times.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.artifact.cuda import driver
from hwmpq.launches import Launches
from hwmpq.measure import nvml
from hwmpq.measure.kernel import arguments, plan_copies
from hwmpq.measure.protocol import Cell
from hwmpq.types import digest

#: Calls in a graph at least, so that launching it costs a call next to nothing.
_CALLS = 32
_MOST_COPIES = 1024


class CudaKernel:
    """A kernel on the GPU: one set of activations, several copies of the weights.

    copies, cold: as of `measure.kernel.Kernel`; calls: of a graph; quality: what is kept beside the
    times.
    """

    def __init__(self, cell: Cell):
        """Raises DeviceError without a GPU, InputError for one that cannot run the code."""
        gpu, library = driver.gpu(), Path(cell.library)
        launches = Launches.parse(Path(cell.launches).read_bytes(), library)
        gpu.check(launches.arch, library)
        code, (launch,) = gpu.load(library.read_bytes(), library), launches.launches
        self._arrays = arguments(cell)
        weights = [i for i, role in enumerate(cell.roles) if role == "weight"]
        nbytes = sum(self._arrays[i].nbytes for i in weights)
        self.copies, self.cold = plan_copies(nbytes, gpu.l2_bytes, _MOST_COPIES, 4 * gpu.l2_bytes)
        self._gpu = gpu
        self._first = [self._placed(array) for array in self._arrays]
        rows = [self._first]
        for _ in range(self.copies - 1):
            again = {i: self._placed(self._arrays[i]) for i in weights}
            rows.append([again.get(i, memory) for i, memory in enumerate(self._first)])
        self._rows = rows  # keeps their memory
        calls = [code.call(launch, [row[i].pointer for i in launch.arguments]) for row in rows]
        calls *= -(-_CALLS // self.copies)
        graph, self.calls = gpu.sequence(calls), len(calls)
        self._watched = Watched(lambda count: gpu.seconds(graph, count))
        self.quality = {
            "weight_copies": self.copies, "cold": self.cold, **self._watched.quality
        }  # fmt: skip

    def run(self, count: int) -> float:
        """Seconds that `count` calls take; so many are made as are whole graphs."""
        graphs = -(-count // self.calls)
        return self._watched.run(graphs) * count / (graphs * self.calls)

    def result(self, index: int) -> NDArray[Any]:
        """The argument of that number as the first calls left it."""
        found = np.empty_like(self._arrays[index])
        self._gpu.read(self._first[index], found)
        return found

    def _placed(self, array: NDArray[Any]) -> Any:
        memory = self._gpu.allocate(array.nbytes)
        self._gpu.write(memory, np.ascontiguousarray(array))
        return memory


class Watched:
    """Calls on the GPU that is looked at after each series of them. quality: what was seen."""

    def __init__(self, seconds: Callable[[int], float]):
        gpu = driver.gpu()
        self._seconds, self._watch = seconds, nvml.watch(gpu.bus)
        told = self._watch.told if self._watch else {}
        told |= {"name": gpu.name, "cuda": gpu.driver}
        self.quality: dict[str, Any] = {"gpu": told}

    def run(self, count: int) -> float:
        """Seconds that `count` calls take."""
        seconds = self._seconds(count)
        if self._watch:
            self._watch.look()
        return seconds


@functools.cache
def hardware() -> dict[str, Any]:
    """The GPU's identity, a part of every key. Raises DeviceError without one."""
    gpu = driver.gpu()
    return {
        "model": gpu.name, "capability": list(gpu.capability), "l2": gpu.l2_bytes,
        "multiprocessors": gpu.multiprocessors,
    }  # fmt: skip


def fingerprint() -> str:
    """A short stable name of this kind of GPU. Raises DeviceError without one."""
    facts = hardware()
    name = re.sub(r"\W+", "-", str(facts["model"]), flags=re.ASCII).strip("-")
    return f"{name[:50]}-{digest(facts)}"


def identity() -> dict[str, Any]:
    """{"fingerprint", "features": the feature words of the GPU here}; '' and none without one."""
    if not driver.present():
        return {"fingerprint": "", "features": []}
    major, minor = driver.gpu().capability
    words = {"sm80": major >= 8, "sm89": (major, minor) == (8, 9), "sm90": (major, minor) == (9, 0)}
    return {"fingerprint": fingerprint(), "features": [word for word, has in words.items() if has]}
