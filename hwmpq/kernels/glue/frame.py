"""The arguments of a glue kernel, and reading and writing their elements as fp32 values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hwmpq.formats import encoding_named
from hwmpq.kernels.codes import (
    INVERSE,
    QUANTIZER,
    ZERO,
    dequantize,
    from_f32,
    memory_dtype,
    packed,
    quantize,
    to_f32,
)
from hwmpq.kernels.glue.call import GlueCall
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.storage import is_integer


@dataclass(frozen=True)
class Frame:
    """quantizers: of every input, then of the result; params: fp32, by role."""

    ir: IR
    call: GlueCall
    inputs: tuple[Buffer, ...]
    quantizers: tuple[Buffer, ...]
    params: dict[str, Buffer]
    out: Buffer

    @staticmethod
    def of(ir: IR, call: GlueCall) -> Frame:
        """Declare the arguments: inputs, quantizers, params, out."""
        inputs = [
            ir.arg(f"x{i}", x.size, memory_dtype(x.encoding)) for i, x in enumerate(call.inputs)
        ]
        names = [f"q{i}" for i in range(len(call.inputs))] + ["q"]
        quantizers = [ir.arg(name, QUANTIZER, "float32") for name in names]
        params = {role: ir.arg(role, call.role_size(role), "float32") for role in call.roles}
        out = ir.arg("out", call.out.size, memory_dtype(call.out.encoding))
        return Frame(ir, call, tuple(inputs), tuple(quantizers), params, out)

    @property
    def lanes(self) -> int:
        """fp32 lanes of a register."""
        return self.call.vector_bytes // 4

    @property
    def wide(self) -> int:
        """fp32 lanes of four registers: they need not wait for each other, and codes of four are
        packed together. A thread of a grid has one."""
        return 1 if self.call.grid else 4 * self.lanes

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code of the result."""
        encoding = encoding_named(self.call.out.encoding)
        return int(encoding.qmin), int(encoding.qmax)

    def fetch(self, buffer: Buffer, at: Expr, lanes: int, stride: int = 1) -> Expr:
        """Stored elements; a stride of 0 repeats one element."""
        if stride == 0:
            return self.ir.broadcast(self.ir.load(buffer, at), lanes)
        return self.ir.load(buffer, at, lanes, stride)

    def decode(self, index: int, raw: Expr, lanes: int) -> Expr:
        """Stored elements of input `index` -> fp32 values."""
        encoding = self.call.inputs[index].encoding
        number = to_f32(self.ir, raw, encoding, lanes)
        if not is_integer(encoding):
            return number
        return self.ir.fence(dequantize(self.ir, number, self.quantizers[index], lanes), lanes)

    def value(self, index: int, at: Expr, lanes: int, stride: int = 1) -> Expr:
        """fp32 values of input `index`."""
        if stride == 0:
            return self.ir.broadcast(self.value(index, at, 1), lanes)
        return self.decode(index, self.fetch(self.inputs[index], at, lanes, stride), lanes)

    def encode(self, value: Expr, lanes: int) -> Expr:
        """fp32 values -> what is stored of the result."""
        ir, out = self.ir, self.call.out.encoding
        if not is_integer(out):
            return from_f32(ir, value, out, lanes)
        if self.call.avx2 and lanes >= 8:
            return self.packed(value * ir.broadcast(self.scalar(INVERSE), lanes), lanes)
        value = quantize(ir, value, self.quantizers[-1], out, lanes, self.bounds)
        return from_f32(ir, value, out, lanes)

    def packed(self, steps: Expr, lanes: int) -> Expr:
        """The result's codes of fp32 numbers, not yet rounded, in its steps from the zero point on:
        `codes.packed`, 32 at once."""
        ir, (low, high) = self.ir, self.bounds
        dtype, zero = memory_dtype(self.call.out.encoding), self.scalar(ZERO)
        top = ir.broadcast(ir.const(high, "float32") - zero, lanes)
        steps = ir.let(ir.minimum(steps, top))
        eights = [ir.shuffle(steps, list(range(i, i + 8))) for i in range(0, lanes, 8)]
        codes = [
            packed(ir, eights[i : i + 4], ir.cast(zero, "int16"), ir.const(low, dtype), dtype)
            for i in range(0, len(eights), 4)
        ]
        if lanes < 32:
            return ir.shuffle(codes[0], list(range(lanes)))
        return ir.concatenate([ir.let(c) for c in codes], 32)

    def put(self, at: Expr, value: Expr, lanes: int, stride: int = 1) -> None:
        """Store fp32 values as the result's elements."""
        self.ir.store(self.out, at, self.encode(value, lanes), lanes, stride)

    def scalar(self, index: int) -> Expr:
        """A scalar of the result's quantizer."""
        return self.ir.load(self.quantizers[-1], index)


def dtype_lanes(call: GlueCall, dtype: Any) -> int:
    """Lanes of a register of stored elements; a thread of a grid has one element."""
    if call.grid:
        return 1
    bits = {"float32": 32, "uint16": 16, "uint8": 8, "int8": 8}[dtype]
    return call.vector_bytes * 8 // bits
