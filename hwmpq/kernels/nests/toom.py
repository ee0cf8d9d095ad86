"""Exact integer transforms of a 3 × 3 convolution: 36 products for a tile of 4 × 4 results.

y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A takes 36 products where the definition takes 144. The matrices here are
integers, their denominators are taken off the result: what comes out is 4 · 225 · y modulo 2^32.
225 is odd and has an inverse there, and 4 y is shifted right by two bits: y is exact while
|y| < 2^29, however often the sums on the way wrap around.

The points of evaluation are 0, ±1, 2, −1/2 and ∞: two of each class modulo 2, so that every
denominator is twice an odd number (with the usual 0, ±1, ±2 and ∞ the result would lose 2^6).
Transformed operands fit 16 bits: |Bᵀ d B| ≤ 98 · 255 of u8, |G g Gᵀ| ≤ 225 · 128 of s8.
Tiles of 2 × 2 results take 16 products for 36: slower or as fast on every layer that was measured.
Sources: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4;
Blahut, "Fast Algorithms for Signal Processing", 2010, chapter 5 (evaluation at points: Toom, Cook).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Numbers with +, −, · by a constant and <<: vectors in a kernel, arrays in a test.
Values = list[Any]

#: Results along a side of a tile, inputs that they need, products of a tile.
SIDE, SIZE = 4, 6
POINTS = SIZE * SIZE
#: 1/225 modulo 2^32, as int32, and log2 of the power of two that is left.
INVERSE, SHIFT = pow(225, -1, 1 << 32) - (1 << 32), 2
#: Results must stay below: 2^31 / 4.
LIMIT = 1 << 29


def both(step: Callable[[Values], Values], square: list[Values]) -> list[Values]:
    """A step on all columns of a square of values, then on all rows."""
    columns = [step([row[j] for row in square]) for j in range(len(square[0]))]
    return [step([column[i] for column in columns]) for i in range(len(columns[0]))]


def data(d: Values) -> Values:
    """Bᵀ: six inputs -> at six points; that of 1 with its sign turned (`weight` leaves it out)."""
    a, b = d[4] - d[2], d[1] - d[3]
    u = ((a - d[3]) << 1) - d[3]
    w = ((b + d[2]) << 1) + d[2]
    first = ((((d[0] - d[2]) + a) + b) << 1) + b
    last = ((((d[5] - d[3]) + b) - a) << 1) - a
    return [first, w - u, w + u, (a << 1) - b, (b << 1) + a, last]


def weight(g: Values) -> Values:
    """G: three weights -> at six points, times 30 over the denominator of each."""
    outer, inner = (g[0] + g[2]) * 5, g[1] * 5
    twice = g[1] << 1
    return [
        g[0] * 15,
        outer + inner,
        outer - inner,
        (g[0] + twice) + (g[2] << 2),
        (twice - (g[0] << 2)) - g[2],
        g[2] * 15,
    ]


def result(m: Values) -> Values:
    """Aᵀ: sums at six points -> four results, times 30."""
    plus, minus = m[1] + m[2], m[1] - m[2]
    near, far = m[3] - (m[4] << 1), (m[3] << 1) + m[4]
    return [
        (m[0] + plus) + (m[3] + (m[4] << 3)),
        minus + (near << 1),
        plus + (far << 1),
        (minus + m[5]) + ((m[3] << 3) - m[4]),
    ]
