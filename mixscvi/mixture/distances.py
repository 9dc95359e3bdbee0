"""Distances of points from the components of mixtures, each by its own factor."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mixscvi import compiled

__all__ = ["squared_distances"]

_ELEMENTS_AT_ONCE = 2**21
_ELEMENTS_IN_CACHE = 2**18  # measured: passes that stay in a core's cache take a third less time
_WORK_PER_TASK, _TASKS_PER_THREAD = 2**18, 4


def squared_distances(value: Tensor, center: Tensor, inverse: Tensor, whitened: Tensor) -> Tensor:
    r"""Squared lengths of :math:`\Lambda_k^{-1} (z - c) - w_k`.

    Differences are taken from a center before the product: far from the origin, the products' own
    difference would lose digits.

    Parameters
    ----------
    value
        Points z, `(N, B, D)`.
    center
        Of each cell, `(B, D)`.
    inverse
        Lower triangular inverse factors, `(B, K, D, D)`.
    whitened
        The components' centers less `center`, multiplied by the inverse factors, `(B, K, D)`.

    Returns
    -------
    `(N, B, K)`, in the parameters' precision. By a compiled function on the CPU where no gradient
    is needed, otherwise as matrix products, in passes of bounded memory.

    Examples
    --------
    >>> import torch
    >>> value, center = torch.tensor([[[3.0, 4.0]]]), torch.zeros(1, 2)
    >>> inverse, whitened = 0.5 * torch.eye(2).expand(1, 1, 2, 2), torch.zeros(1, 1, 2)
    >>> squared_distances(value, center, inverse, whitened)
    tensor([[[6.2500]]])
    """
    points = value.transpose(0, 1)
    kernels = _kernels(value, center, inverse, whitened)
    if kernels is not None:
        (n_cells, n_points, n_latent), n_components = points.shape, inverse.shape[1]
        distance = inverse.new_empty(n_cells, n_points, n_components)
        work = distance.numel() * n_latent**2
        n_tasks = compiled.n_tasks(work, _WORK_PER_TASK, _TASKS_PER_THREAD)
        arrays = map(compiled.array, (points, center, inverse, whitened))
        blocks = compiled.grid(n_cells, n_points, n_tasks)
        if compiled.in_blocks(kernels.squared_distances, blocks, *arrays, distance.numpy()):
            return distance.transpose(0, 1)
    return _by_products(points, center, inverse, whitened).transpose(0, 1)


def _kernels(value: Tensor, *parameters: Tensor) -> ModuleType | None:
    """The compiled functions, if they take these tensors."""
    tensors = (value, *parameters)
    known = value.dtype in (torch.float32, torch.float64) and all(
        parameter.dtype == torch.float64 for parameter in parameters
    )
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if gradients or not (known and compiled.plain(*tensors)):
        return None
    return compiled.load("mixscvi.mixture.distance_kernels")


def _by_products(points: Tensor, center: Tensor, inverse: Tensor, whitened: Tensor) -> Tensor:
    """The same as matrix products, `(B, N, K)`."""
    n_latent, columns = inverse.shape[-1], inverse.shape[1] * inverse.shape[2]
    factors = inverse.flatten(1, 2).mT  # (B, D, K * D)
    elements = _ELEMENTS_IN_CACHE if points.device.type == "cpu" else _ELEMENTS_AT_ONCE
    n_points = max(1, min(points.shape[1], elements // columns))
    n_cells = max(1, elements // (n_points * columns))
    passes = []
    for some, middle, factor, shift in zip(
        points.split(n_cells),
        center.unsqueeze(1).split(n_cells),
        factors.split(n_cells),
        whitened.flatten(1).unsqueeze(1).split(n_cells),
        strict=True,
    ):
        parts = [
            torch.baddbmm(-shift, part.to(inverse) - middle, factor)
            .square()
            .unflatten(-1, (-1, n_latent))
            .sum(-1)
            for part in some.split(n_points, dim=1)
        ]
        passes.append(torch.cat(parts, 1))
    return torch.cat(passes)
