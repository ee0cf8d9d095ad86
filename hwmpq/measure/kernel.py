"""A kernel in its library as a thing that can be checked and timed: `load_kernel(cell).run(n)`.

How the inner loop runs. A kernel of 5 µs must be called back to back with other weights each time.
Tried with a kernel of 3.8 µs and with an empty one, interleaved, on a shared AMD EPYC core:

- a Python loop over argument tuples: +24 %; 200 to 550 ns per empty call, changing with the state
  of the interpreter;
- `time_evaluator` with number=1 on one copy after the other: +20 % from its clock; besides, its
  warm-up call touches just the weights that the timed call then reads, so they are never cold;
- a loop compiled by TVM that reads the addresses of the arguments from a table and calls the kernel
  through the packed-function interface, as an artifact does: +2 % against `time_evaluator` with
  number=1000 on warm weights (the machine's noise); 20 to 35 ns per empty call, any number of
  copies, one clock reading per epoch.

So it is the last one, for all kernels alike. Nothing is subtracted; the cost of calling an empty
kernel this way is reported as `call_overhead_s`.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hwmpq import tensors, tile_permission
from hwmpq.errors import InputError
from hwmpq.measure.environment import l2_bytes
from hwmpq.measure.protocol import Cell
from hwmpq.targets import is_foreign

MAX_COPIES = 64
MAX_ROTATED_BYTES = 64 << 20
#: Outputs are filled with this byte before the check: far from 0 in every format, not a NaN.
_POISON = 0x7B
#: Files of `export_loop`.
_LOOP_FILE, _EMPTY_FILE, _EMPTY_LOOP_FILE = "loop.so", "empty.so", "empty_loop.so"

# `nargs` and the name are filled in. A void* argument that points to a DLTensor is accepted by
# every kernel that TVM compiles.
_LOOP = """
@T.prim_func(s_tir=True)
def rotate(handle: T.handle, start: T.int64, count: T.int64):
    T.func_attr({{"global_symbol": "rotate", "tirx.noalias": True}})
    rows = T.int64()
    table = T.match_buffer(handle, (rows, {nargs}), "int64")
    for i in T.serial(count):
        T.evaluate(T.call_packed("{function}", {arguments}))
"""
_ARGUMENT = 'T.reinterpret(table[(start + i) % rows, {index}], dtype="handle")'
_EMPTY = """
@T.prim_func(s_tir=True)
def main(a: T.Buffer((1,), "int8"), b: T.Buffer((1,), "int8"), c: T.Buffer((1,), "int8")):
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    c[0] = a[0]
"""


class WrongNumbers(ValueError):
    """The kernel's outputs differ from the expected ones."""


class Kernel:
    """A loaded kernel with its arguments: one set of activations, several copies of the weights.

    rows[copy]: the arguments of a call; copies: how many; cold: whether together they exceed twice
    the L2 cache, so that each call finds its weights outside it.
    """

    def __init__(
        self, module: Any, loop: Any, arrays: list[NDArray[Any]], weights: Sequence[int] = ()
    ):
        """loop: what calls it, compiled for the module's function and as many arguments."""
        import tvm

        nbytes = sum(arrays[i].nbytes for i in weights)
        self.copies, self.cold = plan_copies(nbytes, l2_bytes())
        device = tvm.cpu(0)
        first = [tvm.runtime.tensor(array, device) for array in arrays]
        rows = [first]
        for _ in range(self.copies - 1):
            row = list(first)
            for i in weights:
                row[i] = tvm.runtime.tensor(arrays[i], device)
            rows.append(row)
        self.rows = rows
        # DLPack capsules keep the tensors alive and begin with the DLTensor that kernels read.
        self._capsules = [[tensor.__dlpack__() for tensor in row] for row in rows]
        table = [[_address(capsule) for capsule in row] for row in self._capsules]
        self._table = tvm.runtime.tensor(np.array(table, dtype=np.int64), device)
        self._module = loop
        self._module.import_module(module)
        self._loop = self._module["rotate"]
        self._next = 0

    def run(self, count: int) -> float:
        """Seconds that `count` calls take, going on with the copy after the last one used."""
        start, self._next = self._next, (self._next + count) % self.copies
        began = time.perf_counter()
        self._loop(self._table, start, count)
        return time.perf_counter() - began

    def result(self, index: int) -> NDArray[Any]:
        """The argument of that number as the first call left it."""
        found: NDArray[Any] = self.rows[0][index].numpy()
        return found


def load_kernel(cell: Cell) -> Kernel:
    """Load the library and allocate the arguments; nothing has run yet.

    Raises InputError when files and roles do not fit together, or Linux refuses a feature.
    """
    import tvm

    tile_permission.ask(cell.features)
    arrays = arguments(cell)
    weights = [i for i, role in enumerate(cell.roles) if role == "weight"]
    module = tvm.runtime.load_module(cell.library)
    if cell.loop:
        loop = tvm.runtime.load_module(str(Path(cell.loop) / _LOOP_FILE))
    else:
        loop = _compile(_loop_source(cell.function, len(arrays))).jit()
    return Kernel(module, loop, arrays, weights)


def arguments(cell: Cell) -> list[NDArray[Any]]:
    """In order; those that are written hold what no result is. Raises InputError."""
    args, _ = tensors.load(Path(cell.args))
    arrays = [args[str(i)] for i in range(len(args)) if str(i) in args]
    if len(arrays) != len(args) or len(arrays) != len(cell.roles):
        raise InputError(f"arguments of {cell.key}", sorted(args), [*map(str, cell.roles)])
    for index, role in enumerate(cell.roles):
        if role == "output":
            poison = np.full(arrays[index].nbytes, _POISON, dtype=np.uint8)
            arrays[index] = poison.view(arrays[index].dtype).reshape(arrays[index].shape)
    return arrays


class Runnable(Protocol):
    """A loaded kernel, of a CPU or a GPU."""

    def run(self, count: int) -> float:
        """Seconds that `count` calls take."""
        ...

    def result(self, index: int) -> NDArray[Any]:
        """The argument of that number as the first call left it."""
        ...


def check_kernel(kernel: Runnable, cell: Cell) -> None:
    """Run once and compare with the expected outputs. Raises WrongNumbers."""
    kernel.run(1)
    if not cell.expected:
        return
    for name, expected in tensors.load(Path(cell.expected))[0].items():
        reason = difference(kernel.result(int(name)), expected, cell.atol, cell.rtol)
        if reason:
            raise WrongNumbers(f"argument {name}: {reason}")


def difference(got: NDArray[Any], expected: NDArray[Any], atol: float, rtol: float) -> str | None:
    """Why |got − expected| ≤ atol + rtol·|expected| does not hold everywhere, or None."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype}{list(got.shape)} for {expected.dtype}{list(expected.shape)}"
    a, b = got.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.abs(a - b)
        right = (a == b) | (np.isnan(a) & np.isnan(b)) | (error <= atol + rtol * np.abs(b))
    wrong = np.flatnonzero(~right)
    if not wrong.size:
        return None
    at = int(wrong[0])
    return (
        f"{wrong.size} of {a.size} elements differ, the first at {at}: {a.flat[at]:g} for "
        f"{b.flat[at]:g}, largest difference {np.max(error.flat[wrong]):g} "
        f"(atol {atol:g}, rtol {rtol:g})"
    )


def plan_copies(
    weight_bytes: int, l2: int, most: int = MAX_COPIES, most_bytes: int = MAX_ROTATED_BYTES
) -> tuple[int, bool]:
    """How many copies of the weights to rotate, and whether they exceed twice the L2 cache."""
    if weight_bytes == 0:
        return 1, False
    wanted = math.floor(2 * l2 / weight_bytes) + 1
    copies = max(1, min(wanted, most, most_bytes // weight_bytes))
    return copies, copies * weight_bytes > 2 * l2


@functools.cache
def call_overhead_s(loop: str = "") -> float:
    """Seconds per call that the inner loop spends on an empty kernel of three arguments.

    loop: a folder of `export_loop`; '' = compiled here.
    """
    if loop:
        import tvm

        files = (_EMPTY_FILE, _EMPTY_LOOP_FILE)
        empty, calls = (tvm.runtime.load_module(str(Path(loop) / name)) for name in files)
    else:
        empty, calls = (_compile(source).jit() for source in (_EMPTY, _loop_source("main", 3)))
    one = np.ones(1, dtype=np.int8)
    kernel = Kernel(empty, calls, [one, one, one])
    kernel.run(1000)
    return min(kernel.run(10_000) for _ in range(5)) / 10_000


def export_loop(folder: Path, function: str, nargs: int, target: Mapping[str, Any]) -> None:
    """Compile the inner loop of a kernel, an empty kernel and its loop into a new folder, for a
    machine that only has TVM's runtime. target: TVM's description of that machine.

    A loaded loop remembers the kernel that it first called, so every cell needs files of its own.
    """
    sources = {
        _LOOP_FILE: _loop_source(function, nargs),
        _EMPTY_FILE: _EMPTY,
        _EMPTY_LOOP_FILE: _loop_source("main", 3),
    }
    folder.mkdir(parents=True)
    for name, source in sources.items():
        (folder / name).write_bytes(library(source, target))


def library(source: str, target: Mapping[str, Any]) -> bytes:
    """The shared library of a TVMScript function. target: TVM's description.

    Raises InputError for another kind of machine without its cross compiler.
    """
    return _library(source, json.dumps(dict(target)))


@functools.lru_cache(64)
def _library(source: str, target: str) -> bytes:
    described = json.loads(target)
    made, triple = _compile(source, described), described.get("mtriple", "")
    with tempfile.TemporaryDirectory(prefix="hwmpq-") as folder:
        path = Path(folder) / "loop.so"
        if is_foreign(triple):
            from hwmpq.kernels import guest  # where nothing is compiled, this file goes alone

            guest.link(made, triple, path)
        else:
            made.export_library(str(path))
        return path.read_bytes()


def _loop_source(function: str, nargs: int) -> str:
    if not function.isidentifier():
        raise InputError("not a function name", repr(function))
    arguments = ", ".join(_ARGUMENT.format(index=index) for index in range(nargs))
    return _LOOP.format(nargs=nargs, function=function, arguments=arguments)


def _compile(source: str, target: Mapping[str, Any] | None = None) -> Any:
    """Compile a TVMScript function, for this CPU unless told otherwise."""
    import tvm

    function = tvm.script.from_source(source)
    module = tvm.IRModule({function.attrs["global_symbol"]: function})
    return tvm.compile(module, target=tvm.target.Target(dict(target or {"kind": "llvm"})))


def _address(capsule: object) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(get(capsule, b"dltensor"))
