"""Log-likelihoods of counts, summed over genes, for many draws of one cell at once.

They equal scvi-tools' to rounding and do less: what depends on the count alone (the log-gamma
terms) vanishes where the count is zero and is shared by all draws, so it is computed once per cell
on the nonzero entries; what depends on the dispersion of a gene is computed once per gene.

Counts `x` are `(B, G)`. Parameters of the draws are `(L, B, S, G)`. A dispersion is `(G,)`,
`(B, 1, G)` or `(L, B, S, G)`. Results are `(L, B, S)`, in nats.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["nb_log_prob", "poisson_log_prob", "zinb_log_prob"]

_EPS = 1e-8  # scvi-tools adds it inside of every logarithm; the same here, or values would differ


def _log_gamma_terms(x: Tensor, theta: Tensor) -> Tensor:
    """Sum over genes of lgamma(x + theta) - lgamma(theta) - lgamma(x + 1), which is 0 at x = 0."""
    n_genes = x.shape[-1]
    (nonzero,) = torch.where(x.flatten() != 0)
    cell = nonzero // n_genes
    count = x.flatten().index_select(0, nonzero)
    if theta.dim() == 1:
        theta_nz = theta.index_select(0, nonzero % n_genes)
    elif theta.dim() == 3:
        theta_nz = theta.flatten().index_select(0, nonzero)
    else:
        theta_nz = theta.permute(1, 3, 0, 2).flatten(0, 1).index_select(0, nonzero)  # (nnz, L, S)
        count = count.view(-1, 1, 1)
    terms = torch.lgamma(count + theta_nz) - torch.lgamma(theta_nz) - torch.lgamma(count + 1)
    total = terms.new_zeros(x.shape[0], *terms.shape[1:]).index_add(0, cell, terms)
    return total.unsqueeze(1) if total.dim() == 1 else total.movedim(1, 0)


def _sum_to_dispersion(weights: Tensor, values: Tensor, theta: Tensor) -> Tensor:
    """Sum `weights[..., None] * values` over the axes that the draws of a dispersion share."""
    if theta.dim() == 1:
        return weights.flatten() @ values.flatten(0, -2)
    if theta.dim() == 3:
        return torch.einsum("lbs,lbsg->bg", weights, values).unsqueeze(1)
    return weights.unsqueeze(-1) * values


class _DenseTerms(torch.autograd.Function):
    """All but the log-gamma terms of a (zero-inflated) negative binomial, summed over genes.

    Value and gradients share their logarithms, so both are computed in one go, in closed form and
    mostly in place: about half the time of recording the operations and replaying them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, mu: Tensor, theta: Tensor, zi_logits: Tensor | None) -> Tensor:
        counts = x.unsqueeze(1)
        total = mu + (theta + _EPS)
        log_total = total.log()
        log_ratio = (theta + _EPS).log() - log_total
        kept = theta * log_ratio  # log-probability that a count which did not drop out is zero
        value = (mu + _EPS).log_().sub_(log_total).mul_(counts)
        zero = counts == 0
        if zi_logits is None:
            value += kept
        else:
            kept -= zi_logits
            value += torch.where(zero, F.softplus(kept), kept)
            value -= F.softplus(-zi_logits)
        if any(ctx.needs_input_grad):
            # d value / d kept: how surely a zero is one that did not drop out
            certain = None if zi_logits is None else torch.where(zero, kept.sigmoid_(), 1.0)
            weight = theta if certain is None else certain * theta
            inverse = total.reciprocal_()
            d_mu = counts / (mu + _EPS) - (weight + counts) * inverse
            d_theta = log_ratio.add_(theta / (theta + _EPS)).sub_(theta * inverse)
            if certain is not None:
                d_theta *= certain
            d_theta -= counts * inverse
            d_zi = None if certain is None else (-zi_logits).sigmoid_().sub_(certain)
            ctx.save_for_backward(theta, d_mu, d_theta, d_zi)
        return value.sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        theta, d_mu, d_theta, d_zi = ctx.saved_tensors
        return (
            None,
            grad.unsqueeze(-1) * d_mu,
            _sum_to_dispersion(grad, d_theta, theta),
            None if d_zi is None else grad.unsqueeze(-1) * d_zi,
        )


def nb_log_prob(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    r"""Negative binomial log-likelihood, with mean `mu` and inverse dispersion `theta`.

    .. math::
        \log \frac{\Gamma(x + \theta)}{\Gamma(\theta)\, x!}
        + \theta \log \frac{\theta}{\theta + \mu} + x \log \frac{\mu}{\theta + \mu}

    Parameters
    ----------
    x
        Counts, `(B, G)`.
    mu
        Means, `(L, B, S, G)`.
    theta
        Inverse dispersions, `(G,)`, `(B, 1, G)` or `(L, B, S, G)`.

    Returns
    -------
    `(L, B, S)`, in nats.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[0.0, 3.0]])
    >>> nb_log_prob(x, torch.ones(1, 1, 4, 2), torch.ones(2)).shape
    torch.Size([1, 1, 4])
    """
    return _DenseTerms.apply(x, mu, theta, None) + _log_gamma_terms(x, theta)


def zinb_log_prob(x: Tensor, mu: Tensor, theta: Tensor, zi_logits: Tensor) -> Tensor:
    r"""Zero-inflated negative binomial log-likelihood.

    With :math:`\pi` the logit of a dropout and
    :math:`t = -\pi + \theta \log(\theta / (\theta + \mu))`, a zero has log-probability
    :math:`\mathrm{softplus}(t) - \mathrm{softplus}(-\pi)`, and a positive count
    :math:`t - \mathrm{softplus}(-\pi) + x \log(\mu / (\theta + \mu))` plus the log-gamma terms.

    Parameters
    ----------
    x
        Counts, `(B, G)`.
    mu
        Means of the counts that did not drop out, `(L, B, S, G)`.
    theta
        Inverse dispersions, `(G,)`, `(B, 1, G)` or `(L, B, S, G)`.
    zi_logits
        Logits of dropping out, `(L, B, S, G)`.

    Returns
    -------
    `(L, B, S)`, in nats.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[0.0, 3.0]])
    >>> zinb_log_prob(x, torch.ones(1, 1, 4, 2), torch.ones(2), torch.zeros(1, 1, 4, 2)).shape
    torch.Size([1, 1, 4])
    """
    return _DenseTerms.apply(x, mu, theta, zi_logits) + _log_gamma_terms(x, theta)


def poisson_log_prob(x: Tensor, rate: Tensor) -> Tensor:
    r"""Poisson log-likelihood, :math:`x \log \lambda - \lambda - \log x!`.

    Parameters
    ----------
    x
        Counts, `(B, G)`.
    rate
        Rates, `(L, B, S, G)`.

    Returns
    -------
    `(L, B, S)`, in nats.

    Examples
    --------
    >>> import torch
    >>> poisson_log_prob(torch.zeros(1, 2), torch.ones(1, 1, 4, 2))
    tensor([[[-2., -2., -2., -2.]]])
    """
    log_factorials = torch.lgamma(x + 1).sum(-1)
    return (torch.xlogy(x.unsqueeze(1), rate) - rate).sum(-1) - log_factorials.unsqueeze(1)
