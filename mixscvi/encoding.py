"""Between scvi-tools' conventions and the core: covariates in, a posterior that it can read out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from mixscvi.mixture import MixturePosterior

__all__ = ["FactorizedMixture", "MixtureEncoder", "PseudoCells"]


class FactorizedMixture(MixturePosterior):
    r"""The mixture posterior in the shape that scvi-tools expects of ``qz``.

    scvi-tools' methods take the posterior for a product over latent dimensions: they read ``loc``
    and ``scale`` and write ``qz.log_prob(z).sum(-1)``. So the batch shape here is `(B, D)`, and
    :meth:`log_prob` returns the terms of the chain rule, :math:`\log q(z_d \mid z_{<d})`, which
    sum to the joint log-density exactly.

    Parameters
    ----------
    component_loc, component_scale
        Means and standard deviations of the components, `(B, A, D)`.

    Examples
    --------
    >>> import torch
    >>> q = FactorizedMixture(torch.randn(3, 4, 2), torch.ones(3, 4, 2))
    >>> q.loc.shape, q.log_prob(q.loc).shape
    (torch.Size([3, 2]), torch.Size([3, 2]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "component_loc": constraints.real,
        "component_scale": constraints.positive,
    }
    support = constraints.real

    def __init__(self, component_loc: Tensor, component_scale: Tensor) -> None:
        super().__init__(component_loc, component_scale)
        self._batch_shape += self._event_shape
        self._event_shape = torch.Size()

    @property
    def loc(self) -> Tensor:
        """Mean of the mixture, `(B, D)`."""
        return self.mean

    @property
    def scale(self) -> Tensor:
        """Marginal standard deviations of the mixture, `(B, D)`."""
        return self.variance.sqrt()

    def joint(self) -> MixturePosterior:
        """Return the same mixture with event shape `(D,)`."""
        return MixturePosterior(self.component_loc, self.component_scale)

    def log_prob(self, value: Tensor) -> Tensor:
        """Terms of the chain rule, `(..., B, D)`; their sum is the joint log-density."""
        per_dimension = torch.distributions.Normal(
            self.component_loc, self.component_scale, validate_args=False
        ).log_prob(value.unsqueeze(-2))
        prefix = per_dimension.cumsum(-1).logsumexp(-2) - math.log(self.n_components)
        return torch.cat((prefix[..., :1], prefix.diff(dim=-1)), dim=-1)


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


class PseudoCells(nn.Module):
    """Learned inputs of the counts encoder: `K` cells that need not exist.

    Expression lives on the encoder's scale and stays non-negative if the data are; each categorical
    covariate is a softmax over its categories.

    Parameters
    ----------
    n_pseudo
        Number of pseudo-cells, `K`.
    n_genes
        Genes, `G`: the leading columns of the encoder's input.
    n_dense
        All dense columns of the encoder's input, `G` and continuous covariates.
    n_cat_list
        Number of categories of each covariate that the encoder sees.
    non_negative
        Whether expression is constrained to be non-negative.
    """

    _SHARPNESS = 10.0
    _LEAST = 5e-3
    _LOGIT = 3.0

    def __init__(
        self,
        n_pseudo: int,
        n_genes: int,
        n_dense: int,
        n_cat_list: Sequence[int],
        *,
        non_negative: bool,
    ) -> None:
        super().__init__()
        self.n_genes = n_genes
        self.non_negative = non_negative
        self.dense = nn.Parameter(torch.randn(n_pseudo, n_dense))
        self.cat_logits = nn.ParameterList(torch.zeros(n_pseudo, n_cat) for n_cat in n_cat_list)

    @torch.no_grad()
    def initialise(self, dense: Tensor, *categories: Tensor) -> None:
        """Start from the encoder inputs of `K` real cells: `(K, n_dense)` and indices `(K, 1)`."""
        start = dense.clone()
        if self.non_negative:
            sharp = self._SHARPNESS * start[:, : self.n_genes].clamp_min(self._LEAST)
            start[:, : self.n_genes] = (sharp + (-(-sharp).expm1()).log()) / self._SHARPNESS
        self.dense.copy_(start)
        for logits, category in zip(self.cat_logits, categories, strict=True):
            one_hot = F.one_hot(category.squeeze(-1).long(), logits.shape[-1])
            logits.copy_(self._LOGIT * one_hot)

    def forward(self) -> tuple[Tensor, ...]:
        """Encoder inputs: `(K, n_dense)`, then weights `(K, n_cat)` for each covariate."""
        dense = self.dense
        if self.non_negative:
            expression, rest = dense.split((self.n_genes, dense.shape[-1] - self.n_genes), dim=-1)
            dense = torch.cat((F.softplus(expression, beta=self._SHARPNESS), rest), dim=-1)
        return dense, *(logits.softmax(-1) for logits in self.cat_logits)
