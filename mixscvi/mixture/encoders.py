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

from mixscvi.mixture.layers import StackedLinear, rows
from mixscvi.mixture.mlp import StackedMLP
from mixscvi.mixture.posterior import MixturePosterior

__all__ = ["AmortizedEncoder", "CodedHeads", "GaussianHeads", "SeparateEncoder"]


class _Heads(nn.Module):
    """What heads share: how an unconstrained output becomes a variance."""

    def __init__(self, var_activation: Callable[[Tensor], Tensor] | None, var_eps: float) -> None:
        super().__init__()
        self.var_activation = torch.exp if var_activation is None else var_activation
        self.var_eps = var_eps

    def _mixture(self, loc: Tensor, raw_var: Tensor) -> MixturePosterior:
        return MixturePosterior(loc, (self.var_activation(raw_var) + self.var_eps).sqrt())


class GaussianHeads(_Heads):
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
        super().__init__(var_activation, var_eps)
        self.mean = StackedLinear(n_components, n_hidden, n_latent)
        self.var = StackedLinear(n_components, n_hidden, n_latent)

    def forward(self, hidden: Tensor, components: Tensor | None = None) -> MixturePosterior:
        """Map hidden units `(B, S, n_hidden)` to a mixture of `S` components."""
        if self.mean.n_components == 1:
            flat = hidden.flatten(0, 1)
            loc = self.mean(flat).view(*hidden.shape[:2], -1)
            raw_var = self.var(flat).view(*hidden.shape[:2], -1)
        else:
            loc = self.mean(hidden, components)
            raw_var = self.var(hidden, components)
        return self._mixture(loc, raw_var)


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


class CodedHeads(_Heads):
    r"""Means and scales of `A` Gaussians that share hidden units and differ by a code each.

    The heads of component a are a base and `R` modes, weighted by its code c_a, with an offset:

    .. math:: \mu_a, \log \sigma_a^2 = \Big(W_0 + \sum_{r=1}^{R} c_{ar} W_r\Big) h + b_0 + b_a

    The modes are applied to a cell once, so a component costs `R * D` products a cell, whatever
    the width of the network, and `R + 2 D` parameters.

    Parameters
    ----------
    n_components
        Number of Gaussians, `A`.
    n_hidden
        Hidden units.
    n_latent
        Latent dimensions, `D`.
    n_modes
        Length of a code, `R`.
    code_scale
        Standard deviation of what the codes add at the start, beside a base of one.
    var_activation, var_eps
        See :class:`GaussianHeads`.

    Examples
    --------
    >>> import torch
    >>> heads = CodedHeads(400, n_hidden=8, n_latent=2)
    >>> heads(torch.zeros(6, 8))
    MixturePosterior(batch_shape=(6,), n_components=400, n_latent=2)
    """

    def __init__(
        self,
        n_components: int,
        n_hidden: int,
        n_latent: int,
        *,
        n_modes: int = 16,
        code_scale: float = 0.5,
        var_activation: Callable[[Tensor], Tensor] | None = None,
        var_eps: float = 1e-4,
    ) -> None:
        super().__init__(var_activation, var_eps)
        self.n_modes, self.n_latent = n_modes, n_latent
        self.base = nn.Linear(n_hidden, 2 * n_latent)
        self.modes = nn.Linear(n_hidden, n_modes * 2 * n_latent, bias=False)
        self.codes = nn.Parameter(code_scale / n_modes**0.5 * torch.randn(n_components, n_modes))
        self.offsets = nn.Parameter(torch.zeros(n_components, 2 * n_latent))

    def forward(self, hidden: Tensor, components: Tensor | None = None) -> MixturePosterior:
        """Map shared hidden units `(B, n_hidden)` to a mixture of the components asked for."""
        codes = rows(self.codes, components)
        offsets = rows(self.offsets, components)
        modes = self.modes(hidden).unflatten(-1, (self.n_modes, 2 * self.n_latent))
        raw = torch.einsum("brd,ar->bad", modes, codes) + offsets + self.base(hidden).unsqueeze(1)
        loc, raw_var = raw.chunk(2, dim=-1)
        return self._mixture(loc, raw_var)


class AmortizedEncoder(nn.Module):
    r"""One network for all components, which differ by a learned code each.

    The trunk runs once per cell, whatever `A` is, and :class:`CodedHeads` tell the components
    apart. Choose it for many components, or for few cells. The idea of a shared network that is
    told the component is that of Hotti et al., arXiv 2406.07083, where it is an input of the
    network, which then runs `A` times; that the code turns the heads instead is our choice. In
    front of a batch norm, a code would also be subtracted again with the batch mean whenever a
    step draws one component alone.

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
    n_modes, code_scale
        See :class:`CodedHeads`.
    var_activation, var_eps
        See :class:`GaussianHeads`.
    **mlp_kwargs
        Passed to :class:`~mixscvi.mixture.mlp.StackedMLP`.

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
        super().__init__()
        self.n_components = n_components
        self.trunk = StackedMLP(1, n_in, n_hidden=n_hidden, **mlp_kwargs)
        self.heads = CodedHeads(
            n_components,
            n_hidden,
            n_latent,
            n_modes=n_modes,
            code_scale=code_scale,
            var_activation=var_activation,
            var_eps=var_eps,
        )

    def forward(
        self,
        x: Tensor,
        covariates: Tensor | None = None,
        components: Tensor | None = None,
    ) -> MixturePosterior:
        """Encode `(B, n_in)` inputs into the components asked for."""
        return self.heads(self.trunk(x, covariates).squeeze(1), components)
