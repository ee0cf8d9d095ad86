"""Number formats: the only place where a number is rounded.

An Encoding writes one number in a few bits; a Format pairs the encodings of a layer's weights and
of what it reads. Both take numpy arrays and torch tensors, with equal bits. Names: `fp32 bf16 fp16
e4m3 e5m2 e3m2 e2m3 e2m1`; `w4a8` (integers); `w4.bf16`, `e4m3.fp16` (narrow weights only); `.g64`
behind a name with scaled weights: groups of 64. A new row in a file's FORMATS is a new format.
"""

from hwmpq.formats.encoding import Encoding, reciprocal
from hwmpq.formats.format import GROUP_SIZES, Format, QuantizedWeight, bops
from hwmpq.formats.registry import encoding_named, format_named, known_formats

__all__ = [
    "GROUP_SIZES",
    "Encoding",
    "Format",
    "QuantizedWeight",
    "bops",
    "encoding_named",
    "format_named",
    "known_formats",
    "reciprocal",
]
