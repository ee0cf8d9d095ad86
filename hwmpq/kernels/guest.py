"""Running one kernel of another instruction set under its target's emulator, without TVM there.

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


def run(executable: Any, target: Target, inputs: Sequence[Array], out: Array, memory: Array) -> str:
    """Call the kernel `main` of an executable, whose last argument is `out`.

    memory: the bytes of `out` and of a margin behind it; they are replaced. Answers '' or how the
    kernel ended and what the emulator said: 'SIGILL ...' where the chip lacks an instruction.
    Raises InputError where programs are missing.
    """
    check_tools(target)
    with tempfile.TemporaryDirectory(prefix="hwmpq-guest-") as folder:
        library = Path(folder) / "kernel.so"
        link(executable, target.triple, library)
        return call(library, target, inputs, out, memory)


def call(library: Path, target: Target, inputs: Sequence[Array], out: Array, memory: Array) -> str:
    """As `run`, of a linked library."""
    check_tools(target)
    sent = b"".join(_packed(a, a.tobytes()) for a in inputs)
    sent += _packed(out, memory.tobytes())
    command = [*target.emulator, _program(target.triple), str(library)]
    ran = subprocess.run(command, input=sent, capture_output=True, timeout=_DEADLINE_S, check=False)
    said = " ".join(ran.stderr.decode(errors="replace").split())
    if ran.returncode < 0:
        return f"{signal.Signals(-ran.returncode).name} ({said})"
    if ran.returncode or len(ran.stdout) != memory.nbytes:
        return f"exit status {ran.returncode} ({said})"
    memory[:] = np.frombuffer(ran.stdout, np.uint8)
    return ""


def _packed(array: Array, memory: bytes) -> bytes:
    """One argument as `guest.c` reads it."""
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
