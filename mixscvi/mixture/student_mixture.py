"""A weighted mixture of multivariate Student's t distributions with full covariances."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from mixscvi.mixture.distances import squared_distances

__all__ = ["StudentMixture"]

_ELEMENTS_AT_ONCE = 2**21


@lru_cache(16)
def _sobol(n_points: int, n_latent: int) -> Tensor:
    """The first points of Sobol's sequence, `(N, D)`: they fill the unit cube evenly."""
    engine = torch.quasirandom.SobolEngine(n_latent)
    return engine.draw(max(n_points, 1), dtype=torch.float64)[:n_points]  # it cannot draw none


class StudentMixture(Distribution):
    r"""Weighted mixture of `K` Student's t distributions, one mixture per cell or image.

    .. math::
        q(z) = \sum_{k=1}^{K} \alpha_k \, t_\nu(z; \mu_k, \Lambda_k \Lambda_k^\top), \quad
        t_\nu(z; \mu, \Sigma) \propto |\Sigma|^{-1/2}
        \left(1 + \tfrac{1}{\nu} (z - \mu)^\top \Sigma^{-1} (z - \mu)\right)^{-(\nu + D) / 2}

    Its tails fall as a power of the distance, slower than a Gaussian's: a proposal for importance
    sampling that is a little too narrow still has weights of finite variance.

    Parameters
    ----------
    weights
        Weights of the components, `(B, K)`, each row summing to one.
    loc
        Centers of the components, `(B, K, D)`.
    scale_tril
        Lower triangular factors of the scale matrices, with a positive diagonal, `(B, K, D, D)`.
        A component's covariance is its scale matrix times ``dof / (dof - 2)``.
    dof
        Degrees of freedom of all components, an integer above 2; ``None`` for Gaussians.
    validate_args
        Whether torch checks the values of the three tensors; costs a pass over them.

    Raises
    ------
    ValueError
        If shapes do not fit together, or the degrees of freedom are not an integer above 2.

    Notes
    -----
    The batch shape is `(B,)` and the event shape `(D,)`. Points are taken in passes, so memory is
    bounded by the points and the parameters, not by their product. The density is that of Kotz &
    Nadarajah, "Multivariate t distributions and their applications" (2004), eq. 1.1.

    Examples
    --------
    >>> import torch
    >>> loc = torch.tensor([[[-2.0, 0.0], [2.0, 0.0]]])  # one cell, K = 2, D = 2
    >>> scale_tril = torch.eye(2).expand(1, 2, 2, 2)
    >>> q = StudentMixture(torch.tensor([[0.5, 0.5]]), loc, scale_tril, dof=4)
    >>> q
    StudentMixture(batch_shape=(1,), n_components=2, n_latent=2, dof=4)
    >>> q.mean
    tensor([[0., 0.]])
    >>> q.covariance
    tensor([[[6., 0.],
             [0., 2.]]])
    >>> q.log_prob(q.sample((7,))).shape
    torch.Size([7, 1])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "weights": constraints.simplex,
        "loc": constraints.independent(constraints.real, 2),
        "scale_tril": constraints.independent(constraints.lower_cholesky, 1),
    }
    support = constraints.real_vector

    def __init__(
        self,
        weights: Tensor,
        loc: Tensor,
        scale_tril: Tensor,
        dof: int | None,
        *,
        validate_args: bool = False,
    ) -> None:
        if loc.dim() != 3 or weights.shape != loc.shape[:2]:
            raise ValueError(
                "weights and loc must have the shapes (B, K) and (B, K, D), got "
                f"{tuple(weights.shape)} and {tuple(loc.shape)}"
            )
        if scale_tril.shape != (*loc.shape, loc.shape[-1]):
            raise ValueError(
                f"scale_tril must have the shape (B, K, D, D) = {(*loc.shape, loc.shape[-1])}, "
                f"got {tuple(scale_tril.shape)}"
            )
        if dof is not None and (dof != int(dof) or dof <= 2):
            raise ValueError(f"dof must be an integer above 2, or None for Gaussians, got {dof}")
        self.weights, self.loc, self.scale_tril = weights, loc, scale_tril
        self.dof = dof
        self._whitening: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(loc.shape[:1], loc.shape[-1:], validate_args=validate_args)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_shape={tuple(self.loc.shape[:1])}, "
            f"n_components={self.n_components}, n_latent={self.loc.shape[-1]}, dof={self.dof})"
        )

    @property
    def n_components(self) -> int:
        """Number of components `K`."""
        return self.loc.shape[1]

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture, `(B, D)`."""
        return torch.einsum("bk,bkd->bd", self.weights, self.loc)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the mixture, `(B, D, D)`: law of total variance."""
        inflation = 1.0 if self.dof is None else self.dof / (self.dof - 2)
        within = inflation * self.scale_tril @ self.scale_tril.mT
        deviation = self.loc - self.mean.unsqueeze(1)
        between = deviation.unsqueeze(-1) * deviation.unsqueeze(-2)
        return torch.einsum("bk,bkde->bde", self.weights, within + between)

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each latent dimension, `(B, D)`."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)

    def select(self, cells: Tensor) -> StudentMixture:
        """The mixtures of some of the cells.

        Parameters
        ----------
        cells
            Indices, `(n,)`.

        Returns
        -------
        Mixtures of batch shape `(n,)`.
        """
        selected = StudentMixture(
            self.weights[cells], self.loc[cells], self.scale_tril[cells], self.dof
        )
        if self._whitening is not None:  # inverses cost more than they take memory
            center, inverse, whitened = self._whitening
            selected._whitening = center[cells], inverse[cells], whitened[cells]
        return selected

    def _whiteners(self) -> tuple[Tensor, Tensor, Tensor]:
        """What :func:`squared_distances` takes: a center, inverse factors, whitened centers."""
        if self._whitening is None:
            identity = torch.eye(self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
            inverse = torch.linalg.solve_triangular(
                self.scale_tril, identity.expand_as(self.scale_tril), upper=False
            )
            center = self.loc.mean(1)
            whitened = torch.einsum("bkde,bke->bkd", inverse, self.loc - center.unsqueeze(1))
            self._whitening = center, inverse.contiguous(), whitened
        return self._whitening

    def component_log_prob(self, value: Tensor) -> Tensor:
        """Log-density of points under every component, weighted: log of alpha_k q_k(z).

        Parameters
        ----------
        value
            Points, `(..., B, D)`.

        Returns
        -------
        Log-densities, `(..., B, K)`, in the parameters' precision.
        """
        n_latent = self.loc.shape[-1]
        points = value.reshape(-1, *value.shape[-2:])
        distance = squared_distances(points, *self._whiteners())  # (N, B, K)
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if self.dof is None:
            log_norm = -0.5 * n_latent * math.log(2 * math.pi)
            log_prob = -0.5 * distance
        else:
            half = 0.5 * (self.dof + n_latent)
            log_norm = math.lgamma(half) - math.lgamma(0.5 * self.dof)
            log_norm -= 0.5 * n_latent * math.log(self.dof * math.pi)
            log_prob = -half * torch.log1p(distance / self.dof)
        log_prob = log_prob + (log_norm - log_det + self.weights.log())
        return log_prob.reshape(*value.shape[:-1], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the mixture.

        Parameters
        ----------
        value
            Points, `(..., B, D)`.

        Returns
        -------
        Log-densities, `(..., B)`, in the parameters' precision.
        """
        return self.component_log_prob(value).logsumexp(-1)

    def sample(
        self,
        sample_shape: torch.Size | list[int] | tuple[int, ...] = (),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Independent draws; they carry no gradient.

        Parameters
        ----------
        sample_shape
            Leading shape of the draws.
        generator
            Source of randomness; the default generator of torch when ``None``.

        Returns
        -------
        Draws of shape `(*sample_shape, B, D)`.
        """
        shape = torch.Size(sample_shape)
        uniform = self._rand(shape.numel(), len(self.loc), generator=generator)

        def noise(first: int, last: int) -> Tensor:
            return self._randn(len(self.loc), last - first, self.loc.shape[-1], generator=generator)

        return self._sample(uniform, noise, generator).view(*shape, *self.loc[:, 0].shape)

    def sample_stratified(self, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws that fill each mixture more evenly than independent ones would.

        Their numbers per component follow the weights as closely as integers can (systematic
        sampling), and they come ordered by component: only all of them together stand for the
        mixture. The normal variables that make them are quantiles at the points of Sobol's sequence
        (USSR Computational Mathematics and Mathematical Physics 1967), shifted at random for each
        mixture (Cranley & Patterson, SIAM Journal on Numerical Analysis 1976); what a Student's t
        divides them by is independent. Each draw follows its component, so the average of a
        function over all draws is unbiased for its mean. As a rule it varies less than over
        independent draws, the more so the fewer the dimensions: with thirty, about as much.

        Parameters
        ----------
        n_samples
            Draws per mixture, `N`.
        generator
            Source of randomness; the default generator of torch when ``None``.

        Returns
        -------
        Draws, `(N, B, D)`, without gradient.
        """
        steps = torch.arange(n_samples, dtype=self.loc.dtype, device=self.loc.device)
        offset = self._rand(1, len(self.loc), generator=generator)
        uniform = (steps.unsqueeze(-1) + offset) / n_samples
        n_cells, _, n_latent = self.loc.shape
        points = _sobol(n_samples, n_latent).to(self.loc)
        shift = self._rand(n_cells, 1, n_latent, generator=generator)
        least = torch.finfo(self.loc.dtype).eps

        def noise(first: int, last: int) -> Tensor:
            quantile = (points[first:last] + shift).frac().clamp(least, 1 - least)
            return math.sqrt(2) * torch.erfinv(2 * quantile - 1)

        return self._sample(uniform, noise, generator)

    def _rand(self, *shape: int, generator: torch.Generator | None) -> Tensor:
        return torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device, generator=generator)

    def _randn(self, *shape: int, generator: torch.Generator | None) -> Tensor:
        return torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device, generator=generator)

    @torch.no_grad()
    def _sample(
        self,
        uniform: Tensor,
        noise: Callable[[int, int], Tensor],
        generator: torch.Generator | None,
    ) -> Tensor:
        """Draws `(N, B, D)` of the components at quantiles `uniform`, `(N, B)`.

        Called with the numbers of the first draw and the one after the last, `noise` gives standard
        normal variables `(B, n, D)`.
        """
        n_cells, n_components, n_latent = self.loc.shape
        edges = self.weights.detach().cumsum(-1)[:, :-1].contiguous()
        component = torch.searchsorted(edges, uniform.mT.contiguous(), right=True)  # (B, N)
        columns = self.scale_tril.flatten(1, 2).mT
        passes, done = [], 0
        for chosen in component.split(max(1, _ELEMENTS_AT_ONCE // self.loc.numel()), dim=1):
            n = chosen.shape[1]
            steps = noise(done, done + n)
            done += n
            if self.dof is not None:
                normal = self._randn(n_cells, n, self.dof, generator=generator)
                steps = steps * (self.dof / normal.square().sum(-1, keepdim=True)).sqrt()
            candidates = (steps @ columns).unflatten(-1, (n_components, n_latent))
            index = chosen[..., None, None].expand(-1, -1, 1, n_latent)
            deviation = candidates.gather(2, index).squeeze(2)
            passes.append(deviation + self.loc.gather(1, index.squeeze(2)))
        return torch.cat(passes, 1).transpose(0, 1)
