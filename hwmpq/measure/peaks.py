"""What this machine can do at most: multiplies per second of the kernels' own instructions, and
bytes per second from every level of its caches. One core; the roof of a roofline.

Both are measured by tiny kernels built from the same micro-kernels that the layers use, on data
that stays where it is meant to lie. The fastest of many epochs counts: nothing can be faster than
the machine, and all that disturbs makes it slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.formats import Format
from hwmpq.kernels.build import library
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.kernels.micro import Micro
from hwmpq.measure.environment import hardware
from hwmpq.measure.gates import machine_lock, pinned
from hwmpq.measure.timing import Calls
from hwmpq.targets import Target

#: Seconds of searching for the fastest epoch, and the fewest epochs.
_SEARCH_S, _EPOCHS = 0.3, 15
#: About how long an epoch is: much shorter than a slice of the scheduler, so that some are whole.
_EPOCH_S = 0.0005
#: Rows and vectors of the register block: one that every kernel may have, and keeps units busy.
_BLOCK = (4, 2)
#: Steps of the reduction: enough that LLVM keeps the loop, few enough for half of any L1.
_STEPS = 128
#: How often a call walks through its operands, and bytes that a call reads at least: both make a
#: call some 100 µs long, beside which calling it is nothing.
_TIMES, _READ_BYTES = 1000, 16 << 20
#: Links of the chain that the clock is read from.
_CHAIN = 100_000
#: Independent sums of the reading loop, each a vector wide.
_SUMS = 8


@dataclass(frozen=True)
class Level:
    """A place that data can lie in: bytes that were walked through, bytes per second read."""

    name: str
    nbytes: int
    bytes_per_s: float


def peak_macs_per_s(micro: Micro, fmt: Format, target: Target) -> float:
    """Multiply-accumulates per second of a micro-kernel with its operands in L1."""
    rows, vectors = _BLOCK
    width = micro.lanes * micro.kstep
    arrays = [
        np.ones(rows * micro.kstep * _STEPS, micro.a_dtype),
        np.ones(vectors * width * _STEPS, micro.w_dtype),
        np.zeros(rows * vectors * micro.lanes, micro.acc_dtype),
    ]
    run = max(micro.run_length(fmt), 1)
    walked = _STEPS // run * run
    seconds = _best_s(_multiplying(micro, run), arrays, target)
    return rows * vectors * width * walked * _TIMES / seconds


def read_bandwidths(target: Target) -> tuple[Level, ...]:
    """Bytes per second that one core reads from each cache and from memory, nearest first."""
    caches = hardware()["caches"]
    sizes = {name: caches[name] // 2 for name in ("L1", "L2", "L3") if name in caches}
    sizes["memory"] = 4 * max(caches.values(), default=16 << 20)
    unit = _SUMS * target.vector_bytes
    levels = []
    for name, wanted in sizes.items():
        nbytes = wanted // unit * unit
        times = max(1, _READ_BYTES // nbytes)
        arrays = [np.ones(nbytes // 4, np.int32), np.zeros(unit // 4, np.int32)]
        seconds = _best_s(_reading(nbytes // 4, target.vector_bytes // 4, times), arrays, target)
        levels.append(Level(name, nbytes, nbytes * times / seconds))
    return tuple(levels)


def clock_hz(target: Target) -> float:
    """Cycles per second under load: an addition and an exclusive or that wait for each other take
    one cycle each on every core with vectors (uops.info; Arm's software optimization guides)."""
    seconds = _best_s(_waiting(), [np.zeros(1, np.int32)], target)
    return 2 * _CHAIN / seconds


def _waiting() -> Any:
    """x[0] = what a chain of sums and exclusive ors of a counter makes of it."""
    ir = IR()
    with ir.function():
        x = ir.arg("x", 1, "int32")
        value = ir.local(1, "int32")
        ir.store(value, 0, ir.load(x, 0))
        with ir.loop(_CHAIN) as i:
            ir.store(value, 0, (ir.load(value, 0) + 1) ^ i)
        ir.store(x, 0, ir.load(value, 0))
    return ir.result()


def _best_s(function: Any, arrays: Sequence[NDArray[Any]], target: Target) -> float:
    """Seconds of a call in the fastest epoch."""
    import tvm

    main = library({"main": function}, target).jit()["main"]
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    calls = Calls(lambda: main(*tensors))
    with machine_lock(), pinned(True):
        once = min(calls.run(1) for _ in range(5))
        count = max(1, round(_EPOCH_S / once))
        epochs = max(_EPOCHS, round(_SEARCH_S / (count * once)))
        return min(calls.run(count) for _ in range(epochs)) / count


def _multiplying(micro: Micro, run: int) -> Any:
    """out[rows, vectors] = the sum over the steps, `_TIMES` over; arguments a, w, out."""
    rows, vectors = _BLOCK
    ir = IR()
    with ir.function():
        a = ir.arg("a", rows * micro.kstep * _STEPS, micro.a_dtype)
        w = ir.arg("w", vectors * micro.lanes * micro.kstep * _STEPS, micro.w_dtype)
        out = ir.arg("out", rows * vectors * micro.lanes, micro.acc_dtype)
        acc = ir.local(rows * vectors * micro.lanes, micro.acc_dtype)
        block = range(0, rows * vectors * micro.lanes, micro.lanes)
        for at in block:
            ir.store(acc, at, ir.const(0, micro.acc_dtype, micro.lanes), micro.lanes)
        with ir.loop(_TIMES), ir.loop(_STEPS // run) as step:
            _multiply(ir, micro, (a, w, acc), step * run, run)
        for at in block:
            ir.store(out, at, ir.load(acc, at, micro.lanes), micro.lanes)
    return ir.result()


def _multiply(
    ir: IR, micro: Micro, buffers: tuple[Buffer, Buffer, Buffer], start: Expr, run: int
) -> None:
    """`run` steps of the block: each a dot, or partial sums that are widened once."""
    a, w, acc = buffers
    rows, vectors = _BLOCK
    width = micro.lanes * micro.kstep
    narrow: dict[int, Expr] = {}
    for k in range(run):
        weights = [
            ir.let(ir.load(w, ((start + k) * vectors + j) * width, width)) for j in range(vectors)
        ]
        for i in range(rows):
            value = ir.let(micro.broadcast(ir, a, ((start + k) * rows + i) * micro.kstep))
            for j, weight in enumerate(weights):
                at = (i * vectors + j) * micro.lanes
                if micro.partial_lanes:
                    product = micro.partial(ir, value, weight)
                    narrow[at] = ir.let(narrow[at] + product if k else product)
                else:
                    total = micro.dot(ir, ir.load(acc, at, micro.lanes), value, weight)
                    ir.store(acc, at, total, micro.lanes)
    for at, partial in narrow.items():
        wide = micro.widen(ir, ir.load(acc, at, micro.lanes), partial)
        ir.store(acc, at, wide, micro.lanes)


def _reading(elements: int, lanes: int, times: int) -> Any:
    """sums[_SUMS] = the sum of every _SUMS-th vector of data, `times` over; int32."""
    ir = IR()
    with ir.function():
        data = ir.arg("data", elements, "int32")
        out = ir.arg("out", _SUMS * lanes, "int32")
        sums = ir.local(_SUMS * lanes, "int32")
        for at in range(0, _SUMS * lanes, lanes):
            ir.store(sums, at, ir.const(0, "int32", lanes), lanes)
        with ir.loop(times), ir.loop(elements // (_SUMS * lanes)) as block:
            for at in range(0, _SUMS * lanes, lanes):
                value = ir.load(data, block * (_SUMS * lanes) + at, lanes)
                ir.store(sums, at, ir.load(sums, at, lanes) + value, lanes)
        for at in range(0, _SUMS * lanes, lanes):
            ir.store(out, at, ir.load(sums, at, lanes), lanes)
    return ir.result()
