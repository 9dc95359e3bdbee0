"""Linear maps and convolutions: `A` of one shape as one tensor, applied in one call."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixscvi.mixture.nonzeros import few_nonzeros, product_by_nonzeros
from mixscvi.mixture.products import linear

__all__ = ["LinearByFeature", "StackedConv2d", "StackedLinear", "rows"]


def rows(parameter: Tensor, components: Tensor | None) -> Tensor:
    """Take those rows of a parameter with a row per component, or all.

    Examples
    --------
    >>> import torch
    >>> rows(torch.eye(3), torch.tensor([2]))
    tensor([[0., 0., 1.]])
    """
    return parameter if components is None else parameter.index_select(0, components)


def _of_shared_input(x: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ table + bias`, of sums of the table's rows where `x` is mostly zero."""
    nonzeros = few_nonzeros(x, table)
    if nonzeros is None:
        return linear(x, table.T, bias)
    y = product_by_nonzeros(nonzeros, table)
    return y if bias is None else y + bias


class StackedLinear(nn.Module):
    r"""`A` linear maps as one tensor: :math:`y_a = W_a x_a + b_a`.

    An input that all maps share costs one matrix product with `A * n_out` outputs; an input of
    their own costs one batched product.

    Parameters
    ----------
    n_components
        Number of maps, `A`.
    n_in
        Input features.
    n_out
        Output features of each map.
    bias
        Whether to add `b_a`.
    by_feature
        Whether all weights of an input feature lie together in memory, as suits an input that
        all maps share and that is mostly zero, such as counts of genes: on a CPU, minibatches with
        few non-zeros are then computed as sums of such rows
        (``mixscvi.mixture.nonzeros.few_nonzeros``). Shapes and values do not depend on it.

    Examples
    --------
    >>> import torch
    >>> layer = StackedLinear(n_components=3, n_in=5, n_out=2)
    >>> layer
    StackedLinear(n_components=3, n_in=5, n_out=2, bias=True)
    >>> layer(torch.zeros(7, 5)).shape, layer(torch.zeros(7, 3, 5)).shape
    (torch.Size([7, 3, 2]), torch.Size([7, 3, 2]))
    """

    def __init__(
        self,
        n_components: int,
        n_in: int,
        n_out: int,
        *,
        bias: bool = True,
        by_feature: bool = False,
    ) -> None:
        super().__init__()
        self.n_components, self.n_in, self.n_out = n_components, n_in, n_out
        self.weight = nn.Parameter(torch.empty(n_components, n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_components, n_out)) if bias else None
        self.reset_parameters()
        if by_feature:
            by_rows = self.weight.detach().permute(2, 0, 1).contiguous()
            self.weight = nn.Parameter(by_rows.permute(1, 2, 0))

    def extra_repr(self) -> str:
        """Summarize the sizes.

        Returns
        -------
        What ``repr`` puts between the brackets.
        """
        return (
            f"n_components={self.n_components}, n_in={self.n_in}, n_out={self.n_out}, "
            f"bias={self.bias is not None}"
        )

    def reset_parameters(self) -> None:
        """Initialize every map as :class:`torch.nn.Linear` initializes one."""
        bound = 1 / math.sqrt(self.n_in)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, components: Tensor | None = None) -> Tensor:
        """Apply the maps.

        Parameters
        ----------
        x
            One input for all maps, `(B, n_in)`, or one for each, `(B, S, n_in)`.
        components
            The `S` maps to apply, `(S,)`; all `A` when ``None``.

        Returns
        -------
        `(B, S, n_out)`.
        """
        bias = None if self.bias is None else rows(self.bias, components)
        if x.dim() == 2:
            weight = self.weight.permute(2, 0, 1)
            weight = weight if components is None else weight.index_select(1, components)
            y = _of_shared_input(x, weight.flatten(1), None if bias is None else bias.flatten())
            return y.unflatten(-1, weight.shape[1:])
        y = torch.einsum("bai,aoi->bao", x, rows(self.weight, components))
        return y if bias is None else y + bias


class LinearByFeature(nn.Linear):
    """A linear layer stored as one of :class:`StackedLinear` with ``by_feature=True``.

    Parameters
    ----------
    linear
        The layer whose parameters it takes over.

    Examples
    --------
    >>> import torch
    >>> linear = torch.nn.Linear(5, 2)
    >>> x = torch.ones(7, 5)
    >>> torch.allclose(LinearByFeature(linear)(x), linear(x))
    True
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous().T)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map to `(..., n_in)`."""
        return _of_shared_input(x, self.weight.T, self.bias) if x.dim() == 2 else super().forward(x)


class StackedConv2d(nn.Module):
    """`A` two-dimensional convolutions as one grouped convolution.

    Parameters
    ----------
    n_components
        Number of convolutions, `A`.
    in_channels, out_channels
        Channels of each.
    kernel_size, stride, padding, dilation
        As in :class:`torch.nn.Conv2d`.

    Notes
    -----
    On a CPU, an input of one channel that requires a gradient, such as a VampPrior's pseudo-inputs,
    is convolved as a product with its patches: the convolution's gradient with respect to its input
    is slow. With 500 images and the papers' first layer, both directions take half the time.

    Examples
    --------
    >>> import torch
    >>> layer = StackedConv2d(3, 1, 8, kernel_size=3, padding=1)
    >>> layer(torch.zeros(7, 1, 28, 28)).shape, layer(torch.zeros(7, 3, 1, 28, 28)).shape
    (torch.Size([7, 3, 8, 28, 28]), torch.Size([7, 3, 8, 28, 28]))
    """

    def __init__(
        self,
        n_components: int,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.n_components = n_components
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.weight = nn.Parameter(
            torch.empty(n_components, out_channels, in_channels, kernel_size, kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(n_components, out_channels))
        bound = 1 / math.sqrt(in_channels * kernel_size**2)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        """Summarize the sizes.

        Returns
        -------
        What ``repr`` puts between the brackets.
        """
        _, out_channels, in_channels, kernel_size, _ = self.weight.shape
        return (
            f"n_components={self.n_components}, in_channels={in_channels}, "
            f"out_channels={out_channels}, kernel_size={kernel_size}, stride={self.stride}"
        )

    def forward(self, x: Tensor, components: Tensor | None = None) -> Tensor:
        """Apply the convolutions.

        Parameters
        ----------
        x
            One input for all, `(B, in_channels, height, width)`, or one for each,
            `(B, S, in_channels, height, width)`.
        components
            The `S` convolutions to apply, `(S,)`; all `A` when ``None``.

        Returns
        -------
        `(B, S, out_channels, height', width')`.
        """
        weight, bias = rows(self.weight, components), rows(self.bias, components)
        shared = x.dim() == 4
        learned = x.requires_grad and x.shape[1] == 1
        if shared and learned and self.dilation == 1 and x.device.type == "cpu":
            y = self._product_with_patches(x, weight, bias)
        else:
            y = F.conv2d(
                x if shared else x.flatten(1, 2),
                weight.flatten(0, 1),
                bias.flatten(),
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                groups=1 if shared else weight.shape[0],
            )
        return y.unflatten(1, (weight.shape[0], weight.shape[1]))

    def _product_with_patches(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        size = weight.shape[-1]
        patches = F.pad(x.squeeze(1), (self.padding,) * 4)
        for axis in (1, 2):
            patches = patches.unfold(axis, size, self.stride)
        y = F.linear(patches.flatten(-2), weight.flatten(0, 1).flatten(1), bias.flatten())
        return y.permute(0, 3, 1, 2)
