r"""From a decoder's last layer to the log-likelihood, without storing what lies between.

scVI's decoder ends in linear layers whose outputs `s` and :math:`\pi` become

.. math::
    \mu_g = \ell \, p_g, \quad p = \mathrm{softmax}(s), \quad
    \log p(x) = \sum_g \log \mathrm{ZINB}(x_g; \mu_g, \theta_g, \pi_g)

with :math:`\ell` the library size. With :math:`m_g = \mu_g \, \partial \log p(x) / \partial \mu_g`
the gradients are :math:`m_g - p_g \sum_j m_j` by :math:`s_g` and :math:`\sum_j m_j` by
:math:`\log \ell`. The kernels keep a row of genes in the cache from the logits to these gradients
and write the gradients over the logits.

The objective's derivative `g` by the value of a row is a factor of all that comes from that row,
so backward never scales the gradients `d`, of size `(R, G)`: with hidden units `h` `(R, H)` and
weights `W` `(G, H)`, the gradient by `W` is :math:`d^T (g h)`, by the bias :math:`d^T g`, and by
`h` it is :math:`g (d W)`. Where `g` is the same for all rows, as in a mean over them, biases and
dispersions need no more than sums over rows, which the kernels take while a row is in the cache.

For other activations of the scale than softmax use :func:`~mixscvi.likelihoods.zinb_log_prob`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixscvi.likelihoods import eager
from mixscvi.likelihoods.gradients import attach, gradient_buffers, needs_grad
from mixscvi.likelihoods.native import Gradients, evaluate, usable
from mixscvi.mixture.products import product_with_transpose

__all__ = ["head_log_prob", "logits_log_prob"]

# Logits that are computed at once without gradients. Larger blocks are memory that the C library
# takes from the system anew each time; smaller ones would stay in the cache, but matrix products
# of few rows cost more than that saves.
_ELEMENTS_PER_BLOCK = 2**22


def logits_log_prob(
    x: Tensor,
    scale_logits: Tensor,
    log_library: Tensor,
    theta: Tensor | None = None,
    zi_logits: Tensor | None = None,
    *,
    overwrite: bool = False,
) -> Tensor:
    """Log-likelihood from the outputs of a decoder's linear layers.

    Parameters
    ----------
    x
        Counts, `(B, G)`.
    scale_logits
        Logits of the softmax over genes, `(L, B, S, G)`.
    log_library
        Logarithms of library sizes, broadcastable to `(L, B, S)`.
    theta
        Inverse dispersions, `(G,)`, `(B, 1, G)` or `(L, B, S, G)`; ``None`` for a Poisson
        likelihood.
    zi_logits
        Logits of dropping out, `(L, B, S, G)`; ``None`` for a negative binomial.
    overwrite
        Whether gradients may be written over `scale_logits` and `zi_logits`, which then must not
        be used again, neither by the caller nor by what computed them (a linear layer does not).

    Returns
    -------
    `(L, B, S)`, in nats.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[0.0, 3.0]])
    >>> logits_log_prob(x, torch.zeros(1, 1, 4, 2), torch.tensor(1.0), torch.ones(2)).shape
    torch.Size([1, 1, 4])
    """
    log_library = log_library.expand(scale_logits.shape[:-1])
    if usable(x, scale_logits, log_library, theta, zi_logits):
        gradients = gradient_buffers(
            scale_logits, theta, zi_logits, log_library, overwrite=overwrite
        )
        value = evaluate(
            x, scale_logits, theta, zi_logits, log_library=log_library, gradients=gradients
        )
        if value is not None:
            return attach(value, gradients, scale_logits, theta, zi_logits, log_library)
    mean = log_library.exp().unsqueeze(-1) * scale_logits.softmax(-1)
    return eager.log_prob(x, mean, theta, zi_logits)


def head_log_prob(
    x: Tensor,
    hidden: Tensor,
    scale_weight: Tensor,
    scale_bias: Tensor,
    log_library: Tensor,
    theta: Tensor | None = None,
    zi_weight: Tensor | None = None,
    zi_bias: Tensor | None = None,
    *,
    equal_rows: bool = False,
) -> Tensor:
    """Log-likelihood from the last hidden units of a decoder.

    With gradients, at most three tensors `(L, B, S, G)` are alive (one less for a negative
    binomial, and one less with `equal_rows`); without, rows are worked on in blocks, so that
    thousands of draws take no more memory than some.

    Parameters
    ----------
    x
        Counts, `(B, G)`.
    hidden
        Outputs of the decoder's last hidden layer, `(L, B, S, H)`.
    scale_weight, scale_bias
        The linear layer before the softmax over genes, `(G, H)` and `(G,)`.
    log_library
        Logarithms of library sizes, broadcastable to `(L, B, S)`.
    theta
        Inverse dispersions, `(G,)`, `(B, 1, G)` or `(L, B, S, G)`; ``None`` for a Poisson
        likelihood.
    zi_weight, zi_bias
        The linear layer whose outputs are the logits of dropping out; ``None`` for a negative
        binomial.
    equal_rows
        Whether the objective is to be a mean (or sum) over all values, which saves time and
        memory. Gradients are right without, too, but those by `theta` are then computed anew.

    Returns
    -------
    `(L, B, S)`, in nats.

    Examples
    --------
    >>> import torch
    >>> scale, dropout = torch.nn.Linear(8, 2), torch.nn.Linear(8, 2)
    >>> hidden, theta = torch.zeros(1, 1, 4, 8), torch.ones(2)
    >>> x, log_library = torch.tensor([[0.0, 3.0]]), torch.tensor(1.0)
    >>> head_log_prob(
    ...     x, hidden, scale.weight, scale.bias, log_library, theta, dropout.weight, dropout.bias
    ... ).shape
    torch.Size([1, 1, 4])
    """
    log_library = log_library.expand(hidden.shape[:-1])
    parameters = (hidden, scale_weight, scale_bias, zi_weight, zi_bias, theta, log_library)
    if usable(x, *parameters) and not torch.is_autocast_enabled("cpu"):
        if needs_grad(*parameters):
            summed = equal_rows and (theta is None or theta.dim() == 1)
            computed = _value_and_gradients(x, *parameters, summed=summed)
            value = None if computed is None else _Head.apply((x, *computed), *parameters)
        else:
            value = _in_blocks(x, *parameters)
        if value is not None:
            return value
    scale_logits = F.linear(hidden, scale_weight, scale_bias)
    zi_logits = None if zi_weight is None else F.linear(hidden, zi_weight, zi_bias)
    return logits_log_prob(x, scale_logits, log_library, theta, zi_logits, overwrite=True)


@torch.no_grad()
def _value_and_gradients(
    x: Tensor,
    hidden: Tensor,
    scale_weight: Tensor,
    scale_bias: Tensor,
    zi_weight: Tensor | None,
    zi_bias: Tensor | None,
    theta: Tensor | None,
    log_library: Tensor,
    *,
    summed: bool,
) -> tuple[Tensor, Gradients] | None:
    scale = _logits(hidden, scale_weight)
    zi = None if zi_weight is None else _logits(hidden, zi_weight)
    gradients = Gradients(
        mean=scale,
        theta=None if theta is None or summed else torch.empty_like(scale),
        zi=zi,
        log_library=torch.empty(log_library.shape, dtype=log_library.dtype),
        sums=scale.new_zeros(3, scale.shape[-1]) if summed else None,
    )
    value = evaluate(
        x,
        scale,
        theta,
        zi,
        mean_bias=scale_bias,
        zi_bias=zi_bias,
        log_library=log_library,
        gradients=gradients,
    )
    return None if value is None else (value, gradients)


class _Head(torch.autograd.Function):
    """A value of rows with known gradients by the logits; through the linear layers to theirs."""

    @staticmethod
    def forward(
        ctx: Any,
        computed: tuple[Tensor, Tensor, Gradients],
        *parameters: Tensor | None,
    ) -> Tensor:
        ctx.x, value, gradients = computed
        ctx.save_for_backward(*parameters, *gradients)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameters = ctx.saved_tensors[:7]
        gradients: Any = Gradients(*ctx.saved_tensors[7:])
        hidden, scale_weight, _, zi_weight, _, theta, _ = parameters
        _, _, *by_layers, by_theta, by_library = ctx.needs_input_grad
        weights = grad.reshape(-1)
        sums = gradients.sums
        if sums is not None:
            # Unless all rows count alike, their sums are of no use.
            alike = len(weights) > 0 and bool((weights == weights[0]).all())
            sums = weights[0] * sums if alike else None
        weighted = hidden.flatten(0, -2) * weights.unsqueeze(-1)
        d_hidden = torch.zeros_like(weighted)
        layers: list[Tensor | None] = []
        for i, d_logits, weight, by_weight, by_bias in (
            (0, gradients.mean, scale_weight, *by_layers[:2]),
            (2, gradients.zi, zi_weight, *by_layers[2:]),
        ):
            if d_logits is None:
                layers += [None, None]
                continue
            flat = d_logits.flatten(0, -2)
            layers.append(flat.t() @ weighted if by_weight else None)
            if by_bias:
                layers.append(weights @ flat if sums is None else sums[i])
            else:
                layers.append(None)
            d_hidden += product_with_transpose(flat, weight.t())
        d_theta = None
        if by_theta and sums is not None:
            d_theta = sums[1]
        elif by_theta and gradients.theta is None:  # rows count differently, against what was said
            d_theta = _gradient_by_theta(ctx.x, grad, *parameters)
        elif by_theta:
            d_theta = eager.sum_to_dispersion(grad, gradients.theta, theta)
        return (
            None,
            d_hidden.mul_(weights.unsqueeze(-1)).view(hidden.shape),
            *layers,
            d_theta,
            grad * gradients.log_library if by_library else None,
        )


@torch.enable_grad()
def _gradient_by_theta(
    x: Tensor,
    grad: Tensor,
    hidden: Tensor,
    scale_weight: Tensor,
    scale_bias: Tensor,
    zi_weight: Tensor | None,
    zi_bias: Tensor | None,
    theta: Tensor,
    log_library: Tensor,
) -> Tensor:
    """The gradient by the dispersions alone, by another pass."""
    theta = theta.detach().requires_grad_()
    with torch.no_grad():
        scale_logits = F.linear(hidden, scale_weight, scale_bias)
        zi_logits = None if zi_weight is None else F.linear(hidden, zi_weight, zi_bias)
    value = logits_log_prob(x, scale_logits, log_library.detach(), theta, zi_logits)
    return torch.autograd.grad(value, theta, grad)[0]


def _logits(units: Tensor, weight: Tensor) -> Tensor:
    """Outputs of a linear layer without its bias."""
    product = product_with_transpose(units.flatten(0, -2), weight)
    return product.view(*units.shape[:-1], -1)


def _in_blocks(
    x: Tensor,
    hidden: Tensor,
    scale_weight: Tensor,
    scale_bias: Tensor,
    zi_weight: Tensor | None,
    zi_bias: Tensor | None,
    theta: Tensor | None,
    log_library: Tensor,
) -> Tensor | None:
    """Values only. As few cells at once as fill a block, for their counts are read each time."""
    n_strata, n_cells, n_per_stratum, _ = hidden.shape
    n_genes = len(scale_weight)
    n_rows = max(1, _ELEMENTS_PER_BLOCK // n_genes)
    cells = min(n_cells, max(1, n_rows // (n_strata * n_per_stratum)))
    strata = min(n_strata, max(1, n_rows // (cells * n_per_stratum)))
    values = hidden.new_empty(hidden.shape[:-1])
    for cell in range(0, n_cells, cells):
        some_cells = slice(cell, cell + cells)
        counts = x[some_cells]
        for stratum in range(0, n_strata, strata):
            block = (slice(stratum, stratum + strata), some_cells)
            units = hidden[block]
            value = evaluate(
                counts,
                _logits(units, scale_weight),
                theta if theta is None or theta.dim() == 1 else theta[block[4 - theta.dim() :]],
                None if zi_weight is None else _logits(units, zi_weight),
                mean_bias=scale_bias,
                zi_bias=zi_bias,
                log_library=log_library[block],
            )
            if value is None:
                return None
            values[block] = value
    return values
