"""Exact posteriors of one cell in two dimensions, by the rectangle rule."""

import math

import torch
from scvi import REGISTRY_KEYS
from torch.distributions import Normal

from naive_module import naive_decode, naive_prior


@torch.no_grad()
def integrate(module, tensors, cell, *, step=0.1):
    """log p(x) of one cell, and its posterior over a grid: points `(M, 2)` and their weights.

    The points are z of a module with two dimensions, or z and the log library size of a module
    with one that models the latter. Neither encoder nor flow takes part.
    """
    axis = torch.arange(-10.0, 10.0, step, dtype=torch.float64)
    if module.use_observed_lib_size:
        points = torch.cartesian_prod(*[axis] * module.n_latent).reshape(-1, module.n_latent)
        log_volume = module.n_latent * math.log(step)
    else:
        batch = tensors[REGISTRY_KEYS.BATCH_KEY][cell]
        loc, variance = (
            part.double().item() for part in module._compute_local_library_params(batch[None])
        )
        scale = math.sqrt(variance)
        library_axis = loc + scale * torch.arange(-7.0, 7.0, step, dtype=torch.float64)
        points = torch.cartesian_prod(axis, library_axis)
        log_volume = math.log(step) + math.log(scale * step)
    rows = {name: values[cell].expand(len(points), -1) for name, values in tensors.items()}
    z = points[:, : module.n_latent]
    log_joint = naive_prior(module).log_prob(z)
    if module.use_observed_lib_size:
        library = rows[REGISTRY_KEYS.X_KEY].sum(1, keepdim=True).log()
    else:
        library = points[:, module.n_latent :]
        log_joint = log_joint + Normal(loc, scale).log_prob(library)[:, 0]
    log_joint = log_joint + naive_decode(module, rows, z, library)
    return log_joint.logsumexp(0).item() + log_volume, points, log_joint.softmax(0)
