"""The parts that a model is composed of, made from their names and sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixscvi.images.configs import Parts, Sizes
from mixscvi.images.decoders import BernoulliDecoder, PixelCNNDecoder
from mixscvi.images.encoders import clamped_variance
from mixscvi.images.networks import ConvTrunk, DenseTrunk, gate
from mixscvi.mixture import (
    GaussianHeads,
    GaussianMixture,
    MixturePosterior,
    Prior,
    StackedLinear,
    StandardNormal,
    VampPrior,
)

__all__ = [
    "ConditionalPrior",
    "PseudoImages",
    "make_decoder",
    "make_prior",
    "trunk_maker",
    "widened",
]


class PseudoImages(nn.Module):
    """The VampPrior's `K` learned images, `(K, 1, height, width)` in (0, 1)."""

    def __init__(self, n_images: int, image_shape: tuple[int, int]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(n_images, 1, *image_shape))

    def start_from(self, images: Tensor) -> None:
        """Begin at these grey levels, `(K, 1, height, width)`."""
        with torch.no_grad():
            self.logits.copy_((0.05 + 0.9 * images).logit())

    def forward(self) -> Tensor:
        """Give the images."""
        return self.logits.sigmoid()


class ConditionalPrior(nn.Module):
    """p(z1 | z2): a gated layer and the heads of one Gaussian."""

    def __init__(self, n_latent: int, n_hidden: int) -> None:
        super().__init__()
        self.hidden = StackedLinear(1, n_latent, 2 * n_hidden)
        self.heads = GaussianHeads(
            1, n_hidden, n_latent, var_activation=clamped_variance, var_eps=0.0
        )

    def forward(self, upper: Tensor) -> MixturePosterior:
        """Condition on draws of z2, `(N, D)`: batch shape `(N,)`, one component."""
        return self.heads(gate(self.hidden(upper)))


def widened(width: int, factor: float) -> int:
    """Width times a factor, at least 1."""
    return max(1, round(width * factor))


def trunk_maker(
    image_shape: tuple[int, int], parts: Parts, sizes: Sizes
) -> Callable[[int], DenseTrunk | ConvTrunk]:
    """What makes an encoder's trunk of a number of networks."""
    factor = sizes.encoder_width
    if parts.encoder == "dense":
        hidden = tuple(widened(width, factor) for width in sizes.hidden)
        return functools.partial(DenseTrunk, image_shape=image_shape, hidden=hidden)
    layers = tuple((widened(n, factor), size, stride) for n, size, stride in sizes.conv_layers)
    return functools.partial(ConvTrunk, image_shape=image_shape, layers=layers)


def make_prior(image_shape: tuple[int, int], parts: Parts, sizes: Sizes) -> Prior:
    """The prior of the upper level: a new one goes here and into :class:`Parts`."""
    if parts.prior == "normal":
        return StandardNormal(sizes.n_latent)
    if parts.prior == "mog":
        return GaussianMixture(sizes.n_latent, sizes.n_prior_components)
    return VampPrior(PseudoImages(sizes.n_prior_components, image_shape))


def make_decoder(
    image_shape: tuple[int, int], parts: Parts, sizes: Sizes
) -> BernoulliDecoder | PixelCNNDecoder:
    """The decoder of all levels together."""
    n_latent = parts.n_levels * sizes.n_latent
    if parts.decoder == "bernoulli":
        return BernoulliDecoder(n_latent, image_shape, sizes.hidden)
    return PixelCNNDecoder(
        n_latent,
        image_shape,
        n_hidden=sizes.hidden[-1],
        n_layers=sizes.pixelcnn_layers,
        n_channels=sizes.pixelcnn_channels,
    )
