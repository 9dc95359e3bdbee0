"""The likelihoods as ordinary tensor operations: for any device, real type and transform.

This is what runs where the compiled kernels of :mod:`mixscvi.likelihoods.kernels` do not: on
accelerators, under ``torch.compile``, ``torch.func`` and fake tensors, in half precision, or where
numba is missing. Away from the CPU no operation waits for a result, and the dense terms of many
draws with their gradients are one kernel (:mod:`mixscvi.likelihoods.one_kernel`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixscvi.likelihoods.one_kernel import in_one_kernel

__all__ = ["dense_terms", "log_prob", "sum_to_dispersion"]

_EPS = 1e-8  # scvi-tools adds it inside every logarithm; the same here, or values would differ


def log_prob(x: Tensor, mean: Tensor, theta: Tensor | None, zi_logits: Tensor | None) -> Tensor:
    """Log-likelihoods, `(L, B, S)`; see :mod:`mixscvi.likelihoods.log_prob` for the formulas.

    Parameters
    ----------
    x
        Counts, `(B, G)`.
    mean
        `(L, B, S, G)`.
    theta
        `(G,)`, `(B, 1, G)` or `(L, B, S, G)`; ``None`` for a Poisson likelihood.
    zi_logits
        `(L, B, S, G)`, or ``None`` for a negative binomial.
    """
    if theta is None:
        log_factorials = torch.lgamma(x + 1).sum(-1)
        return (torch.xlogy(x.unsqueeze(1), mean) - mean).sum(-1) - log_factorials.unsqueeze(1)
    dense, *_ = _DenseTerms.apply(
        x,
        mean,
        theta,
        zi_logits,
        torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in (mean, theta, zi_logits)),
    )
    return dense + _log_gamma_terms(x, theta)


def sum_to_dispersion(weights: Tensor, values: Tensor, theta: Tensor) -> Tensor:
    """Sum ``weights[..., None] * values`` over the axes that the draws of a dispersion share."""
    if theta.dim() == 1:
        return weights.flatten() @ values.flatten(0, -2)
    if theta.dim() == 3:
        return torch.einsum("lbs,lbsg->bg", weights, values).unsqueeze(1)
    return weights.unsqueeze(-1) * values


def _log_gamma_terms(x: Tensor, theta: Tensor) -> Tensor:
    """Sum over genes of lgamma(x + theta) - lgamma(theta) - lgamma(x + 1), which is 0 at x = 0."""
    if theta.dim() == 4:
        x = x.unsqueeze(1)
    elif theta.dim() == 3:
        theta = theta.squeeze(1)
    terms = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    total = terms.sum(-1)
    return total if theta.dim() == 4 else total.unsqueeze(1)


def dense_terms(
    x: Tensor, mean: Tensor, theta: Tensor, zi_logits: Tensor | None, with_gradients: bool
) -> tuple[Tensor, ...]:
    """All but the log-gamma terms, summed over genes; gradients of the sums by the arguments."""
    counts = x.unsqueeze(1)
    theta_eps, mean_eps = theta + _EPS, mean + _EPS
    total = theta_eps + mean
    log_ratio = -torch.log1p(mean / theta_eps)
    kept = theta * log_ratio  # log-probability that a count which did not drop out is zero
    value = counts * (mean_eps / total).log()
    zero = counts <= _EPS
    if zi_logits is None:
        value = value + kept
        certain: Tensor | float = 1.0
    else:
        kept = kept - zi_logits
        softplus = torch.where(zero, F.softplus(kept), kept) - F.softplus(-zi_logits)
        value = torch.where(zero, 0.0, value) + softplus
        # d value / d kept: how surely a zero is one that did not drop out
        certain = torch.where(zero, kept.sigmoid(), 1.0)
    value = value.sum(-1)
    if not with_gradients:
        return (value,)
    inverse = total.reciprocal()
    positive = counts if zi_logits is None else torch.where(zero, 0.0, counts)
    d_mean = theta * inverse * (positive / mean_eps - certain)
    d_theta = certain * (log_ratio + theta * (mean / theta_eps) * inverse) - positive * inverse
    if zi_logits is None:
        return value, d_mean, d_theta
    return value, d_mean, d_theta, (-zi_logits).sigmoid() - certain


class _DenseTerms(torch.autograd.Function):
    """:func:`dense_terms`, for autograd: value and gradients share their logarithms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, mean: Tensor, theta: Tensor, zi_logits: Tensor | None, with_gradients: bool
    ) -> tuple[Tensor, ...]:
        if with_gradients:
            return in_one_kernel(dense_terms, x, mean, theta, zi_logits, True, size=mean)
        return dense_terms(x, mean, theta, zi_logits, with_gradients=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[2], *output[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        theta, d_mean, d_theta, *d_zi = ctx.saved_tensors
        return (
            None,
            grad.unsqueeze(-1) * d_mean,
            sum_to_dispersion(grad, d_theta, theta),
            grad.unsqueeze(-1) * d_zi[0] if d_zi else None,
            None,
        )
