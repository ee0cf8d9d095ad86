"""Kernels for NVIDIA chips on this CPU: the CUDA C that the chip's compiler gets, compiled with
`host.cuh` in front. It proves numerics and the order of barriers; times mean nothing.
"""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hwmpq.errors import InternalError
from hwmpq.kernels.cuda import source

Array = NDArray[Any]
_FLAGS = ("-std=c++17", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-w")
_ENDS = {1: "threads wait for others that never come", 2: "copies that nobody waited for"}


def possible() -> bool:
    """Is a C++ compiler here?"""
    return shutil.which("g++") is not None


def run(code: str, launch: source.Launch, arguments: Mapping[str, Array]) -> str:
    """Call the one kernel of a text. arguments: by name, flat; the result is written in place.

    Answers '' or how it ended.
    """
    (kernel,) = source.kernels_of(code)
    with tempfile.TemporaryDirectory(prefix="hwmpq-cuda-") as folder:
        library = Path(folder) / "kernel.so"
        # Without optimization: kernels run for milliseconds, and optimizing takes seconds.
        _compile(_text(code, kernel), "-O0", "-shared", str(_machine()), "-o", str(library))
        pointers = [_pointer(arguments[name.removesuffix("_ptr")]) for _, name in kernel.arguments]
        given = (ctypes.c_void_p * len(pointers))(*pointers)
        call = ctypes.CDLL(str(library)).run
        ended = int(call(given, *launch.blocks, kernel.threads, launch.shared_bytes))
    return _ENDS.get(ended, "")


def _text(code: str, kernel: source.Kernel) -> str:
    """A library with one function: run(arguments, blocks along x and y, threads, shared bytes)."""
    code = source.SHARED.sub(r"uchar* \1 = shared_memory;", code)
    given = ", ".join(f"({dtype})a[{i}]" for i, (dtype, _) in enumerate(kernel.arguments))
    return f"""{source.prelude("host")}
{code}
static void call(void** a) {{ {kernel.name}({given}); }}
extern "C" int run_grid(void (*)(void**), void**, int, int, int, int);
extern "C" int run(void** a, int x, int y, int threads, int shared) {{
  return run_grid(call, a, x, y, threads, shared);
}}
"""


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
