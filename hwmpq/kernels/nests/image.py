"""The image a convolution reads: its sizes, and the copy that is made where it needs one.

The copy is a padded scratch image. It is made when there is padding (filled with the zero point),
when the micro-kernel wants another dtype (u8 as int16, bf16 as fp32), or when the last step of a
segment would read past the buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.kernels.codes import activation, memory_dtype
from hwmpq.kernels.ir import IR, Buffer, Expr
from hwmpq.kernels.micro import BYTES
from hwmpq.kernels.nests import Buffers
from hwmpq.requantize import Z_IN
from hwmpq.types import Workload

#: Readable elements behind the end of the copy.
_SLACK = 64


@dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution as the loops see it; one image when `flat` (1 × 1, stride 1)."""

    n: int
    h: int
    w: int
    cin: int
    cout: int
    kh: int
    kw: int
    sh: int
    sw: int
    pt: int
    pl: int
    pb: int
    pr: int
    dh: int
    dw: int
    groups: int

    @staticmethod
    def of(work: Workload) -> Geometry:
        if work.op == "linear":
            return Geometry(1, 1, work["m"], work["k"], work["n"], 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1)
        if work.op == "matmul":  # every image has weights of its own
            return Geometry(
                work["b"], 1, work["m"], work["k"], work["n"], 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1
            )
        g = Geometry(**dict(work.dims))
        plain = g.kh == g.kw == g.sh == g.sw == 1 and not any((g.pt, g.pl, g.pb, g.pr))
        if plain:
            return Geometry(
                1, 1, g.n * g.h * g.w, g.cin, g.cout, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, g.groups
            )
        return g

    @property
    def padded(self) -> tuple[int, int]:
        return self.h + self.pt + self.pb, self.w + self.pl + self.pr

    @property
    def out(self) -> tuple[int, int]:
        h, w = self.padded
        return (
            (h - self.dh * (self.kh - 1) - 1) // self.sh + 1,
            (w - self.dw * (self.kw - 1) - 1) // self.sw + 1,
        )

    def channels(self, lanes: int) -> int:
        """Output channels when those of every group fill whole vectors."""
        return self.groups * -(-self.gout // lanes) * lanes

    def spread(self, values: NDArray[Any], lanes: int) -> NDArray[Any]:
        """One value per output channel at the places of `channels`, zeros between."""
        found = np.zeros((self.groups, self.channels(lanes) // self.groups), values.dtype)
        found[:, : self.gout] = values.reshape(self.groups, self.gout)
        return found.reshape(-1)

    @property
    def merged(self) -> bool:
        """A whole kernel row is contiguous."""
        return self.dw == 1 and self.groups == 1

    @property
    def taps(self) -> list[tuple[int, int]]:
        """(row, column) offset of every segment."""
        if self.merged:
            return [(i * self.dh, 0) for i in range(self.kh)]
        return [(i * self.dh, j * self.dw) for i in range(self.kh) for j in range(self.kw)]

    @property
    def segment(self) -> int:
        return self.kw * self.cin if self.merged else self.cin // self.groups

    @property
    def gout(self) -> int:
        return self.cout // self.groups


def copy_padded(
    ir: IR, g: Geometry, bufs: Buffers, x: str, dtype: str, vector_bytes: int, force: bool,
    offset: int = 0,
) -> Buffer:  # fmt: skip
    """The input with its padding, in `dtype`; the input itself where nothing has to change.

    x: its encoding. force: copy anyway, for the readable elements behind the end. offset: taken off
    every code.
    """
    height, width = g.padded
    if memory_dtype(x) == dtype and not force and (height, width) == (g.h, g.w):
        return bufs.x
    slack = _SLACK + g.pl * g.cin
    scratch = ir.scratch(g.n * height * width * g.cin + slack, dtype)
    zero = ir.load(bufs.scalars, Z_IN)
    zero = ir.let(ir.cast(zero - ir.const(offset, "float32") if offset else zero, dtype))
    row = width * g.cin
    with ir.loop(g.n) as image:
        at = image * height * row
        ir.fill(scratch, at, g.pt * row + g.pl * g.cin, zero, dtype)
        with ir.loop(g.h) as y:
            inside = at + (g.pt + y) * row + g.pl * g.cin
            source = (image * g.h + y) * g.w * g.cin
            _copy(ir, bufs.x, x, source, scratch, dtype, inside, g.w * g.cin, vector_bytes, offset)
            # the right margin of this row and the left one of the next are neighbours
            ir.fill(scratch, inside + g.w * g.cin, (g.pl + g.pr) * g.cin, zero, dtype)
        below = at + (g.pt + g.h) * row + g.pl * g.cin
        ir.fill(scratch, below, max(g.pb * row - g.pl * g.cin, 0), zero, dtype)
    ir.fill(scratch, g.n * height * row, slack, zero, dtype)
    return scratch


def _copy(
    ir: IR, src: Buffer, encoding: str, start: Expr, dst: Buffer, dtype: str, to: Expr, size: int,
    vector_bytes: int, offset: int,
) -> None:  # fmt: skip
    for at, n in ir.vectors(0, size, vector_bytes // BYTES[dtype]):
        value = activation(ir, ir.load(src, start + at, n), encoding, dtype, offset, n)
        ir.store(dst, to + at, value, n)
