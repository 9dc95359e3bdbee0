r"""Exponential, logarithm and log-gamma ratios that LLVM turns into vector instructions.

A call into the C library would stop a loop from being vectorized, so in single precision they are
polynomials on a reduced range (minimax fits made for this file), and the exponent is read and
written through the bits of the number:

.. math::
    e^x = 2^n (1 + r + r^2 Q(r)), \quad n = \mathrm{round}(x / \log 2), \; r = x - n \log 2

.. math::
    \log y = n \log 2 + f - f^2 / 2 + f^3 P(f), \quad y = 2^n (1 + f), \; f \in [\sqrt{1/2} - 1,
    \sqrt 2 - 1]

Both are within 1.5 units in the last place, log(1 + d) within 2.5. In double precision the
exponential is the C library's, and the logarithm is :math:`2 \operatorname{artanh}(f / (2 + f))`
as a power series.

Rounding to an integer adds and subtracts :math:`1.5 \cdot 2^{23}`, which passes a NaN on where a
conversion to an integer would not.
"""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

__all__ = [
    "add",
    "exp",
    "larger",
    "log",
    "log1p",
    "log_gamma_ratio",
    "softmax_exp",
    "use_wide_vectors",
]

_F = np.float32
_ONE32, _HALF32, _ZERO32 = _F(1), _F(0.5), _F(0)
_LOG2_E32 = _F(1.4426950408889634)
# log 2 in two parts: the product of the first with an exponent is exact.
_LN2_HIGH32, _LN2_LOW32 = _F(0.693359375), _F(-2.1219444005469057e-4)
_ROUND32, _ROUND_BITS32 = _F(12582912.0), np.int32(0x4B400000)
_SQRT_HALF_BITS32 = np.int32(0x3F3504F3)
_EXPONENT_MASK32, _EXPONENT_SHIFT32, _BIAS32 = np.int32(-(2**23)), np.int32(23), np.int32(127)
_ULP_OF_ONE32, _SMALLEST32, _INT_ZERO32 = _F(2.0**-23), _F(2.0**-126), np.int32(0)
_LOWEST_EXP32 = _F(-87.0)
_SCALE32, _LOG_SCALE32, _INF32 = _F(2.0**24), _F(24 * math.log(2)), _F(math.inf)
_SHIFT_EXP32, _SHIFT_FACTOR32 = _F(24 * math.log(2)), _F(2.0**-24)

_Q0, _Q1, _Q2, _Q3, _Q4 = map(
    _F, (0.5, 0.166665766661, 0.041666554213, 0.00836323288368, 0.00139262508315)
)
_P0, _P1, _P2, _P3, _P4, _P5, _P6, _P7 = map(
    _F,
    (
        0.333333306115,
        -0.250003125775,
        0.200010784622,
        -0.166409399347,
        0.142130939535,
        -0.130012549257,
        0.126365349938,
        -0.0791176112902,
    ),
)

_SQRT_HALF_BITS64 = np.int64(0x3FE6A09E667F3BCD)
_EXPONENT_MASK64, _EXPONENT_SHIFT64, _INT_ZERO64 = np.int64(-(2**52)), np.int64(52), np.int64(0)
_LN2_HIGH64 = math.floor(math.log(2) * 2**32) / 2**32
_LN2_LOW64 = float(Decimal("0.693147180559945309417232121458176568") - Decimal(_LN2_HIGH64))
_SMALLEST64, _SCALE64, _LOG_SCALE64 = 2.0**-1022, 2.0**54, 54 * math.log(2)

# No reassociation: the corrections below live on the rounding that it would remove.
_inlined = njit(error_model="numpy", forceinline=True)
_contracted = njit(error_model="numpy", forceinline=True, fastmath={"contract"})


def _bitcast(source, target, llvm_target):
    @intrinsic
    def cast(context, value):
        def codegen(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], llvm_target)

        return target(source), codegen

    return cast


_bits32 = _bitcast(types.float32, types.int32, ir.IntType(32))
_from_bits32 = _bitcast(types.int32, types.float32, ir.FloatType())
_bits64 = _bitcast(types.float64, types.int64, ir.IntType(64))
_from_bits64 = _bitcast(types.int64, types.float64, ir.DoubleType())


@njit(forceinline=True, fastmath={"reassoc", "nsz"})
def add(a, b):
    """`a + b`, whose order in a sum is the compiler's to choose: vector lanes are summed apart."""
    return a + b


@intrinsic
def larger(context, a, b):
    """The larger of two numbers, or NaN if one is."""

    def codegen(context, builder, signature, arguments):
        kind = arguments[0].type
        maximum = builder.module.declare_intrinsic(
            "llvm.maximum", [kind], ir.FunctionType(kind, [kind, kind])
        )
        return builder.call(maximum, arguments)

    return a(a, b), codegen


@intrinsic
def use_wide_vectors(context):
    """Have the calling function use the widest vectors that the processor has.

    For many processors LLVM takes half of them, as the widest once slowed the clock. Here loops are
    long, and matrix products before and after have taken that price already.
    """

    def codegen(context, builder, signature, arguments):
        # Of attributes that are a name and a value, llvmlite knows none.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), codegen


@_contracted
def _exp32(x):
    x = _LOWEST_EXP32 if x < _LOWEST_EXP32 else x
    shifted = x * _LOG2_E32 + _ROUND32
    n = shifted - _ROUND32
    r = x - n * _LN2_HIGH32
    r = r - n * _LN2_LOW32
    q = (((_Q4 * r + _Q3) * r + _Q2) * r + _Q1) * r + _Q0
    exponent = np.int32(_bits32(shifted) - _ROUND_BITS32 + _BIAS32)
    return (r * r * q + r + _ONE32) * _from_bits32(np.int32(exponent << _EXPONENT_SHIFT32))


@_contracted
def _log1p_parts32(y, d, exact):
    bits = _bits32(y)
    exponent = np.int32(np.int32(bits - _SQRT_HALF_BITS32) & _EXPONENT_MASK32)
    n = _F(exponent) * _ULP_OF_ONE32
    f = _from_bits32(np.int32(bits - exponent)) - _ONE32
    f = d if exact and exponent == _INT_ZERO32 else f
    p = ((((((_P7 * f + _P6) * f + _P5) * f + _P4) * f + _P3) * f + _P2) * f + _P1) * f + _P0
    square = f * f
    value = (n * _LN2_HIGH32 + f) + (n * _LN2_LOW32 + (f * square * p - _HALF32 * square))
    return value if y < _INF32 else y  # infinite, or not a number


@_inlined
def _log1p32(d):
    # Where 1 + d needs no exponent, d is the reduced argument, without the rounding of 1 + d.
    return _log1p_parts32(_ONE32 + d, d, True)


@_inlined
def _log32(y):
    tiny = y < _SMALLEST32
    scaled = y * _SCALE32 if tiny else y
    value = _log1p_parts32(scaled, _ZERO32, False)
    value = value - _LOG_SCALE32 if tiny else value
    return -_INF32 if y == _ZERO32 else value


@_inlined
def _softmax_exp32(x):
    small = x < _LOWEST_EXP32
    value = _exp32(x + _SHIFT_EXP32 if small else x)
    return value * _SHIFT_FACTOR32 if small else value


@_contracted
def _log1p_parts64(y, d, exact):
    bits = _bits64(y)
    exponent = (bits - _SQRT_HALF_BITS64) & _EXPONENT_MASK64
    n = float(exponent >> _EXPONENT_SHIFT64)
    f = _from_bits64(bits - exponent) - 1.0
    f = d if exact and exponent == _INT_ZERO64 else f
    s = f / (2.0 + f)
    z = s * s
    # artanh(s) / s - 1, to the power at which a term is below the rounding for |s| < 0.172.
    series = 1 / 15 + z * (1 / 17 + z * (1 / 19 + z * (1 / 21)))
    series = 1 / 7 + z * (1 / 9 + z * (1 / 11 + z * (1 / 13 + z * series)))
    series = z * (1 / 3 + z * (1 / 5 + z * series))
    # log(1 + f) = f - s * (f - 2 * series): the leading term is exact.
    value = n * _LN2_HIGH64 + (f - (s * (f - 2.0 * series) - n * _LN2_LOW64))
    return value if y < math.inf else y


@_inlined
def _log1p64(d):
    return _log1p_parts64(1.0 + d, d, True)


@_inlined
def _log64(y):
    tiny = y < _SMALLEST64
    scaled = y * _SCALE64 if tiny else y
    value = _log1p_parts64(scaled, 0.0, False)
    value = value - _LOG_SCALE64 if tiny else value
    return -math.inf if y == 0.0 else value


@_inlined
def _exp64(x):
    return math.exp(x)


def exp(x):
    """e to the power of `x`, which is not positive; in single precision at least e^-87."""
    raise NotImplementedError("only inside compiled functions")


def softmax_exp(x):
    """e to the power of `x`, which is not positive, down to subnormal numbers."""
    raise NotImplementedError("only inside compiled functions")


def log(y):
    """Logarithm of `y`, which is not negative."""
    raise NotImplementedError("only inside compiled functions")


def log1p(d):
    """log(1 + d) for d > -1, to the last digits of a small `d`."""
    raise NotImplementedError("only inside compiled functions")


def _by_precision(function, single, double):
    @overload(function)
    def choose(x):
        return (lambda x: single(x)) if x == types.float32 else (lambda x: double(x))


_by_precision(exp, _exp32, _exp64)
_by_precision(softmax_exp, _softmax_exp32, _exp64)
_by_precision(log, _log32, _log64)
_by_precision(log1p, _log1p32, _log1p64)


@_inlined
def _stirling_tail(z):
    """log-gamma beyond (z - 1/2) log z - z + log(2 pi) / 2, for z >= 8, and its derivative."""
    w = 1.0 / z
    v = w * w
    tail = 1 / 1188 + v * (-691 / 360360 + v * (1 / 156))
    tail = w * (1 / 12 + v * (-1 / 360 + v * (1 / 1260 + v * (-1 / 1680 + v * tail))))
    slope = -1 / 132 + v * (691 / 32760 + v * (-1 / 12))
    slope = v * (-1 / 12 + v * (1 / 120 + v * (-1 / 252 + v * (1 / 240 + v * slope))))
    return tail, slope - 0.5 * w


@_inlined
def log_gamma_ratio(x, theta):
    r"""log Gamma(x + theta) - log Gamma(theta) and its derivative by theta, in double precision.

    With :math:`b = \theta + 8` and :math:`a = x + b` (no shift where :math:`\theta \geq 8`),
    Stirling's series of both is subtracted before it is summed, so that nothing cancels for a
    large :math:`\theta`:

    .. math::
        (b - \tfrac12) \log(1 + x / b) + x (\log a - 1) + c(a) - c(b)
        + \log \prod_{i < 8} \frac{\theta + i}{x + \theta + i}

    The products' logarithmic derivatives follow from the product rule, one division each.
    """
    shifted = theta < 8.0
    top, top_slope, bottom, bottom_slope = 1.0, 0.0, 1.0, 0.0
    for i in range(8):
        top_slope = top_slope * (theta + i) + top
        top = top * (theta + i)
        bottom_slope = bottom_slope * (x + theta + i) + bottom
        bottom = bottom * (x + theta + i)
    b = theta + 8.0 if shifted else theta
    a = x + b
    tail_a, slope_a = _stirling_tail(a)
    tail_b, slope_b = _stirling_tail(b)
    log_ratio = _log1p64(x / b)
    value = (b - 0.5) * log_ratio + x * (_log1p_parts64(a, 0.0, False) - 1.0) + (tail_a - tail_b)
    slope = log_ratio + (slope_a - slope_b)
    value += _log1p_parts64(top / bottom if shifted else 1.0, 0.0, False)
    slope += top_slope / top - bottom_slope / bottom if shifted else 0.0
    return value, slope
