"""Kernels for NVIDIA chips on this CPU: the CUDA C that the chip's compiler gets, compiled with
`host.cuh` in front. It proves numerics and the order of barriers; times mean nothing.
"""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError, InternalError
from hwmpq.kernels.cuda import source
from hwmpq.launches import Launch

Array = NDArray[Any]
_FLAGS = ("-std=c++17", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-w")
_ENDS = {1: "threads wait for others that never come", 2: "copies that nobody waited for"}


@dataclass(frozen=True, eq=False)
class Memory:
    """Bytes that kernels take for a GPU's."""

    held: Array

    @property
    def pointer(self) -> int:
        return _pointer(self.held)


class Emulator:
    """A GPU, emulated: a `Machine` of `hwmpq.artifact.cuda` for whole networks.

    Raises InputError where seconds are asked for, which mean nothing here.
    """

    suffix = ".cu"

    def __init__(self) -> None:
        """Raises InputError without a C++ compiler."""
        check_tools()

    def load(self, code: bytes, of: Path) -> Emulation:
        return _emulation(code.decode())

    def check(self, arch: str, of: Path) -> None:
        """Any chip is emulated."""

    def allocate(self, nbytes: int) -> Memory:
        return Memory(np.full(nbytes, 0xFF, np.uint8))

    def write(self, memory: Any, array: Array) -> None:
        ctypes.memmove(memory.pointer, _pointer(array), array.nbytes)

    def read(self, memory: Any, array: Array) -> None:
        ctypes.memmove(_pointer(array), memory.pointer, array.nbytes)

    def wait(self) -> None:
        """Nothing is ever under way."""

    def sequence(self, calls: Sequence[Callable[[], None]]) -> Callable[[], None]:
        def run() -> None:
            for call in calls:
                call()

        return run

    def seconds(self, call: Callable[[], None], count: int) -> float:
        raise _no_seconds()

    def seconds_between(self, calls: Sequence[Callable[[], None]]) -> list[float]:
        raise _no_seconds()


def _no_seconds() -> InputError:
    return InputError("seconds of an emulated GPU", None, None, "Time it on a GPU.")


class Emulation:
    """The kernels of a text, compiled for this CPU."""

    def __init__(self, code: str, optimize: str):
        with tempfile.TemporaryDirectory(prefix="hwmpq-cuda-") as folder:
            library = Path(folder) / "kernels.so"
            compile_library(code, optimize, library)
            self._library = ctypes.CDLL(str(library))

    def call(self, launch: Launch, pointers: Sequence[int]) -> Callable[[], None]:
        """What runs a kernel. Raises InternalError where it waits in vain or forgets to wait."""

        def run() -> None:
            if ended := self.run(launch, pointers):
                raise InternalError(f"{launch.kernel}, emulated", ended)

        return run

    def run(self, launch: Launch, pointers: Sequence[int]) -> str:
        """Run a kernel on these arguments. Answers '' or how it ended."""
        given = (ctypes.c_void_p * len(pointers))(*pointers)
        kernel = getattr(self._library, f"run_{launch.kernel}")
        ended = kernel(given, *launch.blocks, launch.threads, launch.shared_bytes)
        return _ENDS.get(int(ended), "")

    def run_on(self, launch: Launch, arrays: Sequence[Array]) -> str:
        """As `run`. arrays: the buffers of the launch; the result is written in place."""
        return self.run(launch, [_pointer(arrays[i]) for i in launch.arguments])


@cache
def _emulation(code: str) -> Emulation:
    """Of a network: compiled once, run for seconds to minutes."""
    return Emulation(code, "-O1")


def possible() -> bool:
    """Is a C++ compiler here?"""
    return shutil.which("g++") is not None


def check_tools() -> None:
    """Raises InputError without one."""
    if not possible():
        raise InputError("emulating a GPU needs g++", next="On Debian: apt install g++")


def briefly(code: str) -> Emulation:
    """Of kernels that run for milliseconds: without optimization, which takes seconds."""
    return Emulation(code, "-O0")


def compile_library(code: str, optimize: str, path: Path) -> None:
    """Write a shared library with a function for each kernel: run_NAME(arguments, blocks along x
    and y, threads, shared bytes)."""
    _compile(_text(code), optimize, "-shared", str(_machine()), "-o", str(path))


def _text(code: str) -> str:
    code = source.SHARED.sub(r"uchar* \1 = shared_memory;", code)
    calls = []
    for kernel in source.kernels_of(code):
        given = ", ".join(f"({dtype})a[{i}]" for i, (dtype, _) in enumerate(kernel.arguments))
        calls.append(
            f"""static void call_{kernel.name}(void** a) {{ {kernel.name}({given}); }}
extern "C" int run_{kernel.name}(void** a, int x, int y, int threads, int shared) {{
  return run_grid(call_{kernel.name}, a, x, y, threads, shared);
}}
"""
        )
    return f"""{source.prelude("host")}
{code}
extern "C" int run_grid(void (*)(void**), void**, int, int, int, int);
{"".join(calls)}"""


@cache
def _machine() -> Path:
    """`host.cpp` as an object; it goes with this process."""
    folder = tempfile.mkdtemp(prefix="hwmpq-cuda-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "host.o"
    text = (source.FOLDER / "host.cpp").read_text()
    _compile(text, "-O2", "-c", f"-I{source.FOLDER}", "-o", str(path))
    return path


def _compile(text: str, *options: str) -> None:
    """C++ of a text. Raises InternalError with what the compiler says."""
    command = ["g++", *_FLAGS, "-x", "c++", "-", "-x", "none", *options]
    built = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if built.returncode:
        raise InternalError("an emulated kernel does not compile", built.stderr[:2000])


def _pointer(array: Array) -> int:
    assert array.flags.c_contiguous
    return int(array.ctypes.data)
