"""Gated and masked layers of encoders and decoders.

None of them uses statistics across images or pixels, so that p(x | z) is a normalized density.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixscvi.mixture import StackedConv2d, StackedLinear

__all__ = ["ConvTrunk", "DenseTrunk", "MaskedConv2d", "gate", "gated_mlp"]

# Hidden units of a layer that are held at once: 512 MiB in single precision, more than four
# components need at the papers' sizes.
_ELEMENTS_AT_ONCE = 2**27


def gate(h: Tensor) -> Tensor:
    """First half of the last axis, gated by the logistic function of its second half.

    Examples
    --------
    >>> import torch
    >>> gate(torch.tensor([4.0, 0.0]))
    tensor([2.])
    """
    return F.glu(h, -1)


def gated_mlp(n_in: int, hidden: tuple[int, ...], n_out: int) -> nn.Sequential:
    """A multilayer perceptron with gated hidden layers and a linear last one.

    Examples
    --------
    >>> import torch
    >>> gated_mlp(5, (8, 8), 3)(torch.zeros(7, 5)).shape
    torch.Size([7, 3])
    """
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(n_in, 2 * width), nn.GLU(-1)]
        n_in = width
    return nn.Sequential(*layers, nn.Linear(n_in, n_out))


class Trunk(nn.Module, ABC):
    """`A` gated networks on one image, up to the last layer's pre-activations.

    Past a fixed number of hidden units, images are taken in parts, whose hidden units are computed
    again in the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.n_hidden = 0  # of a component, gated
        self.n_units = 0  # of a component's widest layer

    def forward(
        self, x: Tensor, covariates: None = None, components: Tensor | None = None
    ) -> Tensor:
        """Map images `(B, 1, height, width)` to `(B, S, 2 * n_hidden)`."""
        first = cast(StackedLinear | StackedConv2d, self.layers[0])
        n_components = first.n_components if components is None else len(components)
        n_at_once = max(1, _ELEMENTS_AT_ONCE // (n_components * self.n_units))
        if len(x) <= n_at_once:
            return self._forward(x, components)
        parts = [
            checkpoint(
                self._forward, part, components, use_reentrant=False, preserve_rng_state=False
            )
            for part in x.split(n_at_once)
        ]
        return torch.cat(parts)

    @abstractmethod
    def _forward(self, x: Tensor, components: Tensor | None) -> Tensor:
        """Map all images at once."""


class DenseTrunk(Trunk):
    """`A` gated perceptrons on one image, up to the last layer's pre-activations.

    Parameters
    ----------
    n_components
        Number of networks, `A`; 1 for a trunk that all components share.
    image_shape
        Height and width.
    hidden
        Widths of the hidden layers.

    Examples
    --------
    >>> import torch
    >>> trunk = DenseTrunk(4, (5, 7), hidden=(8, 6))
    >>> trunk(torch.zeros(3, 1, 5, 7)).shape  # two halves, to be gated
    torch.Size([3, 4, 12])
    """

    _version = 2  # the first weight of version 1 is `(n_in, A, n_out)`

    def __init__(
        self, n_components: int, image_shape: tuple[int, int], hidden: tuple[int, ...]
    ) -> None:
        super().__init__()
        widths = [image_shape[0] * image_shape[1], *hidden]
        for n_in, n_out in zip(widths, hidden, strict=False):
            # In most images, few pixels are on.
            first = not self.layers
            self.layers.append(StackedLinear(n_components, n_in, 2 * n_out, by_feature=first))
        self.n_hidden, self.n_units = hidden[-1], 2 * max(hidden)

    def _forward(self, x: Tensor, components: Tensor | None) -> Tensor:
        h = self.layers[0](x.flatten(1), components)
        for layer in self.layers[1:]:
            h = layer(gate(h), components)
        return h

    def of_this_version(self, stored: Tensor, version: int | None) -> Tensor:
        """The first weight, or what has its shape, as this version has it.

        Parameters
        ----------
        stored
            As it was stored.
        version
            Of the trunk that it was stored of; when ``None``, shapes tell.

        Returns
        -------
        `(A, n_out, n_in)`.
        """
        earlier = stored.shape != self.layers[0].weight.shape if version is None else version == 1
        return stored.permute(1, 2, 0) if earlier and stored.dim() == 3 else stored

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
    ) -> None:
        name = f"{prefix}layers.0.weight"
        if name in state_dict:
            version = local_metadata.get("version")
            state_dict[name] = self.of_this_version(state_dict[name], version)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _check_odd(kernel_size: int) -> None:
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")


class ConvTrunk(Trunk):
    """`A` gated convolutional networks on one image, up to the last pre-activations.

    Each layer is one convolution, grouped by component from the second on.

    Parameters
    ----------
    n_components
        Number of networks, `A`; 1 for a trunk that all components share.
    image_shape
        Height and width.
    layers
        Output channels, kernel size and stride of each layer.

    Examples
    --------
    >>> import torch
    >>> trunk = ConvTrunk(4, (8, 8), layers=((6, 3, 2), (5, 3, 2)))
    >>> trunk(torch.zeros(3, 1, 8, 8)).shape  # two halves of 5 channels, 2 x 2 pixels
    torch.Size([3, 4, 40])
    """

    def __init__(
        self,
        n_components: int,
        image_shape: tuple[int, int],
        layers: tuple[tuple[int, int, int], ...],
    ) -> None:
        super().__init__()
        n_in, (height, width) = 1, image_shape
        for channels, kernel_size, stride in layers:
            _check_odd(kernel_size)
            self.layers.append(
                StackedConv2d(
                    n_components,
                    n_in,
                    2 * channels,
                    kernel_size=kernel_size,
                    stride=stride,
                    padding=kernel_size // 2,
                )
            )
            n_in = channels
            height, width = -(-height // stride), -(-width // stride)
            self.n_units = max(self.n_units, 2 * channels * height * width)
        self.n_hidden = n_in * height * width

    def _forward(self, x: Tensor, components: Tensor | None) -> Tensor:
        # Grouped convolutions are up to twice as fast with the channels last in memory.
        h = self.layers[0](x.to(memory_format=torch.channels_last), components)
        for layer in self.layers[1:]:
            # The gate is faster, too, if the axis that it halves is the last one in memory.
            h = layer(gate(h.permute(0, 3, 4, 1, 2)).permute(0, 3, 4, 1, 2), components)
        return h.flatten(2)


class MaskedConv2d(nn.Module):
    """Convolution in which a pixel does not depend on later ones, in raster order.

    The rows of the kernel below its center would be masked entirely, so they are neither stored
    nor multiplied: a 3 x 3 kernel costs as much as one of 2 x 3.

    Parameters
    ----------
    in_channels, out_channels
        Channels.
    kernel_size
        Odd height and width of the whole kernel.
    kind
        ``"A"`` masks the center, as the first layer must; ``"B"`` does not.

    References
    ----------
    van den Oord et al. 2016, Pixel Recurrent Neural Networks.

    Examples
    --------
    >>> import torch
    >>> layer = MaskedConv2d(1, 2, kernel_size=3, kind="A")
    >>> layer.mask
    tensor([[1., 1., 1.],
            [1., 0., 0.]])
    >>> layer(torch.zeros(5, 1, 28, 28)).shape
    torch.Size([5, 2, 28, 28])
    """

    mask: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int, kind: Literal["A", "B"]
    ) -> None:
        super().__init__()
        _check_odd(kernel_size)
        self.reach = kernel_size // 2
        mask = torch.ones(self.reach + 1, kernel_size)
        mask[-1, self.reach + (kind == "B") :] = 0
        self.register_buffer("mask", mask, persistent=False)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *mask.shape))
        self.bias = nn.Parameter(torch.empty(out_channels))
        n_seen = self.reach * kernel_size + self.reach + (kind == "B")
        bound = 1 / math.sqrt(in_channels * n_seen)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in_channels, height, width)` to `(..., out_channels, height, width)`."""
        # Padding both sides and dropping the surplus rows avoids a padded copy of the input.
        y = F.conv2d(x, self.weight * self.mask, self.bias, padding=self.reach)
        return y.narrow(-2, 0, x.shape[-2])
