"""Narrow weights with 16-bit float activations: the weight is decoded before a float multiply."""

from __future__ import annotations

from hwmpq.formats.floating import BF16, E4M3, E5M2, FP16
from hwmpq.formats.format import Format
from hwmpq.formats.integer import WIDTHS, signed

FORMATS = (
    *(Format(f"w{bits}.{a.name}", signed(bits), a) for bits in WIDTHS for a in (BF16, FP16)),
    Format("e4m3.bf16", E4M3, BF16),
    Format("e4m3.fp16", E4M3, FP16),
    Format("e5m2.bf16", E5M2, BF16),
)
