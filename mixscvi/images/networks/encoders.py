"""Image encoders: gated trunks with the core's heads, for one level or the lower of two.

Components are separate, or they share one network and differ by a code that shifts its last
pre-activations, so features and gates alike. The counts' "amortized" encoder codes its heads
instead: :mod:`mixscvi.mixture.heads` says why these are two things.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixscvi.images.networks.layers import Trunk, gate
from mixscvi.mixture import Encoder, GaussianHeads, MixturePosterior, ShiftedHeads, StackedLinear

__all__ = ["ComponentEncoder", "ConditionalEncoder", "clamped_variance", "make_encoder"]

ComponentEncoder = Literal["separate", "shifted"]
"""Nothing shared between components, or all but one small code each."""

# Hidden units of all draws and components that the lower level holds: 64 MiB in single precision.
_ELEMENTS_AT_ONCE = 2**24


def clamped_variance(raw: Tensor) -> Tensor:
    """Variance of a Gaussian from its logarithm, clamped to [-6, 2].

    Examples
    --------
    >>> import torch
    >>> clamped_variance(torch.tensor([0.0, 99.0]))
    tensor([1.0000, 7.3891])
    """
    return F.hardtanh(raw, -6.0, 2.0).exp()


def _make_heads(
    n_components: int, n_hidden: int, n_latent: int, component_encoder: ComponentEncoder
) -> GaussianHeads:
    options: dict[str, Any] = {
        "activation": gate,
        "var_activation": clamped_variance,
        "var_eps": 0.0,
    }
    if component_encoder == "shifted":
        return ShiftedHeads(n_components, 2 * n_hidden, n_hidden, n_latent, **options)
    return GaussianHeads(n_components, n_hidden, n_latent, **options)


def make_encoder(
    make_trunk: Callable[[int], Trunk],
    n_components: int,
    n_latent: int,
    *,
    component_encoder: ComponentEncoder = "separate",
) -> Encoder:
    """Make an encoder q(z | x) of images.

    Parameters
    ----------
    make_trunk
        Makes the trunk of a given number of networks.
    n_components
        Number of components, `A`.
    n_latent
        Latent dimensions, `D`.
    component_encoder
        Whether components are ``"separate"``, or ``"shifted"`` by a code each.

    Examples
    --------
    >>> import functools, torch
    >>> from mixscvi.images.networks.layers import DenseTrunk
    >>> make_trunk = functools.partial(DenseTrunk, image_shape=(5, 7), hidden=(8, 6))
    >>> encoder = make_encoder(make_trunk, n_components=4, n_latent=2)
    >>> encoder(torch.zeros(3, 1, 5, 7))
    MixturePosterior(batch_shape=(3,), n_components=4, n_latent=2)
    """
    trunk = make_trunk(1 if component_encoder == "shifted" else n_components)
    return Encoder(trunk, _make_heads(n_components, trunk.n_hidden, n_latent, component_encoder))


class ConditionalEncoder(nn.Module):
    r"""q(z1 | x, z2), the lower level of a hierarchy, for every component at every draw of z2.

    The image and the draw each pass a gated network; their sum is gated again and feeds the
    heads. The image is encoded once, however many draws there are.

    Parameters
    ----------
    make_trunk
        Makes the image's trunk of a given number of networks.
    n_components
        Number of components, `A`.
    n_latent
        Latent dimensions of both levels, `D`.
    n_hidden
        Width of the gated layers, `H`.
    component_encoder
        As in :func:`make_encoder`.

    Examples
    --------
    >>> import functools, torch
    >>> from mixscvi.images.networks.layers import DenseTrunk
    >>> make_trunk = functools.partial(DenseTrunk, image_shape=(5, 7), hidden=(8, 6))
    >>> encoder = ConditionalEncoder(make_trunk, n_components=4, n_latent=2, n_hidden=9)
    >>> draws = torch.zeros(10, 3, 4, 2)  # L = 10, B = 3, S = 4
    >>> encoder(torch.zeros(3, 1, 5, 7), draws)
    MixturePosterior(batch_shape=(10, 3, 4), n_components=4, n_latent=2)
    """

    def __init__(
        self,
        make_trunk: Callable[[int], Trunk],
        n_components: int,
        n_latent: int,
        *,
        n_hidden: int,
        component_encoder: ComponentEncoder = "separate",
    ) -> None:
        super().__init__()
        n_networks = 1 if component_encoder == "shifted" else n_components
        self.trunk = make_trunk(n_networks)
        self.from_image = StackedLinear(n_networks, self.trunk.n_hidden, 2 * n_hidden)
        self.latent_trunk = StackedLinear(n_networks, n_latent, 2 * n_hidden)
        self.from_latent = StackedLinear(n_networks, n_hidden, 2 * n_hidden, bias=False)
        self.heads = _make_heads(n_components, n_hidden, n_latent, component_encoder)

    def _networks(self, components: Tensor | None) -> Tensor | None:
        return None if self.heads.share_trunk else components

    def encode(self, x: Tensor, components: Tensor | None = None) -> Tensor:
        """What images add to the pre-activations: once for all draws.

        Parameters
        ----------
        x
            Images, `(B, 1, height, width)`.
        components
            The `S` components to condition, `(S,)`; all `A` when ``None``.

        Returns
        -------
        `(B, S, 2 * n_hidden)`; S = 1 if components share one network.
        """
        networks = self._networks(components)
        return self.from_image(gate(self.trunk(x, components=networks)), networks)

    def _condition(
        self, image: Tensor, upper: Tensor, components: Tensor | None
    ) -> MixturePosterior:
        networks = self._networks(components)
        latent = self.latent_trunk(upper.flatten(0, 2), networks)
        latent = self.from_latent(gate(latent), networks).unflatten(0, upper.shape[:3])
        joint = latent + image.unsqueeze(1)
        flat = self.heads(joint.flatten(0, 2), components)
        return MixturePosterior(
            flat.component_loc.unflatten(0, upper.shape[:3]),
            flat.component_scale.unflatten(0, upper.shape[:3]),
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
        return self._condition(self.encode(x, components), upper, components)

    def draw(
        self,
        image: Tensor,
        upper: Tensor,
        drawn: Tensor,
        components: Tensor | None = None,
        *,
        flow: Callable[[Tensor], tuple[Tensor, Tensor]],
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw z1 from each draw's own component, and evaluate every component at it.

        Past a fixed number of hidden units, the draws are taken in parts, whose intermediate
        results are computed again in the backward pass: memory is then bounded by that number, or
        by one draw for each image.

        Parameters
        ----------
        image
            What :meth:`encode` returned for `B` images and these components.
        upper
            Draws of z2, `(L, B, S, D)`.
        drawn
            The component that each draw comes from, `(S,)`: an index into `components`.
        components
            The components to condition, `(A,)`; all when ``None``.
        flow
            Maps draws `(..., D)` of the Gaussians to z1 and the log-determinants `(...)`.
        generator
            Source of the noise, on the device of `upper`; torch's default when ``None``.

        Returns
        -------
        z1 `(L, B, S, D)`, the log-determinants `(L, B, S)`, and the log-densities of the draws
        ahead of the flow under every component, `(L, B, S, A)`.
        """
        # All noise in one call: it does not depend on how the draws are divided.
        noise = torch.randn(
            upper.shape, dtype=upper.dtype, device=upper.device, generator=generator
        )

        def part(upper: Tensor, noise: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            conditional = self._condition(image, upper, components)
            own = _own(conditional, drawn)
            base = own.component_loc + own.component_scale * noise
            return *flow(base), conditional.component_log_prob(base)

        n_samples, n_images, n_sampled, _ = upper.shape
        n_components = self.heads.n_components if components is None else len(components)
        n_at_once = max(1, _ELEMENTS_AT_ONCE // (n_images * n_components * self.from_image.n_out))
        if n_samples * n_sampled <= n_at_once:
            return part(upper, noise, drawn)
        width = min(n_sampled, n_at_once)
        rows = [
            [
                checkpoint(part, *tensors, use_reentrant=False, preserve_rng_state=False)
                for tensors in zip(
                    z.split(width, 2), e.split(width, 2), drawn.split(width), strict=True
                )
            ]
            for z, e in zip(
                upper.split(n_at_once // width), noise.split(n_at_once // width), strict=True
            )
        ]
        # Parts side by side along S, then along L.
        z, log_det, log_prob = (
            torch.cat([torch.cat(parts, 2) for parts in column])
            for column in zip(*(zip(*row, strict=True) for row in rows), strict=True)
        )
        return z, log_det, log_prob

    def own(self, image: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of each component at a point of its own.

        Parameters
        ----------
        image
            What :meth:`encode` returned for `B` images and all components.
        upper
            A point of z2 for each component, `(B, A, D)`.

        Returns
        -------
        Means and scales, `(B, A, D)`.
        """
        if self.heads.share_trunk:

            def each(layer: nn.Module, h: Tensor) -> Tensor:
                return layer(h.flatten(0, 1)).view(*h.shape[:2], -1)
        else:

            def each(layer: nn.Module, h: Tensor) -> Tensor:
                return layer(h)

        latent = each(self.from_latent, gate(each(self.latent_trunk, upper)))
        posterior = self.heads(latent + image)
        return posterior.component_loc, posterior.component_scale


def _own(conditional: MixturePosterior, drawn: Tensor) -> MixturePosterior:
    """Of posteriors `(L, B, S)` x `A`, each draw's own component: `(L, B)` x `S`."""
    shape = conditional.component_loc.shape
    index = drawn.view(-1, 1, 1).expand(*shape[:-2], 1, shape[-1])
    return MixturePosterior(
        conditional.component_loc.gather(-2, index).squeeze(-2),
        conditional.component_scale.gather(-2, index).squeeze(-2),
    )
