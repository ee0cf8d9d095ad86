"""exp, tanh, gelu and their kin on fp32 vectors, and reductions over the lanes of a vector.

Largest errors, measured against float64 at 2^20 points: exp 1 unit in the last place (8e-8
relative); sigmoid 1e-7 absolute; tanh 3e-7 relative; gelu 6e-8 absolute and half a unit of the
result. `tests/compile/test_glue.py` holds them to about that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hwmpq.kernels.ir import IR, Expr

#: exp: S. Moshier, Cephes, single/expf.c: e^r = 1 + r + r²·p(r) on |r| <= ln 2 / 2; ln 2 in two
#: parts so that k·ln 2 is exact.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
        5.0000001201e-1)  # fmt: skip
_LN2 = (0.693359375, -2.12194440e-4)
#: ln Φ(−a) on 0 .. 6: own fit, least largest error of a·Φ(−a), 6e-8 when computed in fp32.
_TAIL = (2.1848052256245865e-06, 2.034393418171021e-07, -0.0004407923261169344,
         0.005413969047367573, -0.036822617053985596, -0.31810489296913147, -0.7979253530502319,
         -0.6931445002555847)  # fmt: skip
#: tanh x = x·p(x²)/q(x²), highest power first, as in Eigen's GenericPacketMathFunctions
#: (ptanh_float); from _TANH_ONE on it is 1 in fp32.
_TANH_ABOVE = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11,
               5.12229709037114e-08, 1.48572235717979e-05, 6.37261928875436e-04,
               4.89352455891786e-03)  # fmt: skip
_TANH_BELOW = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03,
               4.89352518554385e-03)  # fmt: skip
_TANH_ONE = 7.90531110763549805


def constant(ir: IR, value: float, lanes: int) -> Expr:
    return ir.const(value, "float32", lanes)


def polynomial(ir: IR, x: Expr, coefficients: Sequence[float], lanes: int) -> Expr:
    """Horner, highest power first."""
    y = constant(ir, coefficients[0], lanes)
    for c in coefficients[1:]:
        y = y * x + constant(ir, c, lanes)
    return y


def between(ir: IR, x: Expr, low: float, high: float, lanes: int) -> Expr:
    return ir.maximum(ir.minimum(x, constant(ir, high, lanes)), constant(ir, low, lanes))


def exp(ir: IR, x: Expr, lanes: int) -> Expr:
    """e^x for x in -87.3 .. 88.3; x is bounded to that."""
    x = ir.let(between(ir, x, -87.33, 88.37, lanes))
    k = ir.let(ir.rint(x * constant(ir, 1.4426950408889634, lanes), lanes))
    r = ir.let(x - k * constant(ir, _LN2[0], lanes) - k * constant(ir, _LN2[1], lanes))
    y = polynomial(ir, r, _EXP, lanes) * (r * r) + r + constant(ir, 1.0, lanes)
    biased = ir.cast(k, "int32", lanes) + ir.const(127, "int32", lanes)
    return y * ir.reinterpret(biased << ir.const(23, "int32", lanes), "float32", lanes)


def sigmoid(ir: IR, x: Expr, lanes: int) -> Expr:
    one = constant(ir, 1.0, lanes)
    return one / (one + exp(ir, constant(ir, 0.0, lanes) - x, lanes))


def gelu(ir: IR, x: Expr, lanes: int) -> Expr:
    """x · Φ(x) = max(x, 0) − a · Φ(−a) with a = |x|, bounded to 6, where the product is 6e-9."""
    x = ir.let(x)
    zero = constant(ir, 0.0, lanes)
    a = ir.let(ir.minimum(ir.maximum(x, zero - x), constant(ir, 6.0, lanes)))
    return ir.maximum(x, zero) - a * exp(ir, polynomial(ir, a, _TAIL, lanes), lanes)


def tanh(ir: IR, x: Expr, lanes: int) -> Expr:
    x = ir.let(between(ir, x, -_TANH_ONE, _TANH_ONE, lanes))
    square = ir.let(x * x)
    above = x * polynomial(ir, square, _TANH_ABOVE, lanes)
    return above / polynomial(ir, square, _TANH_BELOW, lanes)


def total(ir: IR, vector: Expr, lanes: int, join: Callable[[Expr, Expr], Expr]) -> Expr:
    """All lanes of a vector (a power of two of them) joined to one scalar, halves first."""
    while lanes > 1:
        vector = ir.let(vector)
        lanes //= 2
        low, high = list(range(lanes)), list(range(lanes, 2 * lanes))
        vector = join(ir.shuffle(vector, low), ir.shuffle(vector, high))
    return vector
