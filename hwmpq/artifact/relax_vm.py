"""A network that TVM's Relax virtual machine runs on this CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.artifact import native

Array = NDArray[Any]
#: Names of our kernels in a compiled library begin so; those that TVM makes do not.
KERNEL_PREFIX = "hwmpq_"


class VmProgram:
    """What was compiled for one batch size. parameters: in the order in which `main` takes them
    after the inputs."""

    def __init__(self, code: bytes, of: Path, parameters: list[Any]):
        """Raises InputError where TVM or the system does not take the library."""
        self._library, self.parameters = native.library(code, of), parameters
        self._vm = self.machine()

    def machine(self) -> Any:
        """Another VM of it."""
        import tvm
        from tvm.runtime.vm import VirtualMachine

        return VirtualMachine(self._library, tvm.cpu())

    def tensors(self, inputs: Sequence[Array]) -> list[Any]:
        """The inputs as TVM takes them."""
        import tvm

        return [tvm.runtime.tensor(array) for array in inputs]

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """The outputs."""
        result = self._vm["main"](*self.tensors(inputs), *self.parameters)
        outputs = [result] if hasattr(result, "numpy") else list(result)
        return [output.numpy() for output in outputs]

    def bench(self, inputs: Sequence[Array]) -> Callable[[], object]:
        """A function that runs once on inputs that lie ready."""
        self._vm.set_input("main", *self.tensors(inputs), *self.parameters)
        invoke = self._vm.invoke_stateful
        return lambda: invoke("main")

    def trace(self, inputs: Sequence[Array]) -> list[Array]:
        """What every kernel call of one run wrote, flat, in order."""
        seen: list[Array] = []

        def after(_function: object, name: str, before: bool, _result: object, *args: Any) -> int:
            if not before and name.startswith(KERNEL_PREFIX):
                seen.append(args[-1].numpy().copy())
            return 0

        machine = self.machine()  # an instrument cannot be taken off again
        machine.set_instrument(after)
        machine["main"](*self.tensors(inputs), *self.parameters)
        return seen

    def call_seconds(self, inputs: Sequence[Array], longest_s: float) -> list[float]:
        """Least seconds of every kernel call of 15 runs; of fewer, but 3, once they took that."""
        stamps: list[float] = []

        def tick(_function: object, name: str, _before: bool, _result: object, *_: Any) -> int:
            if name.startswith(KERNEL_PREFIX):
                stamps.append(time.perf_counter())
            return 0

        machine = self.machine()  # an instrument cannot be taken off again
        machine.set_instrument(tick)
        machine.set_input("main", *self.tensors(inputs), *self.parameters)
        machine.invoke_stateful("main")  # the first run loads what is loaded on demand
        found: list[Array] = []
        began = time.perf_counter()
        while len(found) < 15 and (len(found) < 3 or time.perf_counter() - began < longest_s):
            stamps.clear()
            machine.invoke_stateful("main")
            found.append(np.diff(stamps)[::2])
        return [float(seconds) for seconds in np.min(found, axis=0)]


def programs(
    code: Mapping[int, bytes], taken: Mapping[int, Sequence[str]], arrays: Mapping[str, Array],
    of: Path,
) -> dict[int, VmProgram]:  # fmt: skip
    """Batch size -> its program. taken: names of the parameters of each, which share them."""
    import tvm

    shared = {name: tvm.runtime.tensor(array) for name, array in arrays.items()}
    return {
        size: VmProgram(raw, of, [shared[name] for name in taken[size]])
        for size, raw in code.items()
    }
