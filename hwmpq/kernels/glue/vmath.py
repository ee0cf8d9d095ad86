"""exp, tanh, gelu and their kin on fp32 vectors, and reductions over the lanes of a vector.

Every step is one defined fp32 operation: a sum, a product, a division, a square root, or a fused
multiply-add that is asked for (`ir.fma`). A product that a sum follows is fenced.
`quantize/exact_math.py` repeats the functions step by step from the tables here, bit by bit.

Largest errors, measured against float64 at 2^20 points: exp 1 unit in the last place (8e-8
relative); sigmoid 1e-7 absolute; tanh 3e-7 relative; gelu 6e-8 absolute and half a unit of the
result. `tests/compile/test_glue.py` holds them to about that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hwmpq.kernels.ir import IR, Expr

#: exp: S. Moshier, Cephes, single/expf.c: e^r = 1 + r + r²·p(r) on |r| <= ln 2 / 2; ln 2 in two
#: parts so that k·ln 2 is exact.
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
       5.0000001201e-1)  # fmt: skip
LN2 = (0.693359375, -2.12194440e-4)
LOG2_E = 1.4426950408889634
EXP_RANGE = (-87.33, 88.37)
#: ln Φ(t) on −6 .. 0: own fit, least largest error of t·Φ(t), 6e-8 when computed in fp32.
TAIL = (-2.1848052256245865e-06, 2.034393418171021e-07, 0.0004407923261169344,
        0.005413969047367573, 0.036822617053985596, -0.31810489296913147, 0.7979253530502319,
        -0.6931445002555847)  # fmt: skip
TAIL_END = -6.0
#: tanh x = x·p(x²)/q(x²), highest power first, as in Eigen's GenericPacketMathFunctions
#: (ptanh_float); from TANH_ONE on it is 1 in fp32.
TANH_ABOVE = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11,
              5.12229709037114e-08, 1.48572235717979e-05, 6.37261928875436e-04,
              4.89352455891786e-03)  # fmt: skip
TANH_BELOW = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03,
              4.89352518554385e-03)  # fmt: skip
TANH_ONE = 7.90531110763549805
#: gelu 'tanh' = x·sigmoid(GELU_SLOPE·(x + GELU_CUBE·x³)).
GELU_CUBE = 0.044715
GELU_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)


def constant(ir: IR, value: float, lanes: int) -> Expr:
    return ir.const(value, "float32", lanes)


def polynomial(ir: IR, x: Expr, square: Expr, coefficients: Sequence[float], lanes: int) -> Expr:
    """Highest power first. Terms two by two, a·x + b, then Horner in x²: the chain of dependent
    multiply-adds, which is what a register of values waits for, is half as long."""

    def pair(a: float, b: float) -> Expr:
        return ir.fma(constant(ir, a, lanes), x, constant(ir, b, lanes), lanes)

    rest = iter(coefficients)
    if len(coefficients) % 2:
        y = constant(ir, next(rest), lanes)
    else:
        y = pair(next(rest), next(rest))
    for a, b in zip(rest, rest, strict=True):
        y = ir.fma(y, square, pair(a, b), lanes)
    return y


def between(ir: IR, x: Expr, low: float, high: float, lanes: int) -> Expr:
    return ir.maximum(ir.minimum(x, constant(ir, high, lanes)), constant(ir, low, lanes))


def exp(ir: IR, x: Expr, lanes: int) -> Expr:
    """e^x for x in EXP_RANGE; x is bounded to that."""
    return exp_within(ir, between(ir, x, *EXP_RANGE, lanes), lanes)


def exp_within(ir: IR, x: Expr, lanes: int) -> Expr:
    """e^x = 2^k · (1 + y) for x that lies in EXP_RANGE; the last step only scales 1 + y."""
    x = ir.let(x)
    k = ir.let(ir.rint(x * constant(ir, LOG2_E, lanes), lanes))
    r = ir.fma(k, constant(ir, -LN2[0], lanes), x, lanes)
    r = ir.let(ir.fma(k, constant(ir, -LN2[1], lanes), r, lanes))
    square = ir.let(r * r)
    y = ir.fma(polynomial(ir, r, square, EXP, lanes), square, r, lanes)
    biased = ir.cast(k, "int32", lanes) + ir.const(127, "int32", lanes)
    power = ir.let(ir.reinterpret(biased << ir.const(23, "int32", lanes), "float32", lanes))
    return ir.fma(y, power, power, lanes)


def sigmoid(ir: IR, x: Expr, lanes: int) -> Expr:
    """1 / (1 + e^−x)."""
    one = constant(ir, 1.0, lanes)
    return one / (one + exp(ir, constant(ir, 0.0, lanes) - x, lanes))


def gelu(ir: IR, x: Expr, lanes: int) -> Expr:
    """x · Φ(x) = max(x, 0) + t · Φ(t) with t = −|x|, bounded to TAIL_END: there it is 6e-9."""
    x = ir.let(x)
    zero = constant(ir, 0.0, lanes)
    t = ir.let(ir.maximum(ir.minimum(x, zero - x), constant(ir, TAIL_END, lanes)))
    below = exp_within(ir, polynomial(ir, t, ir.let(t * t), TAIL, lanes), lanes)
    return ir.fma(t, below, ir.maximum(x, zero), lanes)


def gelu_tanh(ir: IR, x: Expr, lanes: int) -> Expr:
    """0.5·x·(1 + tanh u) = x·sigmoid(2u), u = sqrt(2/π)·(x + 0.044715·x³)."""
    x = ir.let(x)
    inner = ir.fma(x * x * constant(ir, GELU_CUBE, lanes), x, x, lanes)
    return x * sigmoid(ir, ir.fence(inner * constant(ir, GELU_SLOPE, lanes), lanes), lanes)


def tanh(ir: IR, x: Expr, lanes: int) -> Expr:
    x = ir.let(between(ir, x, -TANH_ONE, TANH_ONE, lanes))
    square = ir.let(x * x)
    fourth = ir.let(square * square)
    above = x * polynomial(ir, square, fourth, TANH_ABOVE, lanes)
    return above / polynomial(ir, square, fourth, TANH_BELOW, lanes)


def total(ir: IR, vector: Expr, lanes: int, join: Callable[[Expr, Expr], Expr]) -> Expr:
    """All lanes of a vector (a power of two of them) joined to one scalar, halves first."""
    while lanes > 1:
        vector = ir.let(vector)
        lanes //= 2
        low, high = list(range(lanes)), list(range(lanes, 2 * lanes))
        vector = join(ir.shuffle(vector, low), ir.shuffle(vector, high))
    return vector
