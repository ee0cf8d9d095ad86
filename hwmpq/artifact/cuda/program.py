"""A list of launches on a GPU, or on an emulation of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.launches import Launch, Launches

Array = NDArray[Any]
Call = Callable[[], None]
Shapes = Sequence[Sequence[int]]


class Memory(Protocol):
    """Bytes of a device; they go with this object."""

    @property
    def pointer(self) -> int: ...


class Code(Protocol):
    """Loaded kernels."""

    def call(self, launch: Launch, pointers: Sequence[int]) -> Call:
        """What puts a kernel on its way."""
        ...


class Machine(Protocol):
    """What runs kernels one after the other. suffix: of the file of an artifact that it loads."""

    @property
    def suffix(self) -> str: ...

    def load(self, code: bytes, of: Path) -> Code:
        """Raises InputError for code that it does not take."""
        ...

    def check(self, arch: str, of: Path) -> None:
        """Raises InputError where the chip cannot run code for that architecture."""
        ...

    def allocate(self, nbytes: int) -> Memory: ...

    def write(self, memory: Memory, array: Array) -> None: ...

    def read(self, memory: Memory, array: Array) -> None:
        """Into an array, once all that is under way has ended."""
        ...

    def wait(self) -> None:
        """Until all that is under way has ended."""
        ...

    def sequence(self, calls: Sequence[Call]) -> Call:
        """The calls as one, on a GPU a graph."""
        ...

    def seconds(self, call: Call, count: int) -> float:
        """What so many calls take, by the device's own clock."""
        ...

    def seconds_between(self, calls: Sequence[Call]) -> list[float]:
        """Of every call of a sequence, by the device's own clock."""
        ...


class CudaProgram:
    """A network in the memory of a machine. It is a `Program` of `artifact.run`."""

    def __init__(
        self, machine: Machine, code: Code, launches: Launches, parameters: Sequence[Memory],
        shapes: Shapes,
    ):  # fmt: skip
        """parameters: those of `launches`; shapes: of the outputs."""
        self._machine, self._launches, self._shapes = machine, launches, shapes
        given = dict(zip(launches.parameters, parameters, strict=True))
        self._memory = [
            given[number] if number in given else machine.allocate(nbytes)
            for number, nbytes in enumerate(launches.buffers)
        ]
        self._calls = [
            code.call(launch, [self._memory[i].pointer for i in launch.arguments])
            for launch in launches.launches
        ]
        self._whole = machine.sequence(self._calls)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """The outputs."""
        self._put(inputs)
        self._whole()
        outputs = [np.empty(shape, np.float32) for shape in self._shapes]
        for number, output in zip(self._launches.outputs, outputs, strict=True):
            self._machine.read(self._memory[number], output)
        return outputs

    def bench(self, inputs: Sequence[Array]) -> Callable[[], object]:
        """A function that runs once on inputs that lie in the device's memory, and waits."""
        self._put(inputs)

        def run() -> None:
            self._whole()
            self._machine.wait()

        return run

    def seconds(self, inputs: Sequence[Array]) -> Callable[[int], float]:
        """A function of how many runs: the seconds that they take, by the device's own clock."""
        self._put(inputs)
        return lambda count: self._machine.seconds(self._whole, count)

    def trace(self, inputs: Sequence[Array]) -> list[Array]:
        """What every kernel call of one run wrote, flat, in order."""
        self._put(inputs)
        seen = []
        for launch, call in zip(self._launches.launches, self._calls, strict=True):
            call()
            seen.append(np.empty(launch.size, launch.dtype))
            self._machine.read(self._memory[launch.writes], seen[-1])
        return seen

    def call_seconds(self, inputs: Sequence[Array], longest_s: float) -> list[float]:
        """Least seconds of every kernel call of 15 runs; of fewer, but 3, once they took that."""
        self._put(inputs)
        found: list[list[float]] = []
        while len(found) < 15 and (len(found) < 3 or np.sum(found) < longest_s):
            found.append(self._machine.seconds_between(self._calls))
        return [float(seconds) for seconds in np.min(found, axis=0)]

    def _put(self, inputs: Sequence[Array]) -> None:
        for number, array in zip(self._launches.inputs, inputs, strict=True):
            self._machine.write(self._memory[number], array)


def programs(
    machine: Machine, code: Mapping[int, tuple[bytes, bytes]], taken: Mapping[int, Sequence[str]],
    arrays: Mapping[str, Array], ends: Mapping[int, tuple[Shapes, Shapes]], of: Path,
) -> dict[int, CudaProgram]:  # fmt: skip
    """Batch size -> its program.

    code: kernels and list of launches of each; taken: names of its parameters, of which those of
    one name are shared; ends: shapes of its inputs and outputs. Raises InputError for what does not
    fit together.
    """
    lists = {size: Launches.parse(told, of) for size, (_, told) in code.items()}
    for size, launches in lists.items():
        machine.check(launches.arch, of)
        _check_fit(launches, [arrays[name] for name in taken[size]], ends[size], of)
    shared = {}
    for name, array in arrays.items():
        shared[name] = machine.allocate(array.nbytes)
        machine.write(shared[name], np.ascontiguousarray(array))
    return {
        size: CudaProgram(
            machine, machine.load(kernels, of), lists[size], [shared[n] for n in taken[size]],
            ends[size][1],
        )
        for size, (kernels, _) in code.items()
    }  # fmt: skip


def _check_fit(
    launches: Launches, arrays: Sequence[Array], ends: tuple[Shapes, Shapes], of: Path
) -> None:
    """Raises InputError where something would be read or written behind the end of a buffer."""
    numbers = (*launches.inputs, *launches.parameters, *launches.outputs)
    inputs, outputs = ([4 * prod(shape) for shape in shapes] for shapes in ends)
    found = [*inputs, *(array.nbytes for array in arrays), *outputs]
    if [launches.buffers[number] for number in numbers] != found:
        raise InputError(f"the launches of artifact {of}", "other sizes than its tensors have")
