"""Values and gradients against forty digits: what differs from scvi-tools is rounding."""

import warnings

import mpmath
import numpy as np
import torch
from mpmath import mp
from scvi.distributions import ZeroInflatedNegativeBinomial

from mixscvi.likelihoods import zinb_log_prob

N = 600
EPS = mp.mpf(1e-8)  # scvi-tools adds it inside logarithms


def drawn_inputs():
    rng = np.random.default_rng(7)
    count = np.where(rng.random(N) < 0.3, 0, np.floor(10 ** rng.uniform(-0.3, 6, N)))
    return (
        count,
        10 ** rng.uniform(-12, 6, N),  # means
        10 ** rng.uniform(-4, 6, N),  # inverse dispersions
        rng.uniform(-50, 50, N),  # logits of dropping out
    )


def sigmoid(a):
    return 1 / (1 + mp.exp(-a))


def exact(x, mu, theta, logit):
    """The value of the formula with its three derivatives, each with the sizes of its terms."""
    x, mu, theta, logit = map(mp.mpf, (x, mu, theta, logit))
    total = mu + theta + EPS
    log_ratio = mp.log((theta + EPS) / total)
    kept = theta * log_ratio - logit
    by_theta = log_ratio + theta / (theta + EPS) - theta / total
    if x == 0:
        certain = sigmoid(kept)
        value = mp.log1p(mp.exp(kept)) - mp.log1p(mp.exp(-logit))
        slopes = (-certain * theta / total, certain * by_theta, sigmoid(-logit) - certain)
    else:
        terms = mp.loggamma(x + theta) - mp.loggamma(theta) - mp.loggamma(x + 1)
        value = kept - mp.log1p(mp.exp(-logit)) + x * mp.log((mu + EPS) / total) + terms
        digammas = mp.digamma(x + theta) - mp.digamma(theta)
        by_mu = x / (mu + EPS) - (x + theta) / total
        slopes = (by_mu, by_theta - x / total + digammas, sigmoid(-logit) - 1)
    digammas = mp.digamma(x + theta) - mp.digamma(theta)
    sizes = (
        1
        + abs(value)
        + mp.loggamma(x + 1)
        + abs(mp.loggamma(x + theta) - mp.loggamma(theta))
        + x * abs(mp.log(mu / total))
        + abs(kept)
        + 2 * abs(logit),
        1 + x / mu + (x + theta) / total,
        1 + 1 / theta + digammas + abs(log_ratio) + (x + mu) / total,
        1,
    )
    return (value, *slopes), sizes


def evaluated(log_prob, inputs):
    x, *parameters = map(torch.tensor, inputs)
    parameters = [value[None, :, None, None].requires_grad_() for value in parameters]
    value = log_prob(x[:, None], *parameters)
    gradients = torch.autograd.grad(value.sum(), parameters)
    return torch.stack([t.detach().flatten() for t in (value, *gradients)], -1)


def of_scvi_tools(x, mu, theta, logits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zinb = ZeroInflatedNegativeBinomial(mu=mu, theta=theta, zi_logits=logits)
        return zinb.log_prob(x[:, None]).sum(-1)


def test_rounding_is_that_of_the_terms_that_are_added():
    inputs = drawn_inputs()
    ours, theirs = evaluated(zinb_log_prob, inputs), evaluated(of_scvi_tools, inputs)
    with mpmath.workdps(40):
        results = [exact(*values) for values in zip(*inputs, strict=True)]
        wanted, sizes = (
            [[row[j] for j in range(4)] for row in rows] for rows in zip(*results, strict=True)
        )

        def errors(got):
            return np.array(
                [
                    [float(abs(mp.mpf(g) - w) / s) for g, w, s in zip(*row, strict=True)]
                    for row in zip(got.tolist(), wanted, sizes, strict=True)
                ]
            )

        our_error, their_error = errors(ours).max(0), errors(theirs).max(0)
    assert (our_error < 1e-15).all(), our_error
    # The reference is another implementation, which is right to the digits that it keeps.
    assert (their_error < 1e-8).all(), their_error
    assert (our_error <= their_error).all(), (our_error, their_error)
