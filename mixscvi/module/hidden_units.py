"""The decoder's hidden layers, where what is the same for all draws of a cell is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scvi.nn import FCLayers
from torch import Tensor, nn

__all__ = ["beside_draws", "hidden_units", "hidden_units_by_columns"]


def hidden_units(
    layers: FCLayers, z: Tensor, continuous: Sequence[Tensor], categories: Sequence[Tensor]
) -> Tensor:
    r"""The last hidden units of every draw.

    The same as :func:`hidden_units_by_columns`. As :math:`W (z, c) = W_z z + W_c c` for the
    covariates :math:`c` of a cell, the second product is made once per cell and its rows are
    added: no column of a covariate exists per draw.

    Parameters
    ----------
    layers
        Fully connected layers of scvi-tools.
    z
        Draws, `(B, D)`, `(n, B, D)` or `(L, B, S, D)`.
    continuous
        Other inputs of the first layer, `(B, ...)` each, in their order.
    categories
        Indices of each categorical covariate of `layers`, `(B, 1)` each.

    Returns
    -------
    `(..., H)` with the leading axes of `z`.

    Examples
    --------
    >>> import torch
    >>> layers = FCLayers(n_in=2, n_out=8, n_cat_list=[3])
    >>> hidden_units(layers, torch.zeros(5, 6, 4, 2), [], [torch.zeros(6, 1)]).shape
    torch.Size([5, 6, 4, 8])
    """
    lead = z.shape[:-1]
    one_hot = [
        F.one_hot(category.squeeze(-1).long(), n_categories).to(z.dtype)
        for n_categories, category in zip(layers.n_cat_list, categories, strict=True)
        if n_categories > 1
    ]
    h = z.flatten(0, -2)
    of_cell = [*continuous, *one_hot]  # the order of the first layer's columns
    for block in layers.fc_layers:
        for layer in block:
            if isinstance(layer, nn.Linear) and of_cell:
                h = _linear(layer, h, torch.cat(of_cell, dim=-1), lead)
            elif layer is not None:
                h = layer(h)
        of_cell = one_hot if layers.inject_covariates else []
    return h.unflatten(0, lead)


def hidden_units_by_columns(
    layers: FCLayers, z: Tensor, continuous: Sequence[Tensor], categories: Sequence[Tensor]
) -> Tensor:
    """The last hidden units of every draw as scvi-tools computes them, to the bit.

    Parameters
    ----------
    layers, z, continuous, categories
        As in :func:`hidden_units`.

    Returns
    -------
    `(..., H)` with the leading axes of `z`.
    """
    lead = z.shape[:-1]

    def by_draw(of_cell: Tensor) -> Tensor:
        return beside_draws(of_cell, lead).expand(*lead, -1).flatten(0, -2)

    columns = torch.cat((z.flatten(0, -2), *map(by_draw, continuous)), dim=-1)
    return layers(columns, *map(by_draw, categories)).unflatten(0, lead)


def _linear(layer: nn.Linear, h: Tensor, of_cell: Tensor, lead: torch.Size) -> Tensor:
    """A linear layer of the rows of all draws, `(R, n)`, and of each cell, `(B, n_columns)`."""
    by_draw, by_cell = layer.weight.split((h.shape[-1], of_cell.shape[-1]), dim=-1)
    added = F.linear(of_cell, by_cell, layer.bias)
    return (F.linear(h, by_draw).unflatten(0, lead) + beside_draws(added, lead)).flatten(0, -2)


def beside_draws(of_cell: Tensor, lead: torch.Size) -> Tensor:
    """Rows of cells, `(B, n)`, so that they broadcast to draws with the leading axes `lead`.

    What has the axes of draws already is left as it is.
    """
    # Cells are the second axis of draws (L, B, S), otherwise the last one.
    return of_cell.unsqueeze(1) if of_cell.dim() == 2 and len(lead) == 3 else of_cell
