"""A Gaussian fitted to the scores of a density: one step of batch and match."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cholesky", "match_scores", "squared_distance", "weighted_moments"]


def cholesky(covariance: Tensor) -> Tensor:
    """Cholesky factors of matrices that are positive definite but for rounding, `(..., D, D)`."""
    exact = covariance.to("cpu", torch.float64)  # not every accelerator has float64
    diagonal = exact.diagonal(dim1=-2, dim2=-1)
    jitter = 1e-9 * diagonal + 1e-12 * diagonal.amax(-1, keepdim=True) + 1e-300
    return torch.linalg.cholesky(exact + torch.diag_embed(jitter)).to(covariance)


def weighted_moments(draws: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(B, D)` and covariance `(B, D, D)` of weighted draws `(N, B, D)`."""
    center = torch.einsum("nb,nbd->bd", weights, draws)
    deviation = (draws - center).transpose(0, 1)
    return center, (weights.mT.unsqueeze(-1) * deviation).mT @ deviation


def _finite(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Equal weights of the draws whose scores are finite, `(N, B)`, and scores without others."""
    finite = scores.isfinite().all(-1)
    weights = finite.to(scores) / finite.sum(0).clamp_min(1)
    return weights, torch.where(finite.unsqueeze(-1), scores, 0.0)


def squared_distance(scores: Tensor) -> Tensor:
    r"""How far away a Gaussian target is, in squared widths of the Gaussian drawn from, `(B,)`.

    :math:`\bar g^\top G^{-1} \bar g` for mean and covariance of the scores: a Gaussian target of
    covariance `P` has scores :math:`-P^{-1} (z - m)`, and with draws of mean :math:`\mu` and
    covariance `W` that is :math:`(\mu - m)^\top W^{-1} (\mu - m)`.

    Parameters
    ----------
    scores
        Of the target at the draws, `(N, B, D)`. They count where they are finite.

    Examples
    --------
    >>> import torch
    >>> z = torch.randn(5000, 1, 2, generator=torch.Generator().manual_seed(0))
    >>> squared_distance(-(z - torch.tensor([3.0, 4.0]))).round()
    tensor([25.])
    """
    weights, scores = _finite(scores)
    mean, covariance = weighted_moments(scores, weights)
    white = torch.linalg.solve_triangular(cholesky(covariance), mean.unsqueeze(-1), upper=False)
    return white.square().sum((-1, -2))


def match_scores(
    loc: Tensor, covariance: Tensor, draws: Tensor, scores: Tensor, rate: float | Tensor
) -> tuple[Tensor, Tensor]:
    r"""One step of batch and match: the Gaussian whose scores are closest to the target's.

    With means :math:`\bar z, \bar g` and covariances `C`, `G` of draws and scores, the new
    covariance solves :math:`\Sigma U \Sigma + \Sigma = V` for
    :math:`U = \lambda G + \frac{\lambda}{1 + \lambda} \bar g \bar g^\top` and
    :math:`V = \Sigma_0 + \lambda C + \frac{\lambda}{1 + \lambda} (\mu_0 - \bar z)(\mu_0 -
    \bar z)^\top`: :math:`\Sigma = 2 L (I + (I + 4 L^\top U L)^{1/2})^{-1} L^\top`, with
    :math:`V = L L^\top`. The new mean is
    :math:`(\mu_0 + \lambda (\Sigma \bar g + \bar z)) / (1 + \lambda)`. Exact in one step where the
    target is Gaussian and the rate :math:`\lambda` large. Cai, Modi, Pillaud-Vivien, Margossian,
    Gower, Blei & Saul, ICML 2024.

    Parameters
    ----------
    loc, covariance
        The Gaussian so far, `(B, D)` and `(B, D, D)`.
    draws, scores
        Of this Gaussian and the target, `(N, B, D)`; draws whose score is not finite are left out.
    rate
        How much these draws count beside the Gaussian so far, for all or each, `(B,)`.
    """
    rate = torch.as_tensor(rate).to(loc).expand(len(loc)).unsqueeze(-1)  # (B, 1)
    weights, scores = _finite(scores)
    weights = weights.to(draws)
    some = weights.any(0).unsqueeze(-1)
    mean_z, cov_z = weighted_moments(draws, weights)
    mean_g, cov_g = weighted_moments(scores, weights)
    mean_z = torch.where(some, mean_z, loc)
    share = rate / (1 + rate)
    shift = loc - mean_z
    u = rate.unsqueeze(-1) * cov_g + (share * mean_g).unsqueeze(-1) * mean_g.unsqueeze(-2)
    v = covariance + rate.unsqueeze(-1) * cov_z
    v = v + (share * shift).unsqueeze(-1) * shift.unsqueeze(-2)
    u, tril = u.to("cpu", torch.float64), cholesky(v).to("cpu", torch.float64)
    values, vectors = torch.linalg.eigh(tril.mT @ u @ tril)
    root = tril @ vectors * (2 / (1 + (1 + 4 * values.clamp_min(0)).sqrt())).sqrt().unsqueeze(-2)
    new = (root @ root.mT).to(covariance)
    step = torch.einsum("bde,be->bd", new, mean_g) + mean_z
    new = torch.where(some.unsqueeze(-1), new, covariance)
    return (1 - share) * loc + share * step, new
