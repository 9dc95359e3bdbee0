"""Encoders from an input to the parameters of the mixture's components.

Every encoder is called as ``encoder(x, covariates, components)`` and returns a
:class:`~mixscvi.mixture.posterior.MixturePosterior`; ``components`` restricts it to those
components, at the cost of those alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixscvi.mixture.layers import StackedLinear, StackedMLP
from mixscvi.mixture.posterior import MixturePosterior

__all__ = ["AmortizedEncoder", "GaussianHeads", "SeparateEncoder"]


class GaussianHeads(nn.Module):
    """Means and scales of `A` Gaussians from their hidden units.

    Parameters
    ----------
    n_components
        Number of Gaussians, `A`; 1 for one pair of heads that all components share.
    n_hidden
        Hidden units.
    n_latent
        Latent dimensions, `D`.
    var_activation
        Maps the second head to a positive variance; :func:`torch.exp` by default.
    var_eps
        Least variance, added to the former.

    Examples
    --------
    >>> import torch
    >>> heads = GaussianHeads(4, n_hidden=8, n_latent=2)
    >>> heads(torch.zeros(6, 4, 8))
    MixturePosterior(batch_shape=(6,), n_components=4, n_latent=2)
    """

    def __init__(
        self,
        n_components: int,
        n_hidden: int,
        n_latent: int,
        *,
        var_activation: Callable[[Tensor], Tensor] | None = None,
        var_eps: float = 1e-4,
    ) -> None:
        super().__init__()
        self.mean = StackedLinear(n_components, n_hidden, n_latent)
        self.var = StackedLinear(n_components, n_hidden, n_latent)
        self.var_activation = torch.exp if var_activation is None else var_activation
        self.var_eps = var_eps

    def forward(self, hidden: Tensor, components: Tensor | None = None) -> MixturePosterior:
        """Map hidden units `(B, S, n_hidden)` to a mixture of `S` components."""
        if self.mean.n_components == 1:
            rows = hidden.flatten(0, 1)
            loc = self.mean(rows).view(*hidden.shape[:2], -1)
            raw_var = self.var(rows).view(*hidden.shape[:2], -1)
        else:
            loc = self.mean(hidden, components)
            raw_var = self.var(hidden, components)
        variance = self.var_activation(raw_var) + self.var_eps
        return MixturePosterior(loc, variance.sqrt())


class SeparateEncoder(nn.Module):
    """`A` encoders in one stack: nothing is shared between components.

    Choose it for a few components. Its parameters and its time grow with `A`.

    Parameters
    ----------
    n_components
        Number of components, `A`.
    n_in
        Input features.
    n_latent
        Latent dimensions, `D`.
    n_hidden
        Width of the hidden layers.
    var_activation, var_eps
        See :class:`GaussianHeads`.
    **mlp_kwargs
        Passed to :class:`~mixscvi.mixture.layers.StackedMLP`.

    Examples
    --------
    >>> import torch
    >>> encoder = SeparateEncoder(4, n_in=20, n_latent=2, n_hidden=8)
    >>> encoder(torch.zeros(6, 20))
    MixturePosterior(batch_shape=(6,), n_components=4, n_latent=2)
    >>> encoder(torch.zeros(6, 20), components=torch.tensor([2, 0]))
    MixturePosterior(batch_shape=(6,), n_components=2, n_latent=2)
    """

    def __init__(
        self,
        n_components: int,
        n_in: int,
        n_latent: int,
        *,
        n_hidden: int = 128,
        var_activation: Callable[[Tensor], Tensor] | None = None,
        var_eps: float = 1e-4,
        **mlp_kwargs: Any,
    ) -> None:
        super().__init__()
        self.n_components = n_components
        self.trunk = StackedMLP(n_components, n_in, n_hidden=n_hidden, **mlp_kwargs)
        self.heads = GaussianHeads(
            n_components, n_hidden, n_latent, var_activation=var_activation, var_eps=var_eps
        )

    def forward(
        self,
        x: Tensor,
        covariates: Tensor | None = None,
        components: Tensor | None = None,
    ) -> MixturePosterior:
        """Encode `(B, n_in)` inputs into the components asked for."""
        return self.heads(self.trunk(x, covariates, components), components)


class AmortizedEncoder(nn.Module):
    r"""One trunk for all components; each component is a learned code of `n_hidden` numbers.

    The code joins the trunk's last hidden layer as the weights of one more one-hot input would,
    but behind the normalisations:

    .. math:: h_a(x) = \mathrm{dropout}(\phi(t(x) + c_a)), \qquad
        \mu_a, \sigma_a = \mathrm{heads}(h_a)

    where t(x) is the last layer's normalised pre-activation. Codes in front of a batch norm would
    be subtracted again with the batch mean whenever a step draws one component alone; behind it
    they survive, and the trunk runs once per cell, whatever `A` is. Choose it for many
    components. The construction follows Hotti et al., arXiv 2406.07083; where the code enters is
    our choice, for the reason given.

    Parameters
    ----------
    n_components
        Number of components, `A`.
    n_in
        Input features.
    n_latent
        Latent dimensions, `D`.
    n_hidden
        Width of the hidden layers.
    n_layers
        Number of hidden layers.
    code_scale
        Standard deviation of the codes at the start; sets how far components begin apart.
    dropout_rate, activation
        As in :class:`~mixscvi.mixture.layers.StackedMLP`.
    var_activation, var_eps
        See :class:`GaussianHeads`.
    **mlp_kwargs
        Passed to :class:`~mixscvi.mixture.layers.StackedMLP`.

    Examples
    --------
    >>> import torch
    >>> encoder = AmortizedEncoder(400, n_in=20, n_latent=2, n_hidden=8)
    >>> encoder(torch.zeros(6, 20), components=torch.tensor([399]))
    MixturePosterior(batch_shape=(6,), n_components=1, n_latent=2)
    """

    def __init__(
        self,
        n_components: int,
        n_in: int,
        n_latent: int,
        *,
        n_hidden: int = 128,
        n_layers: int = 1,
        code_scale: float = 0.5,
        dropout_rate: float = 0.1,
        activation: Callable[[], nn.Module] = nn.ReLU,
        var_activation: Callable[[Tensor], Tensor] | None = None,
        var_eps: float = 1e-4,
        **mlp_kwargs: Any,
    ) -> None:
        super().__init__()
        self.n_components = n_components
        self.trunk = StackedMLP(
            1,
            n_in,
            n_hidden=n_hidden,
            n_layers=n_layers,
            dropout_rate=dropout_rate,
            activation=activation,
            last_activation=False,
            **mlp_kwargs,
        )
        self.codes = nn.Parameter(code_scale * torch.randn(n_components, n_hidden))
        self.activation = activation()
        self.dropout = nn.Dropout(dropout_rate)
        self.heads = GaussianHeads(
            1, n_hidden, n_latent, var_activation=var_activation, var_eps=var_eps
        )

    def forward(
        self,
        x: Tensor,
        covariates: Tensor | None = None,
        components: Tensor | None = None,
    ) -> MixturePosterior:
        """Encode `(B, n_in)` inputs into the components asked for."""
        codes = self.codes if components is None else self.codes.index_select(0, components)
        shared = self.trunk(x, covariates)
        return self.heads(self.dropout(self.activation(shared + codes)))
