"""How good a proposal is, and how its components share the work.

All functions take log-weights or log-densities of draws, so they serve any model.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mixscvi.mixture.objectives import mixture_log_prob

__all__ = [
    "LEAST_FOR_K",
    "ImportanceDraws",
    "active_units",
    "component_elbo",
    "effective_sample_size",
    "jensen_shannon_divergence",
    "pareto_k",
    "specialization",
]


# Draws from which on there is a Pareto k-hat: the tail holds 5 of them.
LEAST_FOR_K = 25


class ImportanceDraws(NamedTuple):
    """Log-densities of draws from every component: all that bounds and diagnostics need.

    Examples
    --------
    >>> import torch
    >>> draws = ImportanceDraws(*torch.zeros(3, 10, 7, 4))  # L = 10, B = 7, A = 4
    >>> draws.log_weights.shape
    torch.Size([10, 7, 4])
    """

    log_joint: Tensor
    """log p(x, z), `(L, B, A)`."""
    log_own: Tensor
    """Log-density under the component that the draw came from, `(L, B, A)`."""
    log_mixture: Tensor
    """Log-density under the mixture, `(L, B, A)`."""

    @property
    def log_weights(self) -> Tensor:
        """Log importance weights with the mixture as proposal, `(L, B, A)`."""
        return self.log_joint - self.log_mixture


def specialization(own_log_prob: Tensor, mixture_log_prob: Tensor) -> Tensor:
    r"""Divergence of each component from the mixture that it is a part of.

    .. math:: \mathrm{KL}(q_a \,\|\, q) \approx
        \frac{1}{L} \sum_l \log q_a(z_{l,a}) - \log q(z_{l,a})

    0 where the component adds nothing that the others lack, log A where it overlaps with none. The
    mean over components is their Jensen-Shannon divergence.

    Parameters
    ----------
    own_log_prob
        Log-density of each draw under the component it came from, `(L, B, A)`.
    mixture_log_prob
        Log-density of each draw under the mixture, `(L, B, A)`.

    Returns
    -------
    `(B, A)`, in nats.

    Examples
    --------
    >>> import torch
    >>> specialization(torch.zeros(5, 3, 4), torch.zeros(5, 3, 4)).shape
    torch.Size([3, 4])
    """
    return (own_log_prob - mixture_log_prob).mean(0)


def jensen_shannon_divergence(cross_log_prob: Tensor) -> Tensor:
    """Jensen-Shannon divergence between the components, from draws of each.

    Parameters
    ----------
    cross_log_prob
        Log-density of every component's draws under every component, `(L, B, A, A)`.

    Returns
    -------
    `(B,)`, in nats; an unbiased estimate of a number in [0, log A].

    Examples
    --------
    >>> import torch
    >>> jensen_shannon_divergence(torch.zeros(5, 3, 4, 4))
    tensor([0., 0., 0.])
    """
    own = cross_log_prob.diagonal(dim1=-2, dim2=-1)
    return specialization(own, mixture_log_prob(cross_log_prob)).mean(-1)


def component_elbo(log_joint: Tensor, own_log_prob: Tensor) -> Tensor:
    """Each component's ELBO, as if it were the whole posterior.

    Parameters
    ----------
    log_joint
        log p(x, z) of each draw, `(L, B, A)`.
    own_log_prob
        Log-density of each draw under the component it came from, `(L, B, A)`.

    Returns
    -------
    `(B, A)`, in nats. Their mean plus the Jensen-Shannon divergence is MISELBO.

    Examples
    --------
    >>> import torch
    >>> component_elbo(torch.zeros(5, 3, 4), torch.ones(5, 3, 4)).mean()
    tensor(-1.)
    """
    return (log_joint - own_log_prob).mean(0)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""Effective number of importance samples, :math:`(\sum w)^2 / \sum w^2`.

    Parameters
    ----------
    log_weights
        Log-weights with all draws on the last axis, `(B, N)`.

    Returns
    -------
    `(B,)`, between 1 and N draws.

    Examples
    --------
    >>> import torch
    >>> effective_sample_size(torch.zeros(2, 50)).round()
    tensor([50., 50.])
    """
    return (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp()


def pareto_k(log_weights: Tensor, *, computed_in: torch.dtype | None = None) -> Tensor:
    r"""Pareto k-hat: the tail index of the importance weights.

    A generalized Pareto distribution is fitted to the largest
    :math:`\min(N / 5, 3 \sqrt N)` weights by the estimator of Zhang & Stephens (2009), with the
    weakly informative prior of Vehtari et al. (2024, JMLR 25:72). Above 0.7 the proposal misses a
    part of the posterior; below it the estimates built on the weights are reliable, unless there is
    a mode that no draw met, of which the weights say nothing.

    Parameters
    ----------
    log_weights
        Log-weights with all draws on the last axis, `(B, N)`; minus infinity is a weight of zero.
    computed_in
        Type that the log-weights were computed in, if they were cast to another one since; it
        says which of them are equal to rounding.

    Returns
    -------
    `(B,)`; minus infinity where the largest weights are equal to rounding, infinity where all but
    a few vanish beside the largest, or all are zero; NaN where a log-weight is.

    Raises
    ------
    ValueError
        If N < 25: the tail would hold fewer than 5 weights.

    Examples
    --------
    >>> import torch
    >>> pareto = torch.distributions.Pareto(1.0, 2.0)  # tail index 1 / 2
    >>> generator = torch.Generator().manual_seed(0)
    >>> uniform = torch.rand(1, 100_000, generator=generator, dtype=torch.float64)
    >>> round(pareto_k(-0.5 * uniform.log()).item(), 1)
    0.5
    """
    n_draws = log_weights.shape[-1]
    if n_draws < LEAST_FOR_K:
        raise ValueError(
            f"log_weights must hold at least {LEAST_FOR_K} draws per row, got {n_draws}"
        )
    n_tail = math.ceil(min(n_draws / 5, 3 * math.sqrt(n_draws)))
    precise = log_weights.to("cpu", torch.float64)  # not every accelerator has float64
    top = precise.amax(-1, keepdim=True)
    no_weight = top.squeeze(-1) == -torch.inf
    shifted = precise - top.masked_fill(top == -torch.inf, 0)
    largest = shifted.topk(n_tail + 1, dim=-1).values.flip(-1)
    exceedances = largest[..., 1:].exp() - largest[..., :1].exp()
    # Log-weights are differences of large numbers: equal ones come out a few roundings apart. If
    # the whole tail is equal, it is as large as its largest value; what else the row holds, of
    # draws far from the posterior, says nothing of the tail's roundings.
    eps = torch.finfo(computed_in or log_weights.dtype).eps
    # Exceedances lie in [0, 1]: weights that differ by more than a tenth are never called equal.
    rounding = (16 * eps * top.squeeze(-1).abs().clamp_min(1)).clamp_max(0.1)
    flat = exceedances[..., -1] <= rounding
    exceedances = torch.where(flat[..., None], torch.ones_like(exceedances), exceedances)
    k = _generalized_pareto_shape(exceedances)
    k = (k * n_tail + 0.5 * 10) / (n_tail + 10)
    k = torch.where(flat, -torch.inf, k)
    # The cutoff underflows beside the largest weight: a few draws dominate.
    outweighed = largest[..., 0] < math.log(torch.finfo(largest.dtype).tiny)
    return torch.where(outweighed | no_weight, torch.inf, k).to(log_weights)


def _generalized_pareto_shape(sorted_values: Tensor) -> Tensor:
    """Shape k of a generalized Pareto distribution, fitted to rows of ascending values.

    The profile posterior mean of Zhang & Stephens (2009, Technometrics 51:316), in their
    parametrization theta = -k / sigma, over a grid of 30 + sqrt(n) points.
    """
    n = sorted_values.shape[-1]
    n_grid = 30 + int(math.sqrt(n))
    grid = torch.arange(1, n_grid + 1, dtype=sorted_values.dtype, device=sorted_values.device)
    quartile = sorted_values[..., int(n / 4 + 0.5) - 1, None].clamp_min(1e-300)
    theta = 1 / sorted_values[..., -1:] + (1 - (n_grid / (grid - 0.5)).sqrt()) / (3 * quartile)
    k = torch.log1p(-theta[..., None] * sorted_values[..., None, :]).mean(-1)
    profile = n * ((-theta / k).log() - k - 1)
    weight = profile.softmax(-1)
    theta = (weight * theta).sum(-1)
    return torch.log1p(-theta[..., None] * sorted_values).mean(-1)


def active_units(means: Tensor, threshold: float = 0.01) -> Tensor:
    """Which latent dimensions carry information.

    A dimension is active when its posterior mean varies over the data by more than the
    threshold (Burda et al. 2016).

    Parameters
    ----------
    means
        Posterior means of many cells or images, `(n, D)`.
    threshold
        Least variance.

    Returns
    -------
    Booleans, `(D,)`.

    Examples
    --------
    >>> import torch
    >>> active_units(torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    tensor([False,  True])
    """
    return means.var(0, correction=0) > threshold
