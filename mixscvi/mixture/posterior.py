"""A mixture of diagonal Gaussians as one distribution."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from mixscvi.mixture.diagnostics import jensen_shannon_divergence
from mixscvi.mixture.gaussians import diagonal_normal_log_prob, in_bounded_memory
from mixscvi.mixture.objectives import mixture_log_prob

__all__ = ["MixturePosterior"]


def _mixture_log_prob(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return mixture_log_prob(diagonal_normal_log_prob(z, loc, scale))


def _randn(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)


class MixturePosterior(Distribution):
    r"""Uniform mixture of `A` diagonal Gaussians, one mixture per cell or image.

    .. math::
        q(z \mid x) = \frac{1}{A} \sum_{a=1}^{A} \mathcal{N}(z; \mu_a(x), \mathrm{diag}\,
        \sigma_a(x)^2)

    Parameters
    ----------
    component_loc
        Component means, `(B, A, D)`. Further axes may come before `B`, or none at all.
    component_scale
        Component standard deviations, positive, same shape.
    validate_args
        Whether torch checks the values of the two parameters; costs a pass over them.

    Raises
    ------
    ValueError
        If the two parameters do not have one shape `(..., A, D)`.

    Notes
    -----
    The batch shape is `(B,)` and the event shape `(D,)`: :meth:`log_prob` is the joint
    log-density over the latent dimensions. The definition is eq. 1 of Kviman et al.,
    arXiv 2209.15514.

    Examples
    --------
    >>> import torch
    >>> loc = torch.tensor([[[-2.0, 0.0], [2.0, 0.0]]])  # one cell, A = 2, D = 2
    >>> q = MixturePosterior(loc, torch.ones_like(loc))
    >>> q
    MixturePosterior(batch_shape=(1,), n_components=2, n_latent=2)
    >>> q.mean, q.variance
    (tensor([[0., 0.]]), tensor([[5., 1.]]))
    >>> q.rsample_stratified(7).shape  # (L, B, A, D)
    torch.Size([7, 1, 2, 2])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "component_loc": constraints.independent(constraints.real, 2),
        "component_scale": constraints.independent(constraints.positive, 2),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        component_loc: Tensor,
        component_scale: Tensor,
        *,
        validate_args: bool = False,
    ) -> None:
        if component_loc.dim() < 2 or component_loc.shape != component_scale.shape:
            raise ValueError(
                "component_loc and component_scale must have one shape (..., A, D), got "
                f"{tuple(component_loc.shape)} and {tuple(component_scale.shape)}"
            )
        self.component_loc = component_loc
        self.component_scale = component_scale
        super().__init__(
            component_loc.shape[:-2], component_loc.shape[-1:], validate_args=validate_args
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_shape={tuple(self.component_loc.shape[:-2])}, "
            f"n_components={self.n_components}, n_latent={self.component_loc.shape[-1]})"
        )

    @property
    def n_components(self) -> int:
        """Number of components `A`."""
        return self.component_loc.shape[-2]

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture, `(B, D)`."""
        return self.component_loc.mean(-2)

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each latent dimension, `(B, D)`: law of total variance."""
        within = self.component_scale.square().mean(-2)
        between = (self.component_loc - self.mean.unsqueeze(-2)).square().mean(-2)
        return within + between

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: Any = None
    ) -> Self:
        """The same mixture for every element of a larger batch shape.

        Parameters
        ----------
        batch_shape
            What the batch shape broadcasts to.
        _instance
            As in :class:`torch.distributions.Distribution`: for subclasses.

        Returns
        -------
        A distribution whose parameters are views of this one's.
        """
        new = self._get_checked_instance(MixturePosterior, _instance)
        event = self.component_loc.shape[-2:]
        new.component_loc = self.component_loc.expand(*batch_shape, *event)
        new.component_scale = self.component_scale.expand(*batch_shape, *event)
        Distribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(
        self,
        sample_shape: torch.Size | list[int] | tuple[int, ...] = (),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw from the mixture: a component at random, then a point of it.

        The draw is differentiable in the chosen component's mean and scale; the choice itself
        carries no gradient (the weights are constants).

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
        shape = torch.Size(sample_shape) + self.component_loc.shape[:-2]
        component = torch.randint(
            self.n_components, shape, device=self.component_loc.device, generator=generator
        )
        index = component[..., None, None].expand(*shape, 1, self.component_loc.shape[-1])
        full = torch.Size(sample_shape) + self.component_loc.shape
        loc = self.component_loc.expand(full).gather(-2, index).squeeze(-2)
        scale = self.component_scale.expand(full).gather(-2, index).squeeze(-2)
        return loc + scale * _randn(loc.shape, loc, generator)

    def sample(
        self,
        sample_shape: torch.Size | list[int] | tuple[int, ...] = (),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As :meth:`rsample`, without gradients.

        Parameters
        ----------
        sample_shape, generator
            As in :meth:`rsample`.

        Returns
        -------
        Draws of shape `(*sample_shape, B, D)`.
        """
        with torch.no_grad():
            return self.rsample(sample_shape, generator)

    def rsample_stratified(
        self,
        n_samples: int = 1,
        components: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw `n_samples` points from each component (or from each of `components`).

        Parameters
        ----------
        n_samples
            Draws per component, `L`.
        components
            Indices of the `S` components to draw from, `(S,)`; all `A` when ``None``. An index
            may occur more than once.
        generator
            Source of randomness; the default generator of torch when ``None``.

        Returns
        -------
        Reparameterized draws, `(L, B, S, D)`.
        """
        loc, scale = self.component_loc, self.component_scale
        if components is not None:
            loc = loc.index_select(-2, components)
            scale = scale.index_select(-2, components)
        return loc + scale * _randn((n_samples, *loc.shape), loc, generator)

    def component_log_prob(self, value: Tensor) -> Tensor:
        """Log-density of points under every component.

        Parameters
        ----------
        value
            Points, `(..., B, D)`.

        Returns
        -------
        Log-densities, `(..., B, A)`.
        """
        return in_bounded_memory(
            diagonal_normal_log_prob,
            value.unsqueeze(-2),
            self.component_loc,
            self.component_scale,
        )

    def cross_log_prob(self, draws: Tensor) -> Tensor:
        """Log-density of every component's draws under every component.

        Parameters
        ----------
        draws
            What :meth:`rsample_stratified` returns, `(L, B, S, D)`.

        Returns
        -------
        Log-densities, `(L, B, S, A)`.
        """
        return in_bounded_memory(
            diagonal_normal_log_prob,
            draws.unsqueeze(-2),
            self.component_loc.unsqueeze(-3),
            self.component_scale.unsqueeze(-3),
        )

    def own_log_prob(self, draws: Tensor, components: Tensor | None = None) -> Tensor:
        """Log-density of every draw under the component that it came from.

        Parameters
        ----------
        draws, components
            What :meth:`rsample_stratified` returned, `(L, B, S, D)`, and was given.

        Returns
        -------
        Log-densities, `(L, B, S)`.
        """
        loc, scale = self.component_loc, self.component_scale
        if components is not None:
            loc, scale = loc.index_select(-2, components), scale.index_select(-2, components)
        return diagonal_normal_log_prob(draws, loc, scale)

    def stratified_log_prob(self, draws: Tensor) -> Tensor:
        """Log-density of the mixture at every component's draws.

        The same as the mixture of :meth:`cross_log_prob`, which is not held in memory.

        Parameters
        ----------
        draws
            What :meth:`rsample_stratified` returns, `(L, B, S, D)`.

        Returns
        -------
        Log-densities, `(L, B, S)`.
        """
        return self.log_prob(draws.movedim(-2, 1)).movedim(1, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the mixture.

        Parameters
        ----------
        value
            Points, `(..., B, D)`.

        Returns
        -------
        Log-densities, `(..., B)`.
        """
        return in_bounded_memory(
            _mixture_log_prob, value.unsqueeze(-2), self.component_loc, self.component_scale
        )

    def jensen_shannon_divergence(
        self, n_samples: int = 100, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""Monte-Carlo estimate of the components' Jensen-Shannon divergence, in nats.

        .. math::
            \mathrm{JSD}(q_1, \dots, q_A) = \frac{1}{A} \sum_a \mathrm{KL}(q_a \,\|\, q)

        It is what MISELBO gains over the average ELBO of the components (Kviman et al., AISTATS
        2022): 0 when all components coincide, log A when they are disjoint. The estimate is
        unbiased, so it may fall a little outside [0, log A].

        Parameters
        ----------
        n_samples
            Draws per component, `L`.
        generator
            Source of randomness; the default generator of torch when ``None``.

        Returns
        -------
        Estimates, `(B,)`.
        """
        draws = self.rsample_stratified(n_samples, generator=generator)
        return jensen_shannon_divergence(self.cross_log_prob(draws))
