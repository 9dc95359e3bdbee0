"""Between scvi-tools' inputs and the core's encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from scvi import REGISTRY_KEYS
from scvi.module import VAE
from torch import Tensor, nn

from mixscvi.mixture import MixturePosterior

__all__ = ["MixtureEncoder", "encoder_input"]


def encoder_input(
    module: VAE,
    x: Tensor,
    batch_index: Tensor,
    cont_covs: Tensor | None = None,
    cat_covs: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What the encoders of a module see of a minibatch, put together as in scvi-tools.

    Parameters
    ----------
    module
        Says how expression, batches and covariates enter.
    x
        Counts, `(B, G)`.
    batch_index, cont_covs, cat_covs
        As in :meth:`scvi.module.VAE.inference`.

    Returns
    -------
    Dense columns `(B, n_in)`, and the indices of each categorical covariate, `(B, 1)`.
    """
    dense = torch.log1p(x) if module.log_variational else x
    categories: tuple[Tensor, ...] = ()
    if module.encode_covariates:
        if cont_covs is not None:
            dense = torch.cat((dense, cont_covs), dim=-1)
        if cat_covs is not None:
            categories = torch.split(cat_covs, 1, dim=1)
    if module.batch_representation == "embedding":
        if module.encode_covariates:
            batch = module.compute_embedding(REGISTRY_KEYS.BATCH_KEY, batch_index)
            dense = torch.cat((dense, batch), dim=-1)
    else:
        categories = (batch_index, *categories)
    return dense, categories


class MixtureEncoder(nn.Module):
    """A core encoder that takes scvi-tools' categorical covariates.

    Parameters
    ----------
    encoder
        A core encoder, with as many covariate inputs as `n_cat_list` has categories.
    n_cat_list
        Number of categories of each covariate; those with one category are left out.
    latent_distribution
        ``"ln"`` maps draws to the simplex, ``"normal"`` leaves them.

    Examples
    --------
    >>> import torch
    >>> from mixscvi.mixture import SeparateEncoder
    >>> core = SeparateEncoder(4, n_in=20, n_latent=2, n_covariates=3)
    >>> encoder = MixtureEncoder(core, n_cat_list=[3], latent_distribution="normal")
    >>> encoder(torch.zeros(6, 20), torch.zeros(6, 1))
    MixturePosterior(batch_shape=(6,), n_components=4, n_latent=2)
    """

    def __init__(
        self,
        encoder: nn.Module,
        n_cat_list: Sequence[int],
        latent_distribution: Literal["normal", "ln"],
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.n_cat_list = list(n_cat_list)
        self.z_transformation = nn.Softmax(dim=-1) if latent_distribution == "ln" else nn.Identity()

    def forward(
        self, x: Tensor, *categories: Tensor, components: Tensor | None = None
    ) -> MixturePosterior:
        """Encode.

        Parameters
        ----------
        x
            Inputs, `(B, n_in)`.
        *categories
            One per covariate: indices `(B, 1)`, or weights over its categories `(B, n_cat)`.
        components
            The `S` components to encode, `(S,)`; all `A` when ``None``.
        """
        encoded = [
            F.one_hot(category.squeeze(-1).long(), n_cat).to(x.dtype)
            if category.shape[-1] != n_cat
            else category
            for n_cat, category in zip(self.n_cat_list, categories, strict=False)
            if n_cat > 1
        ]
        covariates = torch.cat(encoded, dim=-1) if encoded else None
        return self.encoder(x, covariates, components)
