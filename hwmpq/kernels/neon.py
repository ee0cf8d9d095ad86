"""What NEON does better by instructions of its own than by what LLVM makes of plain vectors."""

from __future__ import annotations

from collections.abc import Sequence

from hwmpq.kernels.ir import IR, Expr

_QUAD = 4


def packed(ir: IR, steps: Sequence[Expr], lanes: int, zero: Expr, low: Expr, high: Expr) -> Expr:
    """Unsigned bytes of up to sixteen fp32 numbers, in order; with fewer, some are repeated.

    A code is clamp(rint(step) + zero): converting to int32 rounds, and each narrowing saturates,
    far beyond what a byte holds. lanes: of one of the steps, 4 or 8; zero: int16; low, high: uint8.
    Source: Arm Architecture Reference Manual for A-profile, FCVTNS, SQXTN, SQADD, SQXTUN.
    """
    rounded = [
        ir.let(ir.intrinsic("llvm.aarch64.neon.fcvtns.v4i32.v4f32", "int32x4", quad))
        for step in steps
        for quad in _quads(ir, step, lanes)
    ]
    narrow = [
        ir.intrinsic("llvm.aarch64.neon.sqxtn.v4i16", "int16x4", quad) for quad in (rounded * 4)[:4]
    ]
    zeros = ir.broadcast(zero, 2 * _QUAD)
    halves = [
        ir.intrinsic("llvm.aarch64.neon.sqadd.v8i16", "int16x8", ir.concatenate(two, _QUAD), zeros)
        for two in (narrow[:2], narrow[2:])
    ]
    parts = [ir.intrinsic("llvm.aarch64.neon.sqxtun.v8i8", "uint8x8", half) for half in halves]
    codes = ir.concatenate(parts, 2 * _QUAD)
    width = 4 * _QUAD
    return ir.minimum(ir.maximum(codes, ir.broadcast(low, width)), ir.broadcast(high, width))


def clamped(ir: IR, value: Expr, low: Expr, high: Expr, lanes: int) -> Expr:
    """fp32 numbers between two others; what is no number becomes `high`, as a comparison has it."""
    dtype = "float32" if lanes == 1 else f"float32x{lanes}"
    below = ir.intrinsic("llvm.minnum", dtype, value, high)
    return ir.intrinsic("llvm.maxnum", dtype, below, low)


def _quads(ir: IR, step: Expr, lanes: int) -> list[Expr]:
    """Registers of four numbers."""
    if lanes == _QUAD:
        return [step]
    wide = ir.let(step)
    return [ir.shuffle(wide, list(range(i, i + _QUAD))) for i in range(0, lanes, _QUAD)]
