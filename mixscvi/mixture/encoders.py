"""Encoders from an input to the parameters of the mixture's components: a trunk and heads.

Every encoder is called as ``encoder(x, covariates, components)`` and returns a
:class:`~mixscvi.mixture.posterior.MixturePosterior`; ``components`` restricts it to those
components, at the cost of those alone. The trunk maps inputs to hidden units, the
:mod:`~mixscvi.mixture.heads` map these to Gaussians.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mixscvi.mixture.heads import CodedHeads, GaussianHeads, Heads
from mixscvi.mixture.mlp import StackedMLP
from mixscvi.mixture.posterior import MixturePosterior

__all__ = ["AmortizedEncoder", "Encoder", "SeparateEncoder"]


class Encoder(nn.Module):
    """A trunk and heads.

    Parameters
    ----------
    trunk
        Called as ``trunk(x, covariates, components)``: hidden units `(B, S, n_hidden)` of the
        networks asked for. Heads that share a trunk ask for the only one.
    heads
        One of the :mod:`~mixscvi.mixture.heads`.

    Examples
    --------
    >>> import torch
    >>> from mixscvi.mixture import ShiftedHeads
    >>> trunk = StackedMLP(1, n_in=20, n_hidden=8, activation=torch.nn.Identity)
    >>> heads = ShiftedHeads(4, n_in=8, n_hidden=8, n_latent=2, activation=torch.relu)
    >>> Encoder(trunk, heads)(torch.zeros(6, 20))
    MixturePosterior(batch_shape=(6,), n_components=4, n_latent=2)
    """

    def __init__(self, trunk: nn.Module, heads: Heads) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, heads

    @property
    def n_components(self) -> int:
        """Number of components, `A`."""
        return self.heads.n_components

    def forward(
        self,
        x: Tensor,
        covariates: Tensor | None = None,
        components: Tensor | None = None,
    ) -> MixturePosterior:
        """Encode inputs into the components asked for.

        Parameters
        ----------
        x
            Inputs, `(B, n_in)`.
        covariates
            Values of the covariates, `(B, n_covariates)`, if the trunk takes any.
        components
            The `S` components asked for, `(S,)`; all `A` when ``None``.

        Returns
        -------
        A mixture of batch shape `(B,)` with `S` components.
        """
        networks = None if self.heads.share_trunk else components
        return self.heads(self.trunk(x, covariates, networks), components)


class SeparateEncoder(Encoder):
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
        See :class:`~mixscvi.mixture.heads.GaussianHeads`.
    **mlp_kwargs
        Passed to :class:`~mixscvi.mixture.mlp.StackedMLP`.

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
        trunk = StackedMLP(n_components, n_in, n_hidden=n_hidden, **mlp_kwargs)
        heads = GaussianHeads(
            n_components, n_hidden, n_latent, var_activation=var_activation, var_eps=var_eps
        )
        super().__init__(trunk, heads)


class AmortizedEncoder(Encoder):
    r"""One network for all components, which differ by a learned code each.

    The trunk runs once per cell, whatever `A` is, and
    :class:`~mixscvi.mixture.heads.CodedHeads` tell the components apart. Choose it for many
    components, or for few cells. A shared network that is told the component is the idea of Hotti
    et al., arXiv 2406.07083, where the component is an input of the network, which then runs `A`
    times. Here the code changes the heads instead, so the trunk runs once;
    :mod:`~mixscvi.mixture.heads` says why it does not shift pre-activations.

    Parameters
    ----------
    n_components, n_in, n_latent, n_hidden, var_activation, var_eps, **mlp_kwargs
        As in :class:`SeparateEncoder`.
    n_modes, code_scale
        See :class:`~mixscvi.mixture.heads.CodedHeads`.

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
        n_modes: int = 16,
        code_scale: float = 0.5,
        var_activation: Callable[[Tensor], Tensor] | None = None,
        var_eps: float = 1e-4,
        **mlp_kwargs: Any,
    ) -> None:
        trunk = StackedMLP(1, n_in, n_hidden=n_hidden, **mlp_kwargs)
        heads = CodedHeads(
            n_components,
            n_hidden,
            n_latent,
            n_modes=n_modes,
            code_scale=code_scale,
            var_activation=var_activation,
            var_eps=var_eps,
        )
        super().__init__(trunk, heads)
