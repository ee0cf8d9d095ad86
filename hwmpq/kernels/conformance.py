"""Does a kernel compute what `reference` says? Which cases there are stands in `cases`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq import targets, tile_permission
from hwmpq.formats import format_named
from hwmpq.kernels import Kernel, best, guest, kernel_named
from hwmpq.kernels.build import assembly, in_call_order, library
from hwmpq.kernels.cases import Case, call_of, probe
from hwmpq.kernels.codes import memory_dtype
from hwmpq.kernels.cuda import check as gpu
from hwmpq.kernels.emulate import emit_emulated
from hwmpq.kernels.micro.cuda import WarpMicro
from hwmpq.kernels.nests import Schedule
from hwmpq.kernels.sample import Sample, draw, read
from hwmpq.targets import Target
from hwmpq.types import Workload, reject_unknown

EMULATED = "emulated intrinsic"
#: The other order of the loops; a GPU's tiles have none.
_TURNED = {"vectors": "rows", "rows": "vectors"}


def check(case: Case, target: Target) -> str | None:
    """`check_all` of one."""
    (wrong,) = check_all([case], target)
    return wrong


def check_all(cases: Sequence[Case], target: Target) -> list[str | None]:
    """Compile and run cases in this process; of each None, or what differs.

    Integers must be exact, floats within the rounding of their sums. A kernel whose instructions
    this CPU lacks runs with them emulated (`how`), compiled for this CPU; one of another kind of
    machine as it is, under the target's emulator; one of a GPU is compiled for it and inspected,
    and its source runs on this CPU.

    All are compiled at once, and cases whose code is the same to the letter, as that of formats
    which differ in their numbers alone, share it: each still runs with numbers of its own.
    """
    trials = [_Trial.of(case, target) for case in cases]
    functions = _named(trials)
    if target.gpu:
        runs = [
            gpu.Run(t.name, [*t.inputs, t.out.values], _on_tensor_cores(t.kernel)) for t in trials
        ]
        ends = gpu.run(functions, target, runs)
    else:
        elsewhere = targets.satisfied_by_host(target) and not target.foreign
        executable = library(functions, targets.native() if elsewhere else target)
        if target.foreign:
            calls = [guest.Call(t.name, t.inputs, t.out.values, t.out.memory) for t in trials]
            ends = [
                end and f"ended by {end} under {target.emulator[0]}"
                for end in guest.run(executable, target, calls)
            ]
        else:
            ends = _run_here(executable, trials)
    return [end or trial.wrong() for end, trial in zip(ends, trials, strict=True)]


def traps(target: Target) -> dict[str, str]:
    """How kernels for like chips with more instructions end on the emulated one of a target: name
    of the other target -> 'ended by SIGILL ...', as they should, or else what came of it."""
    found: dict[str, str] = {}
    seen = set()
    for other in map(targets.load, targets.names()):
        more = other.features - target.features
        if other.gpu or other.triple != target.triple or not more or other.features in seen:
            continue
        seen.add(other.features)
        call = call_of(probe("linear"), "w8a8", "u8")
        kernel = best(call.workload, call.format, other.features)
        if kernel is not None and not kernel.requires <= target.features:
            older = replace(other, emulator=target.emulator)
            found[other.name] = check(Case(kernel.name, call), older) or "it ran"
    return found


def how(kernel: Kernel) -> str:
    """'' when this CPU has the kernel's instructions, else EMULATED."""
    return "" if kernel.requires <= targets.host_features() else EMULATED


def mnemonics(request: Mapping[str, Any]) -> dict[str, Any]:
    """{"workload", "format", "kernel", "target"} -> {"counts": {mnemonic: how often}}.

    Compiled for the target itself, nothing runs: for kernels of CPUs that are not here. Meant for
    a worker: LLVM ends the process at an instruction that the target cannot encode.
    """
    reject_unknown("request", request, {"workload", "format", "kernel", "target"})
    target = targets.load(request["target"])
    workload, fmt = Workload.from_json(request["workload"]), format_named(request["format"])
    kernel = kernel_named(request["kernel"], workload, fmt, target.features)
    call = call_of(workload, fmt.name, "u8" if fmt.is_integer else "fp32")
    text = assembly(library({"main": kernel.emit(call)}, target))
    return {"counts": dict(Counter(re.findall(r"^\s+([a-z][\w.]+)\s", text, re.MULTILINE)))}


class _Guarded:
    """An output array, poisoned, with a margin behind it that nobody may write."""

    def __init__(self, size: int, dtype: str):
        margin, nbytes = 256, size * np.dtype(dtype).itemsize
        block = np.full(nbytes + margin + 64, 0x7B, np.uint8)
        start = -block.ctypes.data % 64  # kernels may assume the runtime's alignment
        self.memory = block[start : start + nbytes + margin]
        self.values: NDArray[Any] = self.memory[:nbytes].view(dtype)
        self._behind = self.memory[nbytes:]

    def tensor(self) -> Any:
        import tvm

        return tvm.runtime.from_dlpack(self.values)

    def wrong(self) -> str | None:
        return None if (self._behind == 0x7B).all() else "wrote behind the end of its output"


@dataclass(eq=False)
class _Trial:
    """A case to be run. name: of its function, once that is known among others."""

    case: Case
    kernel: Kernel
    function: Any
    inputs: list[NDArray[Any]]
    sample: Sample
    out: _Guarded
    name: str = ""

    @staticmethod
    def of(case: Case, target: Target) -> _Trial:
        call = case.call
        kernel = kernel_named(case.kernel, call.workload, call.format, target.features)
        sample = draw(call, case.seed, case.values)
        out = _Guarded(sample.answer.right.size, memory_dtype(call.out))
        function = _emitted(case, kernel, target)
        return _Trial(case, kernel, function, in_call_order(kernel, call, sample), sample, out)

    def wrong(self) -> str | None:
        """After it has run: None, or what is not as it should be."""
        elements = self.out.values.reshape(self.sample.answer.right.shape)
        return self.out.wrong() or self.sample.answer.wrong(read(self.case.call.out, elements))


def _emitted(case: Case, kernel: Kernel, target: Target) -> Any:
    """The case's PrimFunc."""
    call, schedule = case.call, _schedule(case, kernel)
    if not target.foreign and not target.gpu and how(kernel) == EMULATED:
        return emit_emulated(kernel.nest, call, kernel.micro, kernel.decoder, schedule)
    tile_permission.ask(kernel.requires)
    return replace(kernel, timed=schedule).emit(call, all_threads=True)


def _named(trials: Sequence[_Trial]) -> dict[str, Any]:
    """The different functions of trials by name; each trial is told its own."""
    from tvm_ffi import StructuralKey

    names: dict[Any, str] = {}
    functions: dict[str, Any] = {}
    for trial in trials:
        trial.name = names.setdefault(StructuralKey(trial.function), f"kernel{len(names)}")
        functions.setdefault(trial.name, trial.function)
    return functions


def _run_here(executable: Any, trials: Sequence[_Trial]) -> list[str]:
    import tvm

    module = executable.jit()
    for trial in trials:
        module[trial.name](*(tvm.runtime.tensor(a) for a in trial.inputs), trial.out.tensor())
    return [""] * len(trials)


def _on_tensor_cores(kernel: Kernel) -> bool:
    return isinstance(kernel.micro, WarpMicro) and kernel.micro.tensor_cores


def _schedule(case: Case, kernel: Kernel) -> Schedule:
    found = kernel.nest.schedules(case.call, kernel.micro)
    if case.schedule == "last":
        return found[-1]
    best = found[0]
    if case.schedule == "best":
        return best
    if best.order not in _TURNED:
        return found[len(found) // 2]
    return Schedule(best.rows, best.vectors, _TURNED[best.order])
