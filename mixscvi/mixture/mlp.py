"""Multilayer perceptrons: `A` of one shape side by side, layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixscvi.mixture.layers import StackedLinear

__all__ = ["StackedMLP"]


def _batch_norm(norm: nn.Module, x: Tensor, components: Tensor | None) -> Tensor:
    """Batch normalization of `(B, S, H)` by a layer over `A * H` features.

    `A` independent batch normalizations are exactly one over `A * H` features. With a subset of
    components, the statistics and weights of those alone are used and updated.
    """
    if components is None:
        return norm(x.flatten(1)).view_as(x)
    if not isinstance(norm, nn.BatchNorm1d) or norm.momentum is None:
        raise TypeError(
            "a subset of components needs torch.nn.BatchNorm1d with a momentum, got "
            f"{type(norm).__name__}"
        )
    running_mean, running_var, n_tracked = (
        norm.get_buffer(name) for name in ("running_mean", "running_var", "num_batches_tracked")
    )
    n_features = x.shape[-1]
    index = (
        components.unsqueeze(-1) * n_features + torch.arange(n_features, device=x.device)
    ).flatten()
    mean, var = running_mean[index], running_var[index]
    y = F.batch_norm(
        x.flatten(1),
        mean,
        var,
        norm.weight[index],
        norm.bias[index],
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
    )
    if norm.training:
        with torch.no_grad():
            running_mean[index] = mean
            running_var[index] = var
            n_tracked += 1
    return y.view_as(x)


class StackedMLP(nn.Module):
    """`A` multilayer perceptrons side by side, layer by layer as scVI's fully connected layers.

    Each hidden layer is linear, batch norm, layer norm, activation, dropout, as far as they are
    enabled. No parameter, statistic or dropout mask is shared between components.

    Parameters
    ----------
    n_components
        Number of networks, `A`.
    n_in
        Input features, the same for all networks.
    n_hidden
        Width of every hidden layer.
    n_layers
        Number of hidden layers.
    n_covariates
        Extra input features (such as one-hot batches), appended as the last columns.
    inject_covariates
        Whether the covariates enter every layer, or the first alone.
    dropout_rate
        Probability that a hidden unit is dropped in training.
    use_batch_norm, use_layer_norm
        Normalizations; batch norm has scVI's momentum 0.01 and eps 0.001, layer norm no weights.
    activation
        Class of the activation.
    bias
        Whether the linear maps have one.

    Raises
    ------
    ValueError
        If there is no hidden layer.

    Examples
    --------
    >>> import torch
    >>> network = StackedMLP(4, n_in=20, n_hidden=8, n_layers=2, n_covariates=3)
    >>> network(torch.zeros(6, 20), torch.zeros(6, 3)).shape
    torch.Size([6, 4, 8])
    """

    def __init__(
        self,
        n_components: int,
        n_in: int,
        *,
        n_hidden: int = 128,
        n_layers: int = 1,
        n_covariates: int = 0,
        inject_covariates: bool = True,
        dropout_rate: float = 0.1,
        use_batch_norm: bool = True,
        use_layer_norm: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, got {n_layers}")
        self.n_components = n_components
        self.n_covariates = n_covariates
        self.inject_covariates = inject_covariates
        self.linears = nn.ModuleList()
        self.batch_norms = nn.ModuleList()
        for layer in range(n_layers):
            width = n_hidden if layer else n_in
            extra = n_covariates if self.injects_into(layer) else 0
            self.linears.append(
                StackedLinear(
                    n_components, width + extra, n_hidden, bias=bias, by_feature=layer == 0
                )
            )
            if use_batch_norm:
                self.batch_norms.append(
                    nn.BatchNorm1d(n_components * n_hidden, momentum=0.01, eps=0.001)
                )
        self.layer_norm = (
            nn.LayerNorm(n_hidden, elementwise_affine=False) if use_layer_norm else nn.Identity()
        )
        self.activation = activation()
        self.dropout = nn.Dropout(dropout_rate)

    def injects_into(self, layer: int) -> bool:
        """Whether the covariates are an input of a layer.

        Parameters
        ----------
        layer
            Its position, from 0.

        Returns
        -------
        True of the first layer if there are covariates, of the others if they are injected there.
        """
        return self.n_covariates > 0 and (layer == 0 or self.inject_covariates)

    def train_covariates_only(self, *, freeze_first_layer: bool = True) -> None:
        """Freeze every parameter but the weights of the covariates.

        Parameters
        ----------
        freeze_first_layer
            Whether the first layer's other weights are frozen as well.
        """

        def covariate_columns(grad: Tensor) -> Tensor:
            kept = torch.zeros_like(grad)
            kept[..., -self.n_covariates :] = grad[..., -self.n_covariates :]
            return kept

        for layer, linear in enumerate(self.linears):
            weight = linear.get_parameter("weight")
            whole = layer == 0 and not freeze_first_layer
            for parameter in linear.parameters():
                parameter.requires_grad_(whole)
            if self.injects_into(layer) and not whole:
                weight.requires_grad_(True)
                weight.register_hook(covariate_columns)
        for parameter in self.batch_norms.parameters():
            parameter.requires_grad_(False)

    def forward(
        self,
        x: Tensor,
        covariates: Tensor | None = None,
        components: Tensor | None = None,
    ) -> Tensor:
        """Run the networks.

        Parameters
        ----------
        x
            Inputs, `(B, n_in)`.
        covariates
            Extra inputs, `(B, n_covariates)`; required if the network was built with any.
        components
            The `S` networks to run, `(S,)`; all `A` when ``None``.

        Returns
        -------
        Hidden units, `(B, S, n_hidden)`.

        Raises
        ------
        ValueError
            If there are not as many covariates as the network was built for.
        """
        if (0 if covariates is None else covariates.shape[-1]) != self.n_covariates:
            got = None if covariates is None else tuple(covariates.shape)
            raise ValueError(f"covariates must have shape (B, {self.n_covariates}), got {got}")
        h = x
        for layer, linear in enumerate(self.linears):
            if covariates is not None and self.injects_into(layer):
                extra = (
                    covariates
                    if h.dim() == 2
                    else covariates.unsqueeze(1).expand(-1, h.shape[1], -1)
                )
                h = torch.cat((h, extra), dim=-1)
            h = linear(h, components)
            if len(self.batch_norms):
                h = _batch_norm(self.batch_norms[layer], h, components)
            h = self.dropout(self.activation(self.layer_norm(h)))
        return h
