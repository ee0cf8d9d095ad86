"""Running kernels of another instruction set under its target's emulator, without TVM there.

The emulator (QEMU's user mode) traps instructions that the chip has not. What it takes is a cross
compiler, of which `guest.c` is made once per process, and the emulator. Times there mean nothing,
and none is taken.
"""

from __future__ import annotations

import atexit
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.targets import Target

Array = NDArray[Any]
_SOURCE = Path(__file__).with_name("guest.c")
#: The longest that one kernel may run.
_DEADLINE_S = 120.0
#: DLPack's codes of numpy's kinds of numbers.
_CODES = {"i": 0, "u": 1, "f": 2}
DEBIAN = (
    "On Debian: apt install qemu-user-static gcc-aarch64-linux-gnu libc6-dev-arm64-cross "
    "gcc-riscv64-linux-gnu libc6-dev-riscv64-cross"
)


def missing(target: Target) -> list[str]:
    """Programs that are not here, of those that kernels of the target need to run."""
    programs = (*target.emulator[:1], f"{target.triple}-gcc")
    return [program for program in programs if shutil.which(program) is None]


def check_tools(target: Target) -> None:
    """Raises InputError where programs of the target cannot be run here."""
    if not target.emulator:
        raise InputError(
            f"target {target.name} cannot be emulated", "no emulator in its file", None,
            "Run it on a device of that kind: see `hwmpq devices`.",
        )  # fmt: skip
    if lacking := missing(target):
        raise InputError(f"emulating {target.name} needs {', '.join(lacking)}", next=DEBIAN)


def link(executable: Any, triple: str, path: Path) -> None:
    """Write a shared library for a platform. Raises InputError without its cross compiler."""
    from tvm.support import cc

    compiler = f"{triple}-gcc"
    if shutil.which(compiler) is None:
        raise InputError(f"linking for {triple} needs {compiler}", next=DEBIAN)
    executable.export_library(str(path), fcompile=cc.cross_compiler(compiler))


@dataclass(frozen=True, eq=False)
class Call:
    """Of a function of a library, whose last argument is `out`. memory: the bytes of `out` and of a
    margin behind it; they are replaced."""

    function: str
    inputs: Sequence[Array]
    out: Array
    memory: Array

    def packed(self) -> bytes:
        """As `guest.c` reads it."""
        name = self.function.encode()
        parts = [struct.pack("<2q", len(self.inputs) + 1, len(name)), name]
        parts += [_packed(a, a.tobytes()) for a in self.inputs]
        return b"".join([*parts, _packed(self.out, self.memory.tobytes())])


def run(executable: Any, target: Target, calls: Sequence[Call]) -> list[str]:
    """Call kernels of an executable, one after the other.

    Answers of each '' or how it ended and what the emulator said: 'SIGILL ...' where the chip lacks
    an instruction. Raises InputError where programs are missing.
    """
    check_tools(target)
    with tempfile.TemporaryDirectory(prefix="hwmpq-guest-") as folder:
        library = Path(folder) / "kernels.so"
        link(executable, target.triple, library)
        return run_linked(library, target, calls)


def run_linked(library: Path, target: Target, calls: Sequence[Call]) -> list[str]:
    """As `run`, of a linked library."""
    check_tools(target)
    command = [*target.emulator, _program(target.triple), str(library)]
    ends: list[str] = []
    while len(ends) < len(calls):  # again, from the next call on, after one that ended it all
        rest = calls[len(ends) :]
        ran = subprocess.run(
            command, input=b"".join(c.packed() for c in rest), capture_output=True,
            timeout=_DEADLINE_S * len(rest), check=False,
        )  # fmt: skip
        done = _read(ran.stdout, rest)
        if done == len(rest) and ran.returncode:
            done -= 1  # it left something behind that ended the guest later
        ends += [""] * done
        if done < len(rest):
            said = " ".join(ran.stderr.decode(errors="replace").split())
            ends.append(f"{_how_ended(ran.returncode)} ({said})")
    return ends


def _read(written: bytes, calls: Sequence[Call]) -> int:
    """Keep the results that the guest wrote: those of the first calls. Answers how many."""
    at = 0
    for done, call in enumerate(calls):
        there = written[at : at + call.memory.nbytes]
        if len(there) < call.memory.nbytes:
            return done
        call.memory[:] = np.frombuffer(there, np.uint8)
        at += len(there)
    return len(calls)


def _how_ended(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _packed(array: Array, memory: bytes) -> bytes:
    """One argument."""
    head = (_CODES[array.dtype.kind], array.dtype.itemsize * 8, array.size, len(memory))
    return struct.pack("<4q", *head) + memory


@cache
def _program(triple: str) -> str:
    """`guest.c`, compiled for a platform; it goes with this process."""
    folder = tempfile.mkdtemp(prefix="hwmpq-guest-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = f"{folder}/guest"
    command = [f"{triple}-gcc", "-O1", "-rdynamic", str(_SOURCE), "-o", path, "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return path
