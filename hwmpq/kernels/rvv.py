"""What RISC-V vectors do by an instruction of their own, and not by what LLVM makes of a cast."""

from __future__ import annotations

from hwmpq.kernels.ir import IR, Expr


def rounded(ir: IR, value: Expr, lanes: int) -> Expr:
    """fp32 numbers -> the nearest int32, half to even, in the rounding mode that programs begin
    with (VFCVT.X.F.V).

    A cast truncates (VFCVT.RTZ.X.F.V): QEMU 7.2 fails at two of those in a row by an assertion of
    its own (`decode_save_opc`). Source: RISC-V Vector Extension 1.0, section 13.17.
    """
    return ir.intrinsic(f"llvm.lrint.v{lanes}i32.v{lanes}f32", f"int32x{lanes}", value)
