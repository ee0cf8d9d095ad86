"""Machine code of CUDA C for a chip that is not here: NVRTC, a library of the extra `cuda`.

It gives PTX and a cubin in one go; what its assembler says of registers and spills is kept.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hwmpq.errors import InputError, InternalError
from hwmpq.kernels.cuda import source
from hwmpq.targets import Target

_LIBRARY = "libnvrtc.so.13"
#: A product is rounded before it is summed, as `requantize` says; barriers and copies stand where
#: we put them.
_OPTIONS = ("--fmad=false", "--std=c++17", "--ptxas-options=-v", "--disable-warnings")
INSTALL = "Run: pip install 'hwmpq[cuda]'"


@dataclass(frozen=True)
class Resources:
    """Of one kernel, as the assembler tells: bytes of spilled registers stored and loaded, of the
    stack frame, registers of a thread; `mma` instructions by types (sum, a, b, sum)."""

    spilled: int
    stack: int
    registers: int
    tensor_products: Counter[str]


@dataclass(frozen=True)
class Facts:
    """Of all kernels: `Resources` summed, but the most registers of a thread."""

    kernels: int
    spilled: int
    stack: int
    registers: int
    tensor_products: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    """resources: by kernel."""

    ptx: str
    cubin: bytes
    resources: dict[str, Resources]

    @property
    def facts(self) -> Facts:
        """What an inspection without the chip tells."""
        used = self.resources.values()
        products = sum((one.tensor_products for one in used), Counter[str]())
        return Facts(
            len(used), sum(one.spilled for one in used), sum(one.stack for one in used),
            max((one.registers for one in used), default=0), dict(sorted(products.items())),
        )  # fmt: skip


def missing() -> bool:
    """Is the compiler not here?"""
    return _find(f"lib/{_LIBRARY}") is None


def compiled(code: str, target: Target) -> Compiled:
    """The kernels of `source.code_of`, for the target's architecture.

    Raises InternalError with what NVRTC says of the code.
    """
    text = source.prelude("device") + code
    arch = str(target.tvm["arch"])
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, 0, 0))
    try:
        options = [option.encode() for option in (*_OPTIONS, f"--gpu-architecture={arch}")]
        given = (ctypes.c_char_p * len(options))(*options)
        failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
        log = _read(program, "ProgramLog").decode(errors="replace")
        if failed:
            raise InternalError(f"CUDA C for {arch} does not compile", log[:2000])
        ptx = _read(program, "PTX").decode().rstrip("\0")
        return Compiled(ptx, _read(program, "CUBIN"), _resources(log, ptx))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def instructions(cubin: bytes) -> Counter[str]:
    """Mnemonics of the machine code: `HMMA`, `IMMA`, `LDGSTS` ...

    Raises InputError without the disassembler.
    """
    program = _find("bin/nvdisasm")
    if program is None:
        raise InputError("no disassembler of machine code for GPUs (nvdisasm)", next=INSTALL)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([program, file.name], capture_output=True, text=True, check=True)
    found = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", told.stdout, re.MULTILINE)
    return Counter(found)


def _resources(log: str, ptx: str) -> dict[str, Resources]:
    """By kernel. `ptxas -v` tells its name, its stack and spills, its registers, in this order."""
    products = {}
    for text in re.split(r"\.visible \.entry ", ptx)[1:]:
        used = re.findall(r"\bmma\.sync\.\S*?\.(\w+\.\w+\.\w+\.\w+) ", text)
        products[text[: text.index("(")]] = Counter(used)
    found = {}
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for name, stack, stores, loads, registers in re.findall(pattern, log, re.DOTALL):
        found[name] = Resources(
            int(stores) + int(loads), int(stack), int(registers), products[name]
        )  # fmt: skip
    return found


@cache
def _nvrtc() -> ctypes.CDLL:
    """Raises InputError where it is not installed."""
    path = _find(f"lib/{_LIBRARY}")
    if path is None:
        raise InputError(f"no compiler for GPUs ({_LIBRARY})", next=INSTALL)
    return ctypes.CDLL(str(path))


def _find(name: str) -> Path | None:
    """A file of NVIDIA's packages for CUDA 13, which lie in one folder."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "cu13" / name
        if path.exists():
            return path
    return None


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    """One of the results of a compilation."""
    nvrtc, size = _nvrtc(), ctypes.c_size_t()
    _check(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    memory = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc, f"nvrtcGet{what}")(program, memory))
    return memory.raw


def _check(status: int) -> None:
    if status:
        raise InternalError("NVRTC failed", f"status {status}")
