"""Decoders p(x | z) of binary images.

A decoder evaluates the log-likelihood of images given draws of the latents. A new one is a class
here with ``log_prob``, ``sample`` and ``n_values`` (of a draw in the widest layer), and a name in
:class:`~mixscvi.images.networks.configs.ModelConfig`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixscvi.images.networks.configs import ModelConfig, Sizes
from mixscvi.images.networks.layers import MaskedConv2d, gated_mlp

__all__ = ["BernoulliDecoder", "PixelCNNDecoder", "make_decoder"]


def _bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    """Log-probability of binary images `(B, P)` under logits `(L, B, S, P)`, summed over pixels."""
    sign = 2 * x.to(logits.dtype) - 1
    return F.logsigmoid(logits * sign.unsqueeze(1)).sum(-1)


class BernoulliDecoder(nn.Module):
    r"""Pixels independent given the latents.

    .. math:: \log p(x \mid z) = \sum_i \log \sigma((2 x_i - 1)\, \ell_i(z)),
        \qquad x_i \in \{0, 1\}

    Parameters
    ----------
    n_latent
        Latent dimensions of all levels together.
    image_shape
        Height and width.
    hidden
        Widths of the gated layers.

    Examples
    --------
    >>> import torch
    >>> decoder = BernoulliDecoder(2, (5, 7), hidden=(8, 8))
    >>> x, z = torch.zeros(3, 1, 5, 7), torch.zeros(10, 3, 4, 2)
    >>> decoder.log_prob(x, z).shape  # (L, B, S)
    torch.Size([10, 3, 4])
    """

    def __init__(
        self, n_latent: int, image_shape: tuple[int, int], hidden: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.image_shape = image_shape
        n_pixels = image_shape[0] * image_shape[1]
        self.logits = gated_mlp(n_latent, hidden, n_pixels)
        self.n_values = max(n_pixels, *hidden)

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) of `(B, 1, height, width)` and `(L, B, S, n_latent)`: `(L, B, S)`."""
        return _bernoulli_log_prob(self.logits(z), x.flatten(1))

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Probabilities of the pixels, `(N, 1, height, width)`, given `(N, n_latent)`."""
        return self.logits(z).sigmoid().unflatten(-1, (1, *self.image_shape))


class PixelCNNDecoder(nn.Module):
    r"""Pixels in raster order, each given those before it and the latents.

    .. math:: \log p(x \mid z) = \sum_i \log p(x_i \mid x_{<i}, z)

    The first half of the masked layers depends on the image alone: it runs once per image, for all
    draws of all components. Then the latents are added, as feature maps of the whole image, and
    the second half runs for every draw. Layers are residual, without any normalization across
    pixels or images. van den Oord et al. 2016.

    Parameters
    ----------
    n_latent
        Latent dimensions of all levels together.
    image_shape
        Height and width.
    n_hidden
        Width of the gated layer from the latents to their feature maps.
    n_layers
        Masked layers.
    n_channels
        Their channels, `C`.
    n_maps
        Feature maps of the latents.

    Examples
    --------
    >>> import torch
    >>> decoder = PixelCNNDecoder(2, (5, 7), n_hidden=8, n_layers=4, n_channels=6)
    >>> x, z = torch.zeros(3, 1, 5, 7), torch.zeros(10, 3, 4, 2)
    >>> decoder.log_prob(x, z).shape  # (L, B, S)
    torch.Size([10, 3, 4])
    """

    def __init__(
        self,
        n_latent: int,
        image_shape: tuple[int, int],
        *,
        n_hidden: int,
        n_layers: int,
        n_channels: int,
        n_maps: int = 2,
    ) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.n_values = image_shape[0] * image_shape[1] * max(n_channels, n_maps)

        def layers(n: int) -> nn.ModuleList:
            return nn.ModuleList(
                MaskedConv2d(n_channels, n_channels, kernel_size=3, kind="B") for _ in range(n)
            )

        n_image = n_layers // 2
        self.first = MaskedConv2d(1, n_channels, kernel_size=7, kind="A")
        self.image_layers = layers(n_image - 1)
        self.latent_maps = gated_mlp(
            n_latent, (n_hidden,), image_shape[0] * image_shape[1] * n_maps
        )
        self.latent_mix = nn.Linear(n_maps, n_channels)
        self.joint_layers = layers(n_layers - n_image)
        self.last = nn.Linear(n_channels, 1)

    def logits(self, x: Tensor, z: Tensor) -> Tensor:
        """Logits of all pixels of `(B, 1, height, width)` given `(L, B, S, n_latent)`.

        Returns
        -------
        `(L, B, S, height * width)`; the i-th depends on the pixels before i alone.
        """
        # Channels last in memory: with few channels this is twice as fast on a CPU, and linear
        # maps over them are plain matrix products.
        image = self.first(x.to(memory_format=torch.channels_last))
        for layer in self.image_layers:
            image = image + layer(F.relu(image))
        maps = self.latent_maps(z).unflatten(-1, (*self.image_shape, -1))
        joint = self.latent_mix(maps) + image.movedim(1, -1).unsqueeze(1)
        h = joint.flatten(0, 2).movedim(-1, 1)
        for layer in self.joint_layers:
            h = h + layer(F.relu(h))
        return self.last(F.relu(h).movedim(1, -1)).flatten(1).unflatten(0, z.shape[:3])

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) of `(B, 1, height, width)` and `(L, B, S, n_latent)`: `(L, B, S)`."""
        return _bernoulli_log_prob(self.logits(x, z), x.flatten(1))

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images drawn pixel by pixel given `(N, n_latent)`: zeros and ones, `(N, 1, h, w)`."""
        height, width = self.image_shape
        x = z.new_zeros(len(z), 1, height, width)
        for row in range(height):
            for column in range(width):
                # Later rows are computed in vain, but the latents' feature maps have the size of
                # the whole image.
                logits = self.logits(x, z[None, :, None])[0, :, 0, row * width + column]
                x[:, 0, row, column] = torch.bernoulli(logits.sigmoid(), generator=generator)
        return x


def make_decoder(
    image_shape: tuple[int, int], config: ModelConfig, sizes: Sizes
) -> BernoulliDecoder | PixelCNNDecoder:
    """Make the decoder, given the latents of all levels."""
    n_latent = config.n_levels * sizes.n_latent
    if config.decoder == "bernoulli":
        return BernoulliDecoder(n_latent, image_shape, sizes.hidden)
    return PixelCNNDecoder(
        n_latent,
        image_shape,
        n_hidden=sizes.hidden[-1],
        n_layers=sizes.pixelcnn_layers,
        n_channels=sizes.pixelcnn_channels,
    )
