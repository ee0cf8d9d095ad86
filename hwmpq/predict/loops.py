"""Nominal cycles of what the loops of a kernel do, counted as the nests emit them."""

from __future__ import annotations

from collections.abc import Mapping

from hwmpq.kernels import Call, Kernel
from hwmpq.kernels.nests.depthwise import columns
from hwmpq.kernels.nests.gemm import Packing, blocks, pixels_of
from hwmpq.kernels.nests.image import Geometry

#: Cycles to begin a block, for each of its pixels, and for each of these at every tap.
_BEGIN, _PIXEL, _TAP = 10.0, 4.0, 1.0
#: Cycles of the epilogue of a vector by the encoding of the result, of a residual of it, and of an
#: activation function that is computed or looked up.
_STORE = {"fp32": 2.0, "bf16": 7.0, "fp16": 7.0}
_CODES, _RESIDUAL, _CURVE = 3.5, 3.0, 20.0
_CURVES = frozenset(("gelu", "silu", "hardswish"))
#: Cycles of a vector of a depthwise kernel: to load one of floats; of codes, which are spread over
#: the register; and a dot of codes.
_LOAD, _SPREAD, _DOT = 1.0, 1.4, 0.35
#: Cycles of a vector that is copied.
_COPY = 2.0


def gemm_loops(call: Call, kernel: Kernel, g: Geometry) -> Mapping[str, float]:
    """Of an implicit GEMM (nests/gemm.py): 'compute' or 'crowded', 'block', 'epilogue', 'tail'."""
    schedule, micro, fmt = kernel.schedule(call), kernel.micro, call.format
    packing, pixels = Packing.of(g, micro, kernel.decoder.unit), pixels_of(call.workload)
    rows = min(schedule.rows, pixels)
    runs = -(-pixels // rows) * (g.groups if call.workload.has_weight else g.n)
    beside = blocks(packing.vectors, schedule.vectors)
    steps = sum(n * micro.cycles(rows, v, fmt) for n, v in beside) * packing.steps * micro.kstep
    run, taps = micro.run_length(fmt), len(g.taps)
    if run:  # a segment ends with sums to widen, however short its last run is
        widened = taps * -(-packing.per_segment // run)
        steps += rows * packing.vectors * (widened - packing.steps / run)
    several, rest = len(beside) > 1 or beside[0][0] > 1, g.gout % micro.lanes
    crowded = schedule.order == "rows" and several and rest > 0
    begun = sum(n for n, _ in beside) * (_BEGIN + rows * (_PIXEL + taps * _TAP))
    return {
        "compute": 0.0 if crowded else runs * steps,
        "crowded": runs * steps if crowded else 0.0,
        "block": runs * begun,
        "epilogue": runs * rows * packing.vectors * _epilogue(call),
        "tail": float(runs * rows * rest * (2 if call.residual else 1)),
    }


def depthwise_loops(call: Call, kernel: Kernel, g: Geometry) -> Mapping[str, float]:
    """Of a depthwise convolution (nests/depthwise.py): as `gemm_loops`."""
    schedule, micro = kernel.schedule(call), kernel.micro
    oh, ow = g.out
    lines = g.n * oh * -(-g.cout // micro.lanes)
    groups = blocks(ow, min(schedule.rows, ow))
    loads = g.kh * sum(n * len(columns(g, pixels)) for n, pixels in groups)
    weights = -(-g.kh // micro.kstep) * g.kw * sum(n for n, _ in groups)
    dots = -(-g.kh // micro.kstep) * g.kw * ow
    floats = micro.acc_dtype == "float32"
    one = _LOAD * (loads + weights) if floats else _SPREAD * loads + _DOT * dots
    return {
        "compute": lines * one,
        "crowded": 0.0,
        "block": lines * sum(n for n, _ in groups) * _BEGIN,
        "epilogue": lines * ow * _epilogue(call),
        "tail": float(g.n * oh * ow * (g.cout % micro.lanes) * (2 if call.residual else 1)),
    }


def copy_cycles(g: Geometry, lanes: int) -> float:
    """To copy the input into a scratch image, row by row: whole vectors, then single elements."""
    vectors, rest = divmod(g.w * g.cin, lanes)
    return float(g.n * g.h * (_COPY * vectors + rest))


def _epilogue(call: Call) -> float:
    """Cycles of a vector."""
    curve = bool(_CURVES & set(call.workload.epilogue.split("+")))
    residual = _RESIDUAL if call.residual else 0.0
    return _STORE.get(call.out, _CODES) + residual + (_CURVE if curve else 0.0)
