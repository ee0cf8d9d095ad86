"""The one epilogue emitter: from an accumulator vector to the stored elements.

Emits exactly `hwmpq.requantize.apply`; a test compares them bit by bit for every combination.
A product that a sum follows is fenced: two roundings, as there.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmpq.kernels.codes import from_f32, memory_dtype, to_f32
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.requantize import HI, INV_OUT, LO, M_RES, Z_OUT, Z_RES
from hwmpq.storage import is_integer


@dataclass(frozen=True)
class EpilogueEmitter:
    """multiplier, bias: [padded channels]; scalars: fp32; residual and out are flat tensors.

    integer: the accumulators are int32. scaled: a float accumulator is multiplied as well
    (attention's 1/√d). residual: encoding, '' = none.
    """

    integer: bool
    out: str
    residual: str
    scaled: bool
    multiplier: Buffer
    bias: Buffer
    scalars: Buffer
    out_buffer: Buffer
    residual_buffer: Buffer | None

    def store(self, ir: IR, acc: Expr, channel: Expr, at: Expr, lanes: int, valid: int) -> None:
        """Finish `lanes` channels from `channel` on and store the first `valid` at out[at]."""
        residual = None
        if self.residual:
            residual = self._residual(ir, at, lanes, valid)
        y = from_f32(ir, self._value(ir, acc, channel, residual, lanes), self.out, lanes)
        if valid == lanes:
            ir.store(self.out_buffer, at, y, lanes)
            return
        part = ir.local(lanes, memory_dtype(self.out))
        ir.store(part, 0, y, lanes)
        for lane in range(valid):
            ir.store(self.out_buffer, at + lane, ir.load(part, lane))

    def _residual(self, ir: IR, at: Expr, lanes: int, valid: int) -> Expr:
        buffer = self.residual_buffer
        if valid == lanes:
            raw = ir.load(buffer, at, lanes)
        else:
            part = ir.local(lanes, memory_dtype(self.residual))
            ir.store(part, 0, ir.const(0, memory_dtype(self.residual), lanes), lanes)
            for lane in range(valid):
                ir.store(part, lane, ir.load(buffer, at + lane))
            raw = ir.load(part, 0, lanes)
        return to_f32(ir, raw, self.residual, lanes)

    def _value(self, ir: IR, acc: Expr, channel: Expr, residual: Expr, lanes: int) -> Expr:
        def s(index: int) -> Expr:
            return ir.broadcast(ir.load(self.scalars, index), lanes)

        bias = ir.load(self.bias, channel, lanes)
        to_code = is_integer(self.out)
        if self.integer:
            y = ir.cast(acc + bias, "float32", lanes) * ir.load(self.multiplier, channel, lanes)
            if to_code:
                q = ir.rint(y, lanes)
                if residual is not None:
                    q = q + ir.rint(self._residual_steps(s, residual), lanes)
                return self._clamp(ir, q + s(Z_OUT), s)
            y = ir.fence(y, lanes)
        elif self.scaled:
            y = ir.fence(acc * ir.load(self.multiplier, channel, lanes), lanes) + bias
        else:
            y = acc + bias
        if residual is not None:
            if is_integer(self.residual):
                residual = ir.fence((residual - s(Z_RES)) * s(M_RES), lanes)
            y = y + residual
        if to_code:
            return self._clamp(ir, ir.rint(y * s(INV_OUT), lanes) + s(Z_OUT), s)
        return self._clamp(ir, y, s)

    def _residual_steps(self, s: object, residual: Expr) -> Expr:
        """The residual in steps of the result: one fp32 product."""
        assert callable(s)
        if is_integer(self.residual):
            return (residual - s(Z_RES)) * s(M_RES)
        return residual * s(INV_OUT)

    def _clamp(self, ir: IR, value: Expr, s: object) -> Expr:
        assert callable(s)
        return ir.maximum(ir.minimum(value, s(HI)), s(LO))
