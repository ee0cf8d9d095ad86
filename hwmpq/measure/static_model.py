"""Cycles of a kernel on a chip that is not here: counted under its emulator, costed by LLVM.

QEMU tells how often each block of instructions ran, exactly and repeatably; llvm-mca tells how many
cycles the block takes, over and over, by LLVM's scheduling model of the core. Their products are
summed. Caches always hit and branches are always foretold, so it is less than a chip takes. Ranks
and ratios are what it is good for: such seconds are no measurement, and carry another source.
"""

from __future__ import annotations

import atexit
import json
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hwmpq import tensors
from hwmpq.errors import DeviceError, HwmpqError, InputError
from hwmpq.kernels import guest
from hwmpq.measure.kernel import difference
from hwmpq.measure.protocol import Cell, CellTiming
from hwmpq.targets import StaticModel, Target

#: `Measurement.source` of what comes from here.
SOURCE: Final = "static-model"
#: Versions of LLVM whose models are used: older ones take a Neoverse N1 or N2 for a Cortex-A57.
_LLVM = range(30, 18, -1)
_PLUGIN = Path(__file__).with_name("block_counts.c")
#: Instructions left out, as a share of all that ran: those of the rarest blocks.
_RARE = 1e-4
#: Times that llvm-mca repeats a block, and cycles that a call in it takes.
_REPEATS, _CALL_CYCLES = 100, 1
_DEBIAN = f"{guest.DEBIAN} qemu-user llvm-19 gcc"


@dataclass(frozen=True)
class Estimate:
    """What one call of a kernel takes. mnemonics: how often each instruction ran."""

    cycles: float
    mnemonics: Mapping[str, int]

    @property
    def instructions(self) -> int:
        return sum(self.mnemonics.values())


def model_of(target: Target) -> StaticModel:
    """Raises InputError where the target has none."""
    if target.static_model is None:
        raise InputError(
            f"cycles of {target.name} cannot be estimated", "no [static_model] in its file", None,
            "Measure on a device of that kind: see `hwmpq devices`.",
        )  # fmt: skip
    return target.static_model


def identity(target: Target) -> str:
    """What stands in the store where measured rows name their machine.

    Raises InputError where nothing can be estimated here.
    """
    model = model_of(target)
    guest.check_tools(target)
    lacking = [name for name in (_emulator(target), "gcc") if shutil.which(name) is None]
    if lacking:
        raise InputError(f"estimating {target.name} needs {', '.join(lacking)}", next=_DEBIAN)
    return f"{SOURCE}-{model.cpu}-{model.clock_hz / 1e6:.0f}MHz-{Path(_llvm('mca')).name}"


def time_cells(cells: Sequence[Cell], target: Target) -> list[CellTiming]:
    """Estimated seconds of kernels: one sample each, or why there is none."""
    return [_time(cell, target) for cell in cells]


def _time(cell: Cell, target: Target) -> CellTiming:
    try:
        arrays, _ = tensors.load(Path(cell.args))
        given = [arrays[str(i)] for i in range(len(arrays))]
        found, out = estimate(Path(cell.library), given, target)
        expected = tensors.load(Path(cell.expected))[0] if cell.expected else {}
        for right in expected.values():
            if wrong := difference(out, right, cell.atol, cell.rtol):
                return CellTiming(cell.key, error=f"wrong numbers: {wrong}")
    except subprocess.TimeoutExpired as error:
        return CellTiming(cell.key, error=f"timed out after {error.timeout:g} s under the emulator")
    except HwmpqError as error:
        return CellTiming(cell.key, error=str(error))
    model = model_of(target)
    quality = {"cycles": found.cycles, "instructions": found.instructions, "model": model.cpu}
    return CellTiming(cell.key, (found.cycles / model.clock_hz,), inner_count=1, quality=quality)


def estimate(
    library: Path, arguments: Sequence[NDArray[Any]], target: Target
) -> tuple[Estimate, NDArray[Any]]:
    """One call of the kernel `main` of a library, whose last argument is the output, and what it
    wrote there.

    Raises DeviceError when the kernel ends early, InputError where programs are missing.
    """
    out = np.array(arguments[-1])
    memory = out.view(np.uint8).reshape(-1)
    with tempfile.TemporaryDirectory(prefix="hwmpq-blocks-") as folder:
        counts = Path(folder) / "counts"
        plugin = f"{_plugin()},library={library.resolve()},out={counts}"
        emulator = (_emulator(target), "-plugin", plugin, *target.emulator[1:])
        counting = replace(target, emulator=emulator)
        call = guest.Call("main", arguments[:-1], out, memory)
        (ended,) = guest.run_linked(library, counting, [call])
        if ended:
            raise DeviceError(f"a kernel of {target.name} ended", ended)
        blocks: Counter[tuple[str, ...]] = Counter()
        for line in counts.read_text().splitlines():
            count, *words = line.split()
            blocks[tuple(words)] += int(count)
    return _cost(blocks, model_of(target), target.triple), out


def _cost(blocks: Mapping[tuple[str, ...], int], model: StaticModel, triple: str) -> Estimate:
    """blocks: the instructions of each, as hexadecimal bytes -> how often it ran."""
    total = sum(count * len(words) for words, count in blocks.items())
    chosen, seen = [], 0
    for words in sorted(blocks, key=lambda b: (-blocks[b] * len(b), b)):
        chosen.append(words)
        seen += blocks[words] * len(words)
        if seen >= (1 - _RARE) * total:
            break
    cpu = f"-mcpu={model.cpu}"
    text = "\n".join(_bytes(word) for words in chosen for word in words)
    printed = _tool("mc", "--disassemble", f"--triple={triple}", cpu, given=text).splitlines()
    lines = iter(line.strip() for line in printed if line.strip() and ".text" not in line)
    regions: list[str] = []
    mnemonics: Counter[str] = Counter()
    for number, words in enumerate(chosen):
        body = [next(lines, "") for _ in words]
        for line in body:
            mnemonics[line.split()[0] if line else "?"] += blocks[words]
        regions += [f"# LLVM-MCA-BEGIN {number}", *body, f"# LLVM-MCA-END {number}"]
    options = (f"-iterations={_REPEATS}", f"-call-latency={_CALL_CYCLES}", "-json")
    text = "\n".join([*regions, ""])
    answer = json.loads(_tool("mca", f"-mtriple={triple}", cpu, *options, given=text))
    cycles = 0.0
    for region, words in zip(answer["CodeRegions"], chosen, strict=True):
        cycles += blocks[words] * region["SummaryView"]["TotalCycles"] / _REPEATS
    return Estimate(cycles, mnemonics)


def _bytes(word: str) -> str:
    """As llvm-mc reads the bytes of an instruction."""
    return " ".join(f"0x{word[i : i + 2]}" for i in range(0, len(word), 2))


def _tool(name: str, *words: str, given: str) -> str:
    """What a program of LLVM prints. Raises DeviceError."""
    ran = subprocess.run([_llvm(name), *words], input=given, capture_output=True, text=True)
    if ran.returncode:
        raise DeviceError(f"llvm-{name} failed", ran.stderr.strip()[:400])
    return ran.stdout


def _llvm(name: str) -> str:
    """Raises InputError where there is none that is new enough."""
    for version in _LLVM:
        if shutil.which(f"llvm-{name}-{version}"):
            return f"llvm-{name}-{version}"
    raise InputError(
        "no scheduling models", f"no llvm-{name}", f"llvm-{name}-{_LLVM[-1]} or later", _DEBIAN
    )


def _emulator(target: Target) -> str:
    """The emulator that takes plugins, which a static program cannot load."""
    return target.emulator[0].removesuffix("-static")


@cache
def _plugin() -> str:
    """`block_counts.c`, compiled for this machine; it goes with this process."""
    folder = tempfile.mkdtemp(prefix="hwmpq-blocks-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = f"{folder}/block_counts.so"
    command = ["gcc", "-O1", "-shared", "-fPIC", str(_PLUGIN), "-o", path]
    subprocess.run(command, check=True, capture_output=True)
    return path
