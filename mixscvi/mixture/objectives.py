"""Objectives as pure functions of log-weights, and the estimators that choose components."""

from __future__ import annotations

import math
from enum import StrEnum

import torch
from torch import Tensor

__all__ = [
    "Estimator",
    "importance_weighted_miselbo",
    "miselbo",
    "mixture_log_prob",
    "siwae",
    "siwae_standard_error",
]


class Estimator(StrEnum):
    r"""Which components a step draws from, and which form the mixture in the denominator.

    ============== =================================== ============ =========================
    name           draws from                          denominator  against MISELBO
    ============== =================================== ============ =========================
    all_to_all     all `A`                             all `A`      exact
    some_to_all    `S` at random, without replacement  all `A`      unbiased
    some_to_some   `S` at random, without replacement  those `S`    lower bound, biased
    ============== =================================== ============ =========================

    References: Hotti et al., arXiv 2406.07083 (their S2A and S2S).

    Examples
    --------
    >>> import torch
    >>> estimator = Estimator("some_to_all")
    >>> estimator.choose(5, 2, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([2])
    >>> Estimator.ALL_TO_ALL.choose(5, 5) is None
    True
    """

    ALL_TO_ALL = "all_to_all"
    SOME_TO_ALL = "some_to_all"
    SOME_TO_SOME = "some_to_some"

    def n_drawn(self, n_components: int, n_sampled: int | None = None) -> int:
        """Number of components that a step draws from, `S`.

        Parameters
        ----------
        n_components
            Number of components, `A`.
        n_sampled
            What the user asked for; by default all `A` with ``all_to_all``, and 1 otherwise.

        Raises
        ------
        ValueError
            As :meth:`check`.

        Examples
        --------
        >>> Estimator.ALL_TO_ALL.n_drawn(4), Estimator.SOME_TO_ALL.n_drawn(4)
        (4, 1)
        """
        if n_sampled is None:
            n_sampled = n_components if self is Estimator.ALL_TO_ALL else 1
        self.check(n_components, n_sampled)
        return n_sampled

    def check(self, n_components: int, n_sampled: int) -> None:
        """Raise if this estimator cannot draw from so many components.

        Raises
        ------
        TypeError
            If a number is not an integer.
        ValueError
            If `S` is not in 1..A, or is not `A` with ``all_to_all``.
        """
        for name, value in (("n_components", n_components), ("n_sampled", n_sampled)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if not 1 <= n_sampled <= n_components:
            raise ValueError(
                f"n_sampled must be between 1 and n_components={n_components}, got {n_sampled}"
            )
        if self is Estimator.ALL_TO_ALL and n_sampled != n_components:
            raise ValueError(
                f"all_to_all draws from all n_components={n_components}, got n_sampled={n_sampled}"
            )

    def choose(
        self, n_components: int, n_sampled: int, generator: torch.Generator | None = None
    ) -> Tensor | None:
        """Indices of the components that a step draws from.

        Parameters
        ----------
        n_components
            Number of components, `A`.
        n_sampled
            Number of them to draw from, `S`.
        generator
            Source of randomness, on the CPU; torch's default generator when ``None``.

        Returns
        -------
        `(S,)` distinct indices on the CPU, or ``None`` for all components in order.

        Raises
        ------
        ValueError
            As :meth:`check`.
        """
        self.check(n_components, n_sampled)
        if self is Estimator.ALL_TO_ALL:
            return None
        if n_sampled == n_components:
            return None
        return torch.randperm(n_components, generator=generator)[:n_sampled]


def mixture_log_prob(cross_log_prob: Tensor) -> Tensor:
    """Log-density of the uniform mixture from its components' log-densities.

    Parameters
    ----------
    cross_log_prob
        Log-densities with the components on the last axis, `(..., A)`.

    Returns
    -------
    `(...)`.

    Examples
    --------
    >>> import torch
    >>> mixture_log_prob(torch.zeros(2, 4))
    tensor([0., 0.])
    """
    return cross_log_prob.logsumexp(-1) - math.log(cross_log_prob.shape[-1])


def miselbo(log_weights: Tensor) -> Tensor:
    r"""Multiple importance sampling ELBO: the average of all log-weights.

    .. math:: \frac{1}{L S} \sum_{l, s} \log w_{l,s}, \qquad
        w_{l,s} = \frac{p(x, z_{l,s})}{q(z_{l,s} \mid x)}, \; z_{l,s} \sim q_s

    Kviman et al. 2022 (AISTATS), eq. 5. It equals the mean ELBO of the components plus their
    Jensen-Shannon divergence.

    Parameters
    ----------
    log_weights
        `(L, B, S)`, with the mixture density as denominator.

    Returns
    -------
    `(B,)`, in nats.

    Examples
    --------
    >>> import torch
    >>> miselbo(torch.tensor([[[-1.0, -3.0]]]))
    tensor([-2.])
    """
    return log_weights.mean((0, -1))


def importance_weighted_miselbo(log_weights: Tensor) -> Tensor:
    r"""MISELBO with `L` importance samples per component, in the papers' form.

    .. math:: \frac{1}{S} \sum_s \log \frac{1}{L} \sum_l w_{l,s}

    It averages over the components outside the logarithm, so it stays below log p(x) as `L`
    grows when the components specialize; :func:`siwae` is the consistent form. For ``L = 1`` it
    is :func:`miselbo`.

    Parameters
    ----------
    log_weights
        `(L, B, S)`.

    Returns
    -------
    `(B,)`, in nats.

    Examples
    --------
    >>> import torch
    >>> log_weights = torch.tensor([[[-1.0, -3.0]], [[-1.0, -3.0]]])
    >>> importance_weighted_miselbo(log_weights)
    tensor([-2.])
    """
    return (log_weights.logsumexp(0) - math.log(log_weights.shape[0])).mean(-1)


def siwae(log_weights: Tensor) -> Tensor:
    r"""Stratified importance weighted bound: the average of all weights, in the log.

    .. math:: \log \frac{1}{L S} \sum_{l, s} w_{l,s}

    Morningstar et al., arXiv 2003.01687. Consistent for log p(x); IWAE when ``S = 1``. For the
    same weights, MISELBO <= importance-weighted MISELBO <= SIWAE.

    To train an encoder of several components it is unfit. The gradient by component `s` is weighted
    by its share :math:`w_s / \sum_t w_t`, which early in training is one for the best component of
    an x and zero for the others; losing them costs log S at most. So each x is left to one
    component, and the others lie anywhere (see :func:`dead_components`).

    Parameters
    ----------
    log_weights
        `(L, B, S)`.

    Returns
    -------
    `(B,)`, in nats.

    Examples
    --------
    >>> import torch
    >>> siwae(torch.tensor([[[1.0, 1.0]]]))
    tensor([1.])
    """
    n_draws = log_weights.shape[0] * log_weights.shape[-1]
    return log_weights.logsumexp((0, -1)) - math.log(n_draws)


def siwae_standard_error(log_weights: Tensor) -> Tensor:
    r"""Monte-Carlo standard error of :func:`siwae`, by the delta method.

    The estimate of p(x) is a mean of stratum means, so its variance is
    :math:`S^{-2} \sum_s \mathrm{Var}_l(w_{l,s}) / L`; the error of its logarithm is the square
    root of that over the estimate.

    Parameters
    ----------
    log_weights
        `(L, B, S)` with at least two draws per component.

    Returns
    -------
    `(B,)`, in nats. As reliable as the weights' second moment: consult Pareto k-hat.

    Raises
    ------
    ValueError
        If ``L < 2``.

    Examples
    --------
    >>> import torch
    >>> siwae_standard_error(torch.zeros(8, 3, 4))
    tensor([0., 0., 0.])
    """
    n_samples, _, n_sampled = log_weights.shape
    if n_samples < 2:
        raise ValueError(
            "log_weights must hold at least two draws per component for a standard error, got L=1: "
            "raise the number of draws"
        )
    relative = (log_weights - siwae(log_weights)[None, :, None]).exp()
    return (relative.var(0).sum(-1) / n_samples).sqrt() / n_sampled
