"""The mixture posterior as scvi-tools reads it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from mixscvi.mixture import MixturePosterior

__all__ = ["FactorizedMixture"]


class FactorizedMixture(MixturePosterior):
    r"""The mixture posterior in the shape that scvi-tools expects of ``qz``.

    scvi-tools' methods take the posterior for a product over latent dimensions: they read ``loc``
    and ``scale`` and write ``qz.log_prob(z).sum(-1)``. So the batch shape here is `(B, D)`, and
    :meth:`log_prob` returns the terms of the chain rule, :math:`\log q(z_d \mid z_{<d})`, which
    sum to the joint log-density exactly.

    Parameters
    ----------
    component_loc, component_scale
        Means and standard deviations of the components, `(B, A, D)`.

    Examples
    --------
    >>> import torch
    >>> q = FactorizedMixture(torch.randn(3, 4, 2), torch.ones(3, 4, 2))
    >>> q.loc.shape, q.log_prob(q.loc).shape
    (torch.Size([3, 2]), torch.Size([3, 2]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "component_loc": constraints.real,
        "component_scale": constraints.positive,
    }
    support = constraints.real  # type: ignore[assignment]

    def __init__(self, component_loc: Tensor, component_scale: Tensor) -> None:
        super().__init__(component_loc, component_scale)
        self._batch_shape += self._event_shape
        self._event_shape = torch.Size()

    @property
    def loc(self) -> Tensor:
        """Mean of the mixture, `(B, D)`."""
        return self.mean

    @property
    def scale(self) -> Tensor:
        """Marginal standard deviations of the mixture, `(B, D)`."""
        return self.variance.sqrt()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, "
            f"n_components={self.n_components})"
        )

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: Any = None
    ) -> FactorizedMixture:
        """The same mixture for every element of a larger batch shape.

        Parameters
        ----------
        batch_shape
            What the batch shape broadcasts to; it ends in `D`.
        _instance
            Not used.

        Returns
        -------
        A distribution whose parameters are views of this one's.
        """
        *lead, n_latent = batch_shape
        shape = (*lead, self.n_components, n_latent)
        return FactorizedMixture(
            self.component_loc.expand(shape), self.component_scale.expand(shape)
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Terms of the chain rule; their sum is the joint log-density.

        Parameters
        ----------
        value
            Points, `(..., B, D)`.

        Returns
        -------
        `(..., B, D)`, in nats.
        """
        per_dimension = torch.distributions.Normal(
            self.component_loc, self.component_scale, validate_args=False
        ).log_prob(value.unsqueeze(-2))
        prefix = per_dimension.cumsum(-1).logsumexp(-2) - math.log(self.n_components)
        return torch.cat((prefix[..., :1], prefix.diff(dim=-1)), dim=-1)
