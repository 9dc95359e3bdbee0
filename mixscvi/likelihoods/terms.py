"""Terms of the log-likelihood that every gene has, a few hundred genes at a time."""

from __future__ import annotations

import numpy as np
from numba import njit

from mixscvi.likelihoods.vector_math import add, exp, log1p, use_wide_vectors

__all__ = ["BUFFER", "BY_THETA", "BY_ZI", "TILE", "terms_of_genes"]

# Genes that are worked on at once. Outputs lie at constant distances in one buffer, which tells
# the compiler that they do not overlap; nothing else that numba can say does.
TILE = 512
BY_THETA, BY_ZI, _TERM, _EXCESS = TILE, 2 * TILE, 3 * TILE, 4 * TILE
BUFFER = 5 * TILE

_inlined = njit(error_model="numpy", forceinline=True)


@_inlined
def _mean_and_dispersion(mean, scale, log_library, theta, theta_row, start, n, eps, d_mean, out):
    """Of `n` genes, theta * log(theta / (theta + mean)) and its gradients by log(mean) and theta.

    For a Poisson likelihood it is -mean.
    """
    use_wide_vectors()
    one = mean.dtype.type(1)
    for i in range(n):
        gene = np.uintp(start + i)
        mu = mean[gene] * scale
        factor = one if log_library is None else mu
        if theta is None:
            out[_TERM + i] = -mu
            if d_mean is not None:
                out[i] = -factor
        else:
            th = theta[theta_row, gene]
            th_eps = th + eps
            ratio = mu / th_eps
            log_ratio = log1p(ratio)  # log(theta + mean + eps) - log(theta + eps)
            out[_TERM + i] = -th * log_ratio
            if d_mean is not None:
                inverse = one / (th_eps + mu)
                out[i] = -th * factor * inverse
                out[BY_THETA + i] = th * ratio * inverse - log_ratio


@_inlined
def _dropout(x, zi, zi_bias, row, start, n, eps, d_mean, out):
    """From the terms of a negative binomial to those of a zero-inflated one, and their gradients.

    With t what a negative binomial has, less zi, they are those of `zinb_log_prob`.
    """
    use_wide_vectors()
    real = zi.dtype.type
    zero, one = real(0), real(1)
    for i in range(n):
        gene = np.uintp(start + i)
        pi = zi[row, gene] if zi_bias is None else zi[row, gene] + zi_bias[gene]
        positive = not x[gene] <= eps
        t = out[_TERM + i] - pi
        u = exp(-abs(pi))
        v = exp(-abs(t))
        inverse_u = one / (one + u)
        # softplus(t) - softplus(-pi); a positive count has t instead of softplus(t)
        out[_EXCESS + i] = ((zero if positive else v) - u) * inverse_u
        top = t if positive or not t <= zero else zero
        bottom = zero if pi >= zero else -pi
        out[_TERM + i] = top - bottom
        if d_mean is not None:
            # How surely a zero is one that did not drop out.
            certain = (v if t < zero else one) / (one + v)
            certain = one if positive else certain
            out[i] *= certain
            out[BY_THETA + i] *= certain
            out[BY_ZI + i] = (one if pi < zero else u) * inverse_u - certain
    for i in range(n):
        out[_TERM + i] += log1p(out[_EXCESS + i])


@_inlined
def terms_of_genes(
    x, mean, scale, log_library, theta, theta_row, zi, zi_bias, row, start, n, eps, d_mean, out
):
    """Sum of all terms of `n` genes but those in log(mean) and log-gamma.

    The gradients are those by log(mean) (by the mean if there is no `log_library`), by theta and by
    the logit of dropping out; they are written to `out` unless `d_mean` is ``None``.

    Each step is a loop of its own over genes: a processor then works on several of them at once,
    while in one long loop each operation waits for the one before.
    """
    use_wide_vectors()
    _mean_and_dispersion(mean, scale, log_library, theta, theta_row, start, n, eps, d_mean, out)
    if zi is not None:
        _dropout(x, zi, zi_bias, row, start, n, eps, d_mean, out)
    zero = mean.dtype.type(0)
    total, total_slope = zero, zero
    for i in range(n):
        total = add(total, out[_TERM + i])
    if d_mean is not None:
        for i in range(n):
            total_slope = add(total_slope, out[i])
    return total, total_slope
