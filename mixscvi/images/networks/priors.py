"""Priors of images: learned pseudo-images, and the lower level given the upper one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixscvi.images.networks.configs import ModelConfig, Sizes
from mixscvi.images.networks.encoders import clamped_variance
from mixscvi.images.networks.layers import gate
from mixscvi.mixture import (
    GaussianHeads,
    GaussianMixture,
    MixturePosterior,
    Prior,
    StackedLinear,
    StandardNormal,
    VampPrior,
)

__all__ = ["ConditionalPrior", "PseudoImages", "make_prior"]


class PseudoImages(nn.Module):
    """The VampPrior's `K` learned images, `(K, 1, height, width)` in (0, 1)."""

    def __init__(self, n_images: int, image_shape: tuple[int, int]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(n_images, 1, *image_shape))

    def start_from(self, images: Tensor) -> None:
        """Initialize with these gray levels, `(K, 1, height, width)`."""
        with torch.no_grad():
            self.logits.copy_((0.05 + 0.9 * images).logit())

    def forward(self) -> Tensor:
        """Return the images."""
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


def make_prior(image_shape: tuple[int, int], config: ModelConfig, sizes: Sizes) -> Prior:
    """Make the prior of the upper level: a new one goes here and into :class:`ModelConfig`."""
    if config.prior == "normal":
        return StandardNormal(sizes.n_latent)
    if config.prior == "mog":
        return GaussianMixture(sizes.n_latent, sizes.n_prior_components)
    return VampPrior(PseudoImages(sizes.n_prior_components, image_shape))
