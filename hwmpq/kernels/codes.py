"""Loading and storing tensor elements in their encodings, inside a kernel.

Codes and bit patterns are those of `hwmpq.formats`; `memory_dtype` is how they lie in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.storage import is_integer

#: The fp32 scalars of one tensor's quantizer: scale, zero point, reciprocal of the scale; of an
#: operand also the ratio of its scale to the result's.
SCALE, ZERO, INVERSE, RATIO, QUANTIZER = 0, 1, 2, 3, 4


def memory_dtype(encoding: str) -> str:
    """numpy/TIR dtype of one stored element."""
    if encoding == "fp32":
        return "float32"
    if encoding in ("bf16", "fp16"):
        return "uint16"
    return "int8" if encoding.startswith("s") else "uint8"


def to_f32(ir: IR, value: Expr, encoding: str, lanes: int) -> Expr:
    """The element as fp32: the value of a float encoding, the bare code of an integer one."""
    if encoding == "fp32":
        return value
    if encoding == "bf16":
        wide = ir.cast(value, "uint32", lanes)
        return ir.reinterpret(wide << ir.const(16, "uint32", lanes), "float32", lanes)
    if encoding == "fp16":
        return ir.cast(ir.reinterpret(value, "float16", lanes), "float32", lanes)
    if encoding in ("e4m3", "e5m2"):
        return _small_float(ir, value, encoding, lanes)
    if is_integer(encoding):
        return ir.cast(ir.cast(value, "int32", lanes), "float32", lanes)
    raise ValueError(f"no kernel reads activations in {encoding}")


def activation(ir: IR, value: Expr, encoding: str, dtype: str, offset: int, lanes: int) -> Expr:
    """An activation as a micro-kernel multiplies it; offset: see `Micro.offset`."""
    if dtype == "float32":
        return to_f32(ir, value, encoding, lanes)
    if offset:  # less 128, in two's complement
        return ir.reinterpret(value ^ ir.const(offset, "uint8", lanes), dtype, lanes)
    return value if memory_dtype(encoding) == dtype else ir.cast(value, dtype, lanes)


def _small_float(ir: IR, value: Expr, encoding: str, lanes: int) -> Expr:
    """Its fields moved to where fp16 has them; e4m3's exponent bias is smaller by 8 (OCP 8-bit
    floating point specification, table 1; its one NaN is no weight)."""
    wide = ir.cast(value, "uint16", lanes)

    def u(number: int) -> Expr:
        return ir.const(number, "uint16", lanes)

    if encoding == "e5m2":
        return to_f32(ir, wide << u(8), "fp16", lanes)
    half = ((wide & u(0x80)) << u(8)) | ((wide & u(0x7F)) << u(7))
    return to_f32(ir, half, "fp16", lanes) * ir.const(256.0, "float32", lanes)


def from_f32(ir: IR, value: Expr, encoding: str, lanes: int) -> Expr:
    """What is stored for an fp32 value; for an integer encoding the value is the exact code."""
    if encoding == "fp32":
        return value
    if encoding == "bf16":
        return _bf16(ir, value, lanes)
    if encoding == "fp16":
        top = ir.const(65504.0, "float32", lanes)
        bounded = ir.maximum(ir.minimum(value, top), ir.const(-65504.0, "float32", lanes))
        return ir.reinterpret(ir.cast(bounded, "float16", lanes), "uint16", lanes)
    if is_integer(encoding):
        return ir.cast(ir.cast(value, "int32", lanes), memory_dtype(encoding), lanes)
    raise ValueError(f"no kernel writes activations in {encoding}")


def _bf16(ir: IR, value: Expr, lanes: int) -> Expr:
    """Round half to even on the bit pattern; overflow saturates as `formats` says."""
    top = ir.const(3.3895313892515355e38, "float32", lanes)
    bounded = ir.maximum(ir.minimum(value, top), ir.const(-3.3895313892515355e38, "float32", lanes))
    bits = ir.let(ir.reinterpret(bounded, "uint32", lanes))

    def u(number: int) -> Expr:
        return ir.const(number, "uint32", lanes)

    even = (bits >> u(16)) & u(1)
    return ir.cast((bits + u(0x7FFF) + even) >> u(16), "uint16", lanes)


def quantize(
    ir: IR, value: Expr, q: Buffer, encoding: str, lanes: int, bounds: tuple[int, int]
) -> Expr:
    """fp32 value -> fp32-held code: clamp(rint(value · inverse) + zero)."""

    def s(index: int) -> Expr:
        return ir.broadcast(ir.load(q, index), lanes)

    code = ir.rint(value * s(INVERSE), lanes) + s(ZERO)
    low, high = (ir.const(b, "float32", lanes) for b in bounds)
    return ir.maximum(ir.minimum(code, high), low)


def packed(ir: IR, steps: Sequence[Expr], zero: Expr, low: Expr, dtype: str) -> Expr:
    """AVX2: bytes of up to four vectors of eight fp32 numbers, in order; with fewer, repeated.

    A code is low at least and s8/u8(s16(rint(step)) + zero): converting to int32 rounds, packing
    clamps. A step below the range of int32 is converted to its least number, so it too ends at
    low; none may lie above the largest code less zero. zero: int16; low: of dtype, which is int8 or
    uint8. Sources: Intel Intrinsics Guide, _mm256_cvtps_epi32, _mm256_packs_epi32,
    _mm256_packus_epi16, _mm256_packs_epi16.
    """
    rounded = [
        ir.let(ir.intrinsic("llvm.x86.avx.cvt.ps2dq.256", "int32x8", step)) for step in steps
    ]
    a, b, c, d = (rounded * 4)[:4]
    halves = [
        ir.intrinsic("llvm.x86.avx2.packssdw", "int16x16", *two) + ir.broadcast(zero, 16)
        for two in ((a, b), (c, d))
    ]
    pack = "llvm.x86.avx2.packuswb" if dtype == "uint8" else "llvm.x86.avx2.packsswb"
    codes = ir.maximum(ir.intrinsic(pack, f"{dtype}x32", *halves), ir.broadcast(low, 32))
    # both packings work within halves of a register: words are those of a b c d a b c d
    words = ir.let(ir.reinterpret(codes, "int32", 8))
    return ir.reinterpret(ir.shuffle(words, [0, 4, 1, 5, 2, 6, 3, 7]), dtype, 32)


def dequantize(ir: IR, code: Expr, q: Buffer, lanes: int) -> Expr:
    """fp32-held code -> fp32 value: (code − zero) · scale."""
    zero, scale = (ir.broadcast(ir.load(q, i), lanes) for i in (ZERO, SCALE))
    return (code - zero) * scale
