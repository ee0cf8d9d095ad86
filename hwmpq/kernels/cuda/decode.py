"""How weights lie for the threads of a warp, and what decodes them in registers.

A block is 8 output channels × 64 bytes of the reduction as it is multiplied: thread 4·g + t holds
four words of channel g, as `mma.sync` takes them (PTX ISA, fragments of matrix b of m16n8k16 and
m16n8k32). Narrow codes of these 16 bytes take fewer, in the order that `common.cuh` undoes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.kernels.cuda.ir import CudaIR
from hwmpq.kernels.decode import Decoder
from hwmpq.kernels.ir import IR, Address, Buffer, Expr

Codes = NDArray[Any]
#: Bytes of the reduction that a block covers, and bytes of it that a thread holds.
LINE, WORDS = 64, 16


def _bytes(codes: Codes) -> Codes:
    return np.ascontiguousarray(codes).view(np.uint8).reshape(-1)


def _joined(order: Callable[[int], tuple[int, int]], bits: int) -> Callable[[Codes], Codes]:
    """pack of codes narrower than a byte: element i of a thread -> (byte, lowest bit)."""

    def pack(codes: Codes) -> Codes:
        threads = codes.reshape(-1, codes.shape[-1]).astype(np.uint8) & ((1 << bits) - 1)
        packed = np.zeros((len(threads), codes.shape[-1] * bits // 8), np.uint8)
        for i in range(codes.shape[-1]):
            byte, low = order(i)
            packed[:, byte] |= threads[:, i] << low
        return packed.reshape(-1)

    return pack


def _bytes_of_words(codes: Codes) -> Codes:
    """Eight bytes of a thread, such that each word gives two pairs: 0 2 1 3, 4 6 5 7."""
    return _bytes(codes.astype(np.int8).reshape(-1, 8)[:, [0, 2, 1, 3, 4, 6, 5, 7]])


def _call(name: str) -> Callable[[IR, Buffer, Expr, Buffer, Expr, int], None]:
    def expand(ir: IR, src: Buffer, src_at: Expr, dst: Buffer, dst_at: Expr, width: int) -> None:
        assert isinstance(ir, CudaIR)
        ir.device(name, Address(dst, dst_at), Address(src, src_at))

    return expand


def _row(
    encoding: str, dtype: str, held: int, pack: Callable[[Codes], Codes], name: str
) -> Decoder:
    """held: bytes that a thread's codes take; a block has as many rows of a warp's 32."""
    identity = held == WORDS
    return Decoder(encoding, dtype, 1, held, "uint8", pack, _call(name), identity)


_ROWS = (
    *(
        _row(e, e, WORDS, _bytes, "decode_word")
        for e in ("fp32", "fp16", "bf16", "s8", "e4m3", "e5m2")
    ),
    _row(
        "s4", "s8", 8,
        _joined(lambda i: (i // 8 * 4 + i % 4, i // 4 % 2 * 4), 4), "decode_s4_int8",
    ),
    _row("s2", "s8", 4, _joined(lambda i: (i % 4, i // 4 * 2), 2), "decode_s2_int8"),
    *(
        row
        for to in ("fp16", "bf16")
        for row in (
            _row("s8", to, 8, _bytes_of_words, f"decode_s8_{to}"),
            _row(
                "s4", to, 4,
                _joined(lambda i: (i % 2 * 2 + i // 4, i // 2 % 2 * 4), 4), f"decode_s4_{to}",
            ),
        )
    ),
)  # fmt: skip
_DECODERS = {(row.encoding, row.dtype): row for row in _ROWS}


def decoder(encoding: str, multiplied: str) -> Decoder | None:
    """From a weight encoding to the one that is multiplied, or None."""
    return _DECODERS.get((encoding, multiplied))
