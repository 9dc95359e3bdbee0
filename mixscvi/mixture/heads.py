"""Heads of encoders: from hidden units to the means and scales of `A` Gaussians.

What components share is decided here:

============== ================== ======================================================
heads          trunk              a component is
============== ================== ======================================================
GaussianHeads  one per component  a network of its own
CodedHeads     shared             a code that weights the modes of the heads
ShiftedHeads   shared             a code that is added to the last pre-activations
============== ================== ======================================================

The two ways to share a trunk are not interchangeable. A batch norm behind the shift would subtract
a code again whenever a step draws one component alone, so networks with batch norms take
:class:`CodedHeads`. Gated networks without norms, such as those for images, take
:class:`ShiftedHeads`, which costs fewer parameters and lets a code close gates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixscvi.mixture.layers import StackedLinear, rows
from mixscvi.mixture.posterior import MixturePosterior

__all__ = ["CodedHeads", "GaussianHeads", "Heads", "ShiftedHeads"]

# Shifted pre-activations that are held at once: 64 MiB in single precision.
_ELEMENTS_AT_ONCE = 2**24


class Heads(nn.Module):
    """What all heads have: a number of components, and a map from raw outputs to variances."""

    share_trunk: ClassVar[bool]
    """Whether all components share the hidden units of one network."""

    def __init__(
        self,
        n_components: int,
        var_activation: Callable[[Tensor], Tensor] | None,
        var_eps: float,
    ) -> None:
        super().__init__()
        self.n_components = n_components
        self.var_activation = torch.exp if var_activation is None else var_activation
        self.var_eps = var_eps

    def _mixture(self, loc: Tensor, raw_var: Tensor) -> MixturePosterior:
        return MixturePosterior(loc, (self.var_activation(raw_var) + self.var_eps).sqrt())


class GaussianHeads(Heads):
    """Means and scales of `A` Gaussians from their hidden units.

    Parameters
    ----------
    n_components
        Number of Gaussians, `A`; 1 for one pair of heads that all components share.
    n_hidden
        Hidden units.
    n_latent
        Latent dimensions, `D`.
    activation
        Applied to what the trunk returns, to give `n_hidden` hidden units; nothing when ``None``.
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

    share_trunk = False

    def __init__(
        self,
        n_components: int,
        n_hidden: int,
        n_latent: int,
        *,
        activation: Callable[[Tensor], Tensor] | None = None,
        var_activation: Callable[[Tensor], Tensor] | None = None,
        var_eps: float = 1e-4,
    ) -> None:
        super().__init__(n_components, var_activation, var_eps)
        self.activation = activation
        self.mean = StackedLinear(n_components, n_hidden, n_latent)
        self.var = StackedLinear(n_components, n_hidden, n_latent)

    def forward(self, hidden: Tensor, components: Tensor | None = None) -> MixturePosterior:
        """Map what networks return to a mixture.

        Parameters
        ----------
        hidden
            What the `S` networks return: `(B, S, n_hidden)` once `activation` is applied.
        components
            The `S` components asked for, `(S,)`; all `A` when ``None``.

        Returns
        -------
        A mixture of batch shape `(B,)` with `S` components.
        """
        if self.activation is not None:
            hidden = self.activation(hidden)
        if self.mean.n_components == 1:
            flat = hidden.flatten(0, 1)
            loc = self.mean(flat).view(*hidden.shape[:2], -1)
            raw_var = self.var(flat).view(*hidden.shape[:2], -1)
        else:
            loc = self.mean(hidden, components)
            raw_var = self.var(hidden, components)
        return self._mixture(loc, raw_var)


class ShiftedHeads(GaussianHeads):
    r"""One pair of heads for `A` components that differ by a shift of the last pre-activations.

    .. math:: h_a = g(t + c_a), \qquad \mu_a, \sigma_a = \mathrm{heads}(h_a)

    with the trunk's pre-activations t, a code c_a for each component and an activation g. Past a
    fixed number of pre-activations, components are taken in parts, which are computed again in the
    backward pass.

    Parameters
    ----------
    n_in
        Pre-activations that the trunk returns, and length of a code.
    n_hidden
        Hidden units that the activation makes of them: half as many if it is a gate.
    activation
        g; with a linear one, components would differ by constants alone.
    code_scale
        Standard deviation of the codes at initialization.
    n_components, n_latent, var_activation, var_eps
        As in :class:`GaussianHeads`.

    Examples
    --------
    >>> import torch
    >>> heads = ShiftedHeads(4, n_in=8, n_hidden=8, n_latent=2, activation=torch.relu)
    >>> heads(torch.zeros(6, 1, 8))
    MixturePosterior(batch_shape=(6,), n_components=4, n_latent=2)
    """

    share_trunk = True

    def __init__(
        self,
        n_components: int,
        n_in: int,
        n_hidden: int,
        n_latent: int,
        *,
        activation: Callable[[Tensor], Tensor],
        code_scale: float = 0.5,
        var_activation: Callable[[Tensor], Tensor] | None = None,
        var_eps: float = 1e-4,
    ) -> None:
        # Drawn before the heads: recorded runs depend on the order of the draws.
        codes = code_scale * torch.randn(n_components, n_in)
        super().__init__(
            1,
            n_hidden,
            n_latent,
            activation=activation,
            var_activation=var_activation,
            var_eps=var_eps,
        )
        self.n_components = n_components
        self.codes = nn.Parameter(codes)

    def forward(self, hidden: Tensor, components: Tensor | None = None) -> MixturePosterior:
        """Map shared pre-activations to a mixture.

        Parameters
        ----------
        hidden
            `(B, 1, n_in)`; or `(B, S, n_in)`, one input for each of the components asked for.
        components
            The `S` components, `(S,)`; all `A` when ``None``.

        Returns
        -------
        A mixture of batch shape `(B,)` with `S` components.
        """
        codes = rows(self.codes, components)
        n_at_once = max(1, _ELEMENTS_AT_ONCE // max(1, len(hidden) * codes.shape[1]))
        if len(codes) <= n_at_once:
            return self._shifted(hidden, codes)
        inputs = itertools.repeat(hidden) if hidden.shape[1] == 1 else hidden.split(n_at_once, 1)
        parts = [
            checkpoint(self._loc_and_scale, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(inputs, codes.split(n_at_once), strict=False)
        ]
        loc, scale = (torch.cat(values, 1) for values in zip(*parts, strict=True))
        return MixturePosterior(loc, scale)

    def _shifted(self, hidden: Tensor, codes: Tensor) -> MixturePosterior:
        return super().forward(hidden + codes)

    def _loc_and_scale(self, hidden: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        part = self._shifted(hidden, codes)
        return part.component_loc, part.component_scale


class CodedHeads(Heads):
    r"""Means and scales of `A` Gaussians that share hidden units and differ by a code each.

    The heads of component a are a base and `R` modes, weighted by its code c_a, with an offset:

    .. math:: \mu_a, \log \sigma_a^2 = \Big(W_0 + \sum_{r=1}^{R} c_{ar} W_r\Big) h + b_0 + b_a

    The modes are applied to a cell once, so a component costs `R * D` products a cell, whatever
    the width of the network, and `R + 2 D` parameters.

    Parameters
    ----------
    n_modes
        Length of a code, `R`.
    code_scale
        Standard deviation, at initialization, of what the codes add to a base of one.
    n_components, n_hidden, n_latent, var_activation, var_eps
        As in :class:`GaussianHeads`.

    Examples
    --------
    >>> import torch
    >>> heads = CodedHeads(400, n_hidden=8, n_latent=2)
    >>> heads(torch.zeros(6, 1, 8))
    MixturePosterior(batch_shape=(6,), n_components=400, n_latent=2)
    """

    share_trunk = True

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
        super().__init__(n_components, var_activation, var_eps)
        self.n_modes, self.n_latent = n_modes, n_latent
        self.base = nn.Linear(n_hidden, 2 * n_latent)
        self.modes = nn.Linear(n_hidden, n_modes * 2 * n_latent, bias=False)
        self.codes = nn.Parameter(code_scale / n_modes**0.5 * torch.randn(n_components, n_modes))
        self.offsets = nn.Parameter(torch.zeros(n_components, 2 * n_latent))

    def forward(self, hidden: Tensor, components: Tensor | None = None) -> MixturePosterior:
        """Map shared hidden units to a mixture.

        Parameters
        ----------
        hidden
            `(B, 1, n_hidden)`.
        components
            The `S` components asked for, `(S,)`; all `A` when ``None``.

        Returns
        -------
        A mixture of batch shape `(B,)` with `S` components.
        """
        hidden = hidden.squeeze(1)
        codes = rows(self.codes, components)
        offsets = rows(self.offsets, components)
        # The base is one more mode, which every component has in full.
        modes = torch.cat((self.modes(hidden), self.base(hidden)), dim=-1)
        modes = modes.unflatten(-1, (self.n_modes + 1, 2 * self.n_latent))
        weights = torch.cat((codes, codes.new_ones(len(codes), 1)), dim=-1)
        n_cells = len(hidden)
        raw = torch.baddbmm(offsets.expand(n_cells, -1, -1), weights.expand(n_cells, -1, -1), modes)
        loc, raw_var = raw.chunk(2, dim=-1)
        return self._mixture(loc, raw_var)
