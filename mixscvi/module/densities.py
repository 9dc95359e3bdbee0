"""Moments and densities of latents that have no closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from mixscvi.mixture import InverseAutoregressiveFlow, MixturePosterior, StandardNormal

__all__ = ["importance_density", "latent_moments"]

_ELEMENTS_AT_ONCE = 2**22
_FLOW_WIDTH = 8  # elements that a flow holds for each of its inputs, roughly


@torch.no_grad()
def latent_moments(
    posterior: MixturePosterior, transform: Callable[[Tensor], Tensor], n_draws: int
) -> tuple[Tensor, Tensor]:
    """Mean and variance of transformed draws of z.

    Averages over draws that are stratified over the components, from a generator of its own with
    a fixed seed. All cells share the noise, so a cell's moments do not depend on its minibatch.

    Parameters
    ----------
    posterior
        Posteriors of `B` cells.
    transform
        From draws `(..., D)` of the posterior to what is averaged, `(..., D)`: a flow, the map to
        the simplex, or both.
    n_draws
        Draws per cell, rounded up to a multiple of `A`.

    Returns
    -------
    Mean and variance, `(B, D)` each.

    Examples
    --------
    >>> import torch
    >>> posterior = MixturePosterior(torch.zeros(3, 4, 2), torch.ones(3, 4, 2))
    >>> mean, variance = latent_moments(posterior, torch.exp, n_draws=4000)
    >>> mean.shape, bool((variance > mean).all())  # log-normal
    (torch.Size([3, 2]), True)
    """
    loc, scale = posterior.component_loc.unsqueeze(0), posterior.component_scale.unsqueeze(0)
    n_components = posterior.n_components
    n_samples = math.ceil(n_draws / n_components)
    generator = torch.Generator(loc.device).manual_seed(0)
    shape = (n_samples, 1, *loc.shape[2:])
    noise = torch.randn(shape, dtype=loc.dtype, device=loc.device, generator=generator)
    total = torch.zeros_like(posterior.mean)
    total_square, center = torch.zeros_like(total), torch.zeros_like(total)
    blocks = noise.split(max(1, _ELEMENTS_AT_ONCE // (_FLOW_WIDTH * loc.numel())))
    for i, some in enumerate(blocks):
        values = transform(loc + scale * some)
        if i == 0:  # variances are taken about it to avoid cancellation
            center = values.mean((0, 2))
        deviation = values - center.unsqueeze(1)
        total += deviation.sum((0, 2))
        total_square += deviation.square().sum((0, 2))
    shift = total / (n_samples * n_components)
    variance = total_square / (n_samples * n_components) - shift.square()
    return center + shift, variance.clamp_min(0)


@torch.no_grad()
def importance_density(
    posterior: MixturePosterior,
    z: Tensor,
    prior: Distribution,
    flow: InverseAutoregressiveFlow | None,
) -> Tensor:
    """log q(z | x) - log p(z) + log N(z; 0, I) of any points, on the CPU.

    scvi-tools' importance weights divide by the density of the posterior and multiply by that of a
    standard normal prior; with this in place of the former, they are those of another prior and of
    a flow.

    Parameters
    ----------
    posterior
        Posteriors of `B` cells, on the device of `prior` and `flow`.
    z
        Points in latent space, `(..., 1, D)`: each is scored under every cell.
    prior
        p(z), with event shape `(D,)`.
    flow
        The flow between the posterior and z, if any.

    Returns
    -------
    `(..., B)`.
    """
    device, n_latent = posterior.component_loc.device, z.shape[-1]
    standard_normal = StandardNormal(n_latent).to(device)(None)
    scores = []
    per_pass = max(1, _ELEMENTS_AT_ONCE // posterior.component_loc.numel())
    for chunk in z.reshape(-1, 1, n_latent).split(per_pass):
        points = chunk.to(device)
        base, log_det = (points, 0.0) if flow is None else flow.inverse(points)
        log_q = posterior.log_prob(base) - log_det
        scores.append((log_q - prior.log_prob(points) + standard_normal.log_prob(points)).cpu())
    return torch.cat(scores).reshape(*z.shape[:-2], -1)
