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
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.errors import InputError
from hwmpq.measure.environment import l2_bytes
from hwmpq.measure.protocol import Cell

MAX_COPIES = 64
MAX_ROTATED_BYTES = 64 << 20
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BOOL": "bool"}
_DTYPES |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
_DTYPES |= {f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)}
_DTYPES |= {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
#: Outputs are filled with this byte before the check: far from 0 in every format, not a NaN.
_POISON = 0x7B

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

    def __init__(self, module: Any, function: str, arrays: list[NDArray[Any]], weights: list[int]):
        import tvm

        if not function.isidentifier():
            raise InputError("not a function name", repr(function))
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
        self._module = _compile(_loop_source(function, len(arrays)))
        self._module.import_module(module)
        self._loop = self._module["rotate"]
        self._next = 0

    def run(self, count: int) -> float:
        """Seconds that `count` calls take, going on with the copy after the last one used."""
        start, self._next = self._next, (self._next + count) % self.copies
        began = time.perf_counter()
        self._loop(self._table, start, count)
        return time.perf_counter() - began


def load_kernel(cell: Cell) -> Kernel:
    """Load the library and allocate the arguments; nothing has run yet.

    Raises InputError when files and roles do not fit together.
    """
    import tvm

    tensors = read_tensors(cell.args)
    arrays = [tensors[str(i)] for i in range(len(tensors)) if str(i) in tensors]
    if len(arrays) != len(tensors) or len(arrays) != len(cell.roles):
        raise InputError(f"arguments of {cell.key}", sorted(tensors), [*map(str, cell.roles)])
    for index, role in enumerate(cell.roles):
        if role == "output":
            poison = np.full(arrays[index].nbytes, _POISON, dtype=np.uint8)
            arrays[index] = poison.view(arrays[index].dtype).reshape(arrays[index].shape)
    weights = [i for i, role in enumerate(cell.roles) if role == "weight"]
    return Kernel(tvm.runtime.load_module(cell.library), cell.function, arrays, weights)


def check_kernel(kernel: Kernel, cell: Cell) -> None:
    """Run once and compare with the expected outputs. Raises WrongNumbers."""
    kernel.run(1)
    for name, expected in read_tensors(cell.expected).items() if cell.expected else ():
        got = kernel.rows[0][int(name)].numpy()
        reason = difference(got, expected, cell.atol, cell.rtol)
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


def plan_copies(weight_bytes: int, l2: int) -> tuple[int, bool]:
    """How many copies of the weights to rotate, and whether they exceed twice the L2 cache."""
    if weight_bytes == 0:
        return 1, False
    wanted = math.floor(2 * l2 / weight_bytes) + 1
    copies = max(1, min(wanted, MAX_COPIES, MAX_ROTATED_BYTES // weight_bytes))
    return copies, copies * weight_bytes > 2 * l2


@functools.cache
def call_overhead_s() -> float:
    """Seconds per call that the inner loop spends on an empty kernel of three arguments."""
    one = np.ones(1, dtype=np.int8)
    empty = Kernel(_compile(_EMPTY), "main", [one, one, one], [])
    empty.run(1000)
    return min(empty.run(10_000) for _ in range(5)) / 10_000


def read_tensors(path: str | Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file, bf16 and fp8 as ml_dtypes, which its own reader lacks.

    Raises InputError for another kind of file. Source: the format section of safetensors' README.
    """
    import ml_dtypes

    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        tensors = {}
        for name, view in header.items():
            word = _DTYPES[view["dtype"]]
            dtype = np.dtype(getattr(ml_dtypes, word, None) or word)
            begin, end = view["data_offsets"]
            flat = np.frombuffer(data[start + begin : start + end], dtype=dtype)
            tensors[name] = flat.reshape(view["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"not a safetensors file: {path}", repr(error)) from None
    return tensors


def _loop_source(function: str, nargs: int) -> str:
    arguments = ", ".join(_ARGUMENT.format(index=index) for index in range(nargs))
    return _LOOP.format(nargs=nargs, function=function, arguments=arguments)


def _compile(source: str) -> Any:
    """Compile a TVMScript function for this CPU and return the runtime module."""
    import tvm

    function = tvm.script.from_source(source)
    module = tvm.IRModule({function.attrs["global_symbol"]: function})
    return tvm.compile(module, target=tvm.target.Target({"kind": "llvm"})).jit()


def _address(capsule: object) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(get(capsule, b"dltensor"))
