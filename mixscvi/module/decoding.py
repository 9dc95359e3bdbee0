"""From draws of z to the likelihood of the counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scvi import REGISTRY_KEYS
from scvi.distributions import (
    NegativeBinomial,
    Normal,
    Poisson,
    ZeroInflatedNegativeBinomial,
)
from scvi.module import VAE
from torch import Tensor
from torch.distributions import Distribution

from mixscvi.likelihoods import nb_log_prob, poisson_log_prob, zinb_log_prob

__all__ = ["CountLikelihood", "decode", "generative_outputs"]


@dataclass(frozen=True)
class CountLikelihood:
    """p(x | z) of every draw: the parameters, and what is made of them."""

    gene_likelihood: str
    """``"zinb"``, ``"nb"``, ``"poisson"`` or ``"normal"``."""
    scale: Tensor
    """Share of each gene in a cell's expression, `(..., G)`."""
    rate: Tensor
    """Mean, but for dropouts, `(..., G)`."""
    theta: Tensor
    """Inverse dispersion (standard deviation of the normal likelihood): `(G,)`, or a shape that
    broadcasts to that of `rate`."""
    zi_logits: Tensor
    """Logit of a dropout, `(..., G)`."""

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x | z), summed over genes.

        Parameters
        ----------
        x
            Counts, `(B, G)`.

        Returns
        -------
        `(L, B, S)` for draws `(L, B, S, D)`, in nats.
        """
        if self.gene_likelihood == "zinb":
            return zinb_log_prob(x, self.rate, self.theta, self.zi_logits)
        if self.gene_likelihood == "nb":
            return nb_log_prob(x, self.rate, self.theta)
        if self.gene_likelihood == "poisson":
            return poisson_log_prob(x, self.rate)
        normal = torch.distributions.Normal(self.rate, self.theta, validate_args=False)
        return normal.log_prob(x.unsqueeze(1)).sum(-1)

    def distribution(self) -> Distribution:
        """The same as a distribution of scvi-tools, for its methods."""
        if self.gene_likelihood == "zinb":
            return ZeroInflatedNegativeBinomial(
                mu=self.rate, theta=self.theta, zi_logits=self.zi_logits, scale=self.scale
            )
        if self.gene_likelihood == "nb":
            return NegativeBinomial(mu=self.rate, theta=self.theta, scale=self.scale)
        if self.gene_likelihood == "poisson":
            return Poisson(rate=self.rate, scale=self.scale)
        return Normal(self.rate, self.theta, normal_mu=self.scale)


def decode(
    module: VAE,
    z: Tensor,
    library: Tensor,
    batch_index: Tensor,
    cont_covs: Tensor | None = None,
    cat_covs: Tensor | None = None,
    size_factor: Tensor | None = None,
    y: Tensor | None = None,
    transform_batch: Tensor | int | None = None,
) -> CountLikelihood:
    """Decode draws of any leading shape as rows of one call.

    It gives the parameters that :meth:`scvi.module.VAE.generative` gives draw by draw.

    Parameters
    ----------
    module
        Has the decoder and the dispersions, and says how covariates enter.
    z
        Draws behind the flow, `(B, D)`, `(n, B, D)` or `(L, B, S, D)`.
    library
        Log library sizes, `(B, 1)` or broadcasting to the draws.
    batch_index, cont_covs, cat_covs, size_factor, y
        Of each cell, `(B, ...)`, as in :meth:`scvi.module.VAE.generative`.
    transform_batch
        Batch to decode all cells as, instead of their own.
    """
    lead = z.shape[:-1]

    def per_draw(per_cell: Tensor) -> Tensor:
        # Cells are the second axis of draws (L, B, S), otherwise the last one.
        return per_cell.unsqueeze(1) if per_cell.dim() == 2 and z.dim() == 4 else per_cell

    def rows(per_cell: Tensor) -> Tensor:
        return per_draw(per_cell).expand(*lead, -1).flatten(0, -2)

    if transform_batch is not None:
        batch_index = torch.ones_like(batch_index) * transform_batch
    inputs = [z.flatten(0, -2)]
    categories = () if cat_covs is None else torch.split(cat_covs, 1, dim=1)
    if cont_covs is not None:
        inputs.append(rows(cont_covs))
    if module.batch_representation == "embedding":
        inputs.append(rows(module.compute_embedding(REGISTRY_KEYS.BATCH_KEY, batch_index)))
    else:
        categories = (batch_index, *categories)
    scale, log_theta, rate, zi_logits = module.decoder(
        module.dispersion,
        torch.cat(inputs, dim=-1),
        rows(size_factor if module.use_size_factor_key else library),
        *map(rows, categories),
    )
    if module.dispersion == "gene":
        theta = module.px_r.exp()
    elif module.dispersion == "gene-cell":
        theta = log_theta.exp().unflatten(0, lead)
    else:
        of_cell = batch_index if module.dispersion == "gene-batch" else y
        theta = module.px_r.exp().t().index_select(0, of_cell.squeeze(-1).long())
        theta = per_draw(theta)
    return CountLikelihood(
        module.gene_likelihood,
        scale.unflatten(0, lead),
        rate.unflatten(0, lead),
        theta,
        zi_logits.unflatten(0, lead),
    )


def generative_outputs(
    module: VAE, px: CountLikelihood, z: Tensor, batch_index: Tensor
) -> dict[str, Distribution | None]:
    """What :meth:`scvi.module.VAE.generative` returns, of draws of any leading shape."""
    pl = None
    if not module.use_observed_lib_size:
        means, variances = module._compute_local_library_params(batch_index)
        pl = Normal(means, variances.sqrt())
    pz = Normal(torch.zeros_like(z), torch.ones_like(z))
    return {"px": px.distribution(), "pl": pl, "pz": pz}
