"""Image encoders: gated trunks with the core's Gaussian heads, separate or amortised.

Both are called like every encoder of the core, so the core's priors take them as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixscvi.images.networks import gate
from mixscvi.mixture import GaussianHeads, MixturePosterior, StackedLinear
from mixscvi.mixture.layers import rows

__all__ = ["ComponentEncoder", "ConditionalEncoder", "ImageEncoder", "clamped_variance"]

ComponentEncoder = Literal["separate", "amortized"]
"""Nothing shared between components, or all but one small code each."""


def clamped_variance(raw: Tensor) -> Tensor:
    """Variance of a Gaussian from its logarithm, held in [-6, 2].

    Examples
    --------
    >>> import torch
    >>> clamped_variance(torch.tensor([0.0, 99.0]))
    tensor([1.0000, 7.3891])
    """
    return F.hardtanh(raw, -6.0, 2.0).exp()


def _make_codes(n_components: int, n_hidden: int, scale: float) -> nn.Parameter:
    """A code per component, to be added to both halves of gated pre-activations."""
    return nn.Parameter(scale * torch.randn(n_components, 2 * n_hidden))


class ImageEncoder(nn.Module):
    r"""q(z | x): a trunk's pre-activations, gated, and the heads of `A` Gaussians.

    Separate components have a trunk and heads each. Amortised ones share both; a component is
    then a code that is added to the last pre-activations, so it shifts features and gates:

    .. math:: h_a(x) = \mathrm{gate}(t(x) + c_a), \qquad \mu_a, \sigma_a = \mathrm{heads}(h_a)

    Parameters
    ----------
    make_trunk
        Makes the trunk of as many networks as it is asked for.
    n_components
        Number of components, `A`.
    n_latent
        Latent dimensions, `D`.
    component_encoder
        Whether components are ``"separate"`` or ``"amortized"``.
    code_scale
        Standard deviation of the codes at the start.

    Examples
    --------
    >>> import functools, torch
    >>> from mixscvi.images.networks import DenseTrunk
    >>> make_trunk = functools.partial(DenseTrunk, image_shape=(5, 7), hidden=(8, 6))
    >>> encoder = ImageEncoder(make_trunk, n_components=4, n_latent=2)
    >>> encoder(torch.zeros(3, 1, 5, 7))
    MixturePosterior(batch_shape=(3,), n_components=4, n_latent=2)
    """

    def __init__(
        self,
        make_trunk: Callable[[int], nn.Module],
        n_components: int,
        n_latent: int,
        *,
        component_encoder: ComponentEncoder = "separate",
        code_scale: float = 0.5,
    ) -> None:
        super().__init__()
        amortized = component_encoder == "amortized"
        n_networks = 1 if amortized else n_components
        self.trunk = make_trunk(n_networks)
        self.codes = (
            _make_codes(n_components, self.trunk.n_hidden, code_scale) if amortized else None
        )
        self.heads = GaussianHeads(
            n_networks,
            self.trunk.n_hidden,
            n_latent,
            var_activation=clamped_variance,
            var_eps=0.0,
        )

    def forward(
        self, x: Tensor, covariates: None = None, components: Tensor | None = None
    ) -> MixturePosterior:
        """Encode images `(B, 1, height, width)` into the components asked for."""
        if self.codes is None:
            return self.heads(gate(self.trunk(x, components)), components)
        codes = rows(self.codes, components)
        return self.heads(gate(self.trunk(x) + codes))


class ConditionalEncoder(nn.Module):
    r"""q(z1 | x, z2), the lower level of a hierarchy, for every component at every draw of z2.

    The image and the draw each pass a gated network; their sum is gated again and feeds the
    heads. The image is seen once, however many draws there are.

    Parameters
    ----------
    make_trunk
        Makes the image's trunk of as many networks as it is asked for.
    n_components
        Number of components, `A`.
    n_latent
        Latent dimensions of both levels, `D`.
    n_hidden
        Width of the gated layers.
    component_encoder, code_scale
        As in :class:`ImageEncoder`.

    Examples
    --------
    >>> import functools, torch
    >>> from mixscvi.images.networks import DenseTrunk
    >>> make_trunk = functools.partial(DenseTrunk, image_shape=(5, 7), hidden=(8, 6))
    >>> encoder = ConditionalEncoder(make_trunk, n_components=4, n_latent=2, n_hidden=9)
    >>> draws = torch.zeros(10, 3, 4, 2)  # L = 10, B = 3, S = 4
    >>> encoder(torch.zeros(3, 1, 5, 7), draws)
    MixturePosterior(batch_shape=(10, 3, 4), n_components=4, n_latent=2)
    """

    def __init__(
        self,
        make_trunk: Callable[[int], nn.Module],
        n_components: int,
        n_latent: int,
        *,
        n_hidden: int,
        component_encoder: ComponentEncoder = "separate",
        code_scale: float = 0.5,
    ) -> None:
        super().__init__()
        amortized = component_encoder == "amortized"
        n_networks = 1 if amortized else n_components
        self.trunk = make_trunk(n_networks)
        self.from_image = StackedLinear(n_networks, self.trunk.n_hidden, 2 * n_hidden)
        self.latent_trunk = StackedLinear(n_networks, n_latent, 2 * n_hidden)
        self.from_latent = StackedLinear(n_networks, n_hidden, 2 * n_hidden, bias=False)
        self.codes = _make_codes(n_components, n_hidden, code_scale) if amortized else None
        self.heads = GaussianHeads(
            n_networks, n_hidden, n_latent, var_activation=clamped_variance, var_eps=0.0
        )

    def forward(
        self, x: Tensor, upper: Tensor, components: Tensor | None = None
    ) -> MixturePosterior:
        """Condition on images `(B, 1, height, width)` and draws of z2 `(L, B, S, D)`.

        Returns
        -------
        The posterior with batch shape `(L, B, S)` and the components on the next axis: all `A`,
        or those asked for.
        """
        networks = components if self.codes is None else None
        image = self.from_image(gate(self.trunk(x, networks)), networks)
        latent = self.latent_trunk(upper.flatten(0, 2), networks)
        latent = self.from_latent(gate(latent), networks).unflatten(0, upper.shape[:3])
        joint = latent + image.unsqueeze(1)
        if self.codes is not None:
            codes = rows(self.codes, components)
            joint = joint + codes
        flat = self.heads(gate(joint).flatten(0, 2), networks)
        return MixturePosterior(
            flat.component_loc.unflatten(0, upper.shape[:3]),
            flat.component_scale.unflatten(0, upper.shape[:3]),
        )
