import numpy as np
import pytest
import scipy.special
from numba import njit

from mixscvi.likelihoods import vector_math

RNG = np.random.default_rng(0)


@njit
def apply_exp(x, out):
    for i in range(x.size):
        out[i] = vector_math.exp(x[i])


@njit
def apply_softmax_exp(x, out):
    for i in range(x.size):
        out[i] = vector_math.softmax_exp(x[i])


@njit
def apply_log(x, out):
    for i in range(x.size):
        out[i] = vector_math.log(x[i])


@njit
def apply_log1p(x, out):
    for i in range(x.size):
        out[i] = vector_math.log1p(x[i])


@njit
def apply_log_gamma_ratio(x, theta, value, slope):
    for i in range(x.size):
        value[i], slope[i] = vector_math.log_gamma_ratio(x[i], theta[i])


def spread(low, high, sign=1):
    return sign * np.exp(RNG.uniform(np.log(low), np.log(high), 100_000))


RANGES = {
    "exp": (apply_exp, np.exp, spread(1e-9, 86.9, -1), 1.5),
    "softmax_exp": (apply_softmax_exp, np.exp, spread(1e-9, 86.9, -1), 1.5),
    "log": (apply_log, np.log, spread(1e-37, 1e37), 1.5),
    "log-near-1": (apply_log, np.log, RNG.uniform(0.5, 2, 100_000), 1.5),
    "log1p": (apply_log1p, np.log1p, spread(1e-30, 1e30), 2.5),
    "log1p-negative": (apply_log1p, np.log1p, spread(1e-30, 0.5, -1), 2.5),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("apply", "reference", "x", "bound"), RANGES.values(), ids=RANGES)
def test_within_units_in_the_last_place(apply, reference, x, bound, dtype):
    x = x.astype(dtype)
    out = np.empty_like(x)
    apply(x, out)
    exact = reference(x.astype(np.longdouble))
    unit = np.spacing(np.abs(exact).astype(dtype))
    assert np.max(np.abs(out - exact) / unit) < bound


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values(dtype):
    def result(apply, *x):
        out = np.empty(len(x), dtype)
        apply(np.array(x, dtype), out)
        return out

    tiny = np.finfo(dtype).tiny
    np.testing.assert_array_equal(
        result(apply_log, 0, np.inf, np.nan, 1), [-np.inf, np.inf, np.nan, 0]
    )
    np.testing.assert_allclose(
        result(apply_log, tiny / 64), np.log(np.array([tiny / 64], dtype)), rtol=1e-6
    )
    np.testing.assert_array_equal(result(apply_log1p, 0, np.inf, np.nan), [0, np.inf, np.nan])
    np.testing.assert_array_equal(result(apply_exp, 0, np.nan), [1, np.nan])
    np.testing.assert_array_equal(result(apply_softmax_exp, 0, np.nan), [1, np.nan])
    np.testing.assert_allclose(result(apply_softmax_exp, -95), np.exp(-95.0), rtol=1e-3)


@pytest.mark.parametrize("whole", [True, False])
def test_log_gamma_ratio(whole):
    mpmath = pytest.importorskip("mpmath")
    x = RNG.exponential(20, 300) if not whole else RNG.poisson(20, 300).astype(float)
    x[:10] = [0, 1, 7, 8, 9, 1e3, 1e6, 0.001, 1e-6, 3e4]
    theta = np.exp(RNG.uniform(np.log(1e-4), np.log(1e6), x.size))
    theta[10:14] = [7.999, 8.0, 8.001, 1.0]
    value, slope = np.empty_like(x), np.empty_like(x)
    apply_log_gamma_ratio(x, theta, value, slope)
    with mpmath.workdps(50):
        pairs = [(mpmath.mpf(a), mpmath.mpf(b)) for a, b in zip(x, theta, strict=True)]
        exact = [mpmath.loggamma(a + b) - mpmath.loggamma(b) for a, b in pairs]
        exact_slope = [mpmath.digamma(a + b) - mpmath.digamma(b) for a, b in pairs]
    np.testing.assert_allclose(value, np.array(exact, float), rtol=2e-14, atol=1e-14)
    np.testing.assert_allclose(slope, np.array(exact_slope, float), rtol=2e-13, atol=1e-15)
    # The reference itself, where double precision is enough for it.
    usual = scipy.special.gammaln(x + theta) - scipy.special.gammaln(theta)
    np.testing.assert_allclose(value[theta < 10], usual[theta < 10], rtol=1e-8, atol=1e-8)
