"""From draws of z to the likelihood of the counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from scvi import REGISTRY_KEYS
from scvi.distributions import (
    NegativeBinomial,
    Normal,
    Poisson,
    ZeroInflatedNegativeBinomial,
)
from scvi.module import VAE
from scvi.nn import DecoderSCVI
from torch import Tensor, nn
from torch.distributions import Distribution

from mixscvi.likelihoods import head_log_prob, nb_log_prob, poisson_log_prob, zinb_log_prob
from mixscvi.module.hidden_units import beside_draws, hidden_units, hidden_units_by_columns

__all__ = ["CountLikelihood", "decode", "latent_priors"]


@dataclass(frozen=True)
class CountLikelihood:
    """p(x | z) of every draw: the decoder's last hidden units, and what is made of them.

    Examples
    --------
    >>> import torch
    >>> from scvi.nn import DecoderSCVI
    >>> decoder, hidden = DecoderSCVI(3, 20, n_hidden=8), torch.zeros(2, 6, 4, 8)  # (L, B, S, H)
    >>> px = CountLikelihood(decoder, "zinb", hidden, torch.zeros(2, 6, 4, 1), torch.ones(20))
    >>> px.log_prob(torch.zeros(6, 20)).shape
    torch.Size([2, 6, 4])
    """

    decoder: DecoderSCVI
    gene_likelihood: str
    """``"zinb"``, ``"nb"``, ``"poisson"`` or ``"normal"``."""
    hidden: Tensor
    """Last hidden units: `(B, H)`, `(n, B, H)` or `(L, B, S, H)`."""
    log_size: Tensor
    """Logarithm of the library size or size factor, `(..., 1)` with the draws' leading shape."""
    theta: Tensor
    """Inverse dispersion (standard deviation of the normal likelihood): `(G,)`, one for every
    draw, or one for every cell: `(B, 1, G)` of draws `(L, B, S)`, otherwise `(B, G)`."""
    fused: bool = True
    """Whether log-likelihoods are computed from the hidden units in one go, or by the
    distributions of scvi-tools."""

    def log_prob(self, x: Tensor, *, equal_rows: bool = False) -> Tensor:
        """log p(x | z), summed over genes.

        Parameters
        ----------
        x
            Counts, `(B, G)`.
        equal_rows
            Whether the loss is a mean over all values; see
            :func:`~mixscvi.likelihoods.head_log_prob`.

        Returns
        -------
        One value per draw, in nats: `(L, B, S)` for draws `(L, B, S, D)`.
        """
        if not self.fused:
            x = x.unsqueeze(1) if self.hidden.dim() == 4 else x
            return self.distribution().log_prob(x).sum(-1)
        return self._fused_log_prob(x, equal_rows).view(self.hidden.shape[:-1])

    def _fused_log_prob(self, x: Tensor, equal_rows: bool) -> Tensor:
        hidden, log_size = self._by_draw(self.hidden), self._by_draw(self.log_size)
        theta = self._by_draw(self.theta)
        scale, activation = self.decoder.px_scale_decoder
        dropout = self.decoder.px_dropout_decoder if self.gene_likelihood == "zinb" else None
        if isinstance(activation, nn.Softmax) and self.gene_likelihood != "normal":
            return head_log_prob(
                x,
                hidden,
                scale.weight,
                scale.bias,
                log_size.squeeze(-1),
                None if self.gene_likelihood == "poisson" else theta,
                None if dropout is None else dropout.weight,
                None if dropout is None else dropout.bias,
                equal_rows=equal_rows,
            )
        rate = log_size.exp() * self.decoder.px_scale_decoder(hidden)
        if self.gene_likelihood == "zinb":
            return zinb_log_prob(x, rate, theta, dropout(hidden))
        if self.gene_likelihood == "nb":
            return nb_log_prob(x, rate, theta)
        if self.gene_likelihood == "poisson":
            return poisson_log_prob(x, rate)
        normal = torch.distributions.Normal(rate, theta, validate_args=False)
        return normal.log_prob(x.unsqueeze(1)).sum(-1)

    def _by_draw(self, parameter: Tensor) -> Tensor:
        """Give a parameter of draws `(B, ...)` or `(n, B, ...)` the axes `(L, B, S, ...)`."""
        if self.hidden.dim() == 4 or parameter.dim() == 1:
            return parameter
        of_all_draws = parameter is self.theta and parameter.dim() == 2  # (B, G)
        if not of_all_draws:
            parameter = parameter.reshape(-1, *parameter.shape[-2:])
        return parameter.unsqueeze(-2)

    def distribution(self) -> Distribution:
        """The same as a distribution of scvi-tools.

        Returns
        -------
        The distribution of the counts, over `(..., G)`.
        """
        scale = self.decoder.px_scale_decoder(self.hidden)
        rate = self.log_size.exp() * scale
        if self.gene_likelihood == "zinb":
            zi_logits = self.decoder.px_dropout_decoder(self.hidden)
            return ZeroInflatedNegativeBinomial(
                mu=rate, theta=self.theta, zi_logits=zi_logits, scale=scale
            )
        if self.gene_likelihood == "nb":
            return NegativeBinomial(mu=rate, theta=self.theta, scale=scale)
        if self.gene_likelihood == "poisson":
            return Poisson(rate=rate, scale=scale)
        return Normal(rate, self.theta, normal_mu=scale)


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
    *,
    fused: bool = True,
) -> CountLikelihood:
    """Decode draws of any leading shape as rows of one call.

    It gives the likelihood that :meth:`scvi.module.VAE.generative` gives draw by draw.

    Parameters
    ----------
    module
        Has the decoder and the dispersions, and says how covariates enter.
    z
        Draws after the flow, `(B, D)`, `(n, B, D)` or `(L, B, S, D)`.
    library
        Log library sizes, `(B, 1)` or broadcasting to the draws.
    batch_index, cont_covs, cat_covs, size_factor, y
        Of each cell, `(B, ...)`, as in :meth:`scvi.module.VAE.generative`.
    transform_batch
        Batch to decode all cells as, instead of their own.
    fused
        See :class:`CountLikelihood`.

    Returns
    -------
    The likelihood of every draw.

    Examples
    --------
    >>> import torch
    >>> module = VAE(20, n_latent=3).eval()
    >>> px = decode(module, torch.zeros(2, 6, 4, 3), torch.zeros(6, 1), torch.zeros(6, 1))
    >>> px.log_prob(torch.zeros(6, 20)).shape  # (L, B, S)
    torch.Size([2, 6, 4])
    """
    lead = z.shape[:-1]
    if transform_batch is not None:
        batch_index = torch.ones_like(batch_index) * transform_batch
    categories = () if cat_covs is None else torch.split(cat_covs, 1, dim=1)
    continuous = [] if cont_covs is None else [cont_covs]
    if module.batch_representation == "embedding":
        continuous.append(module.compute_embedding(REGISTRY_KEYS.BATCH_KEY, batch_index))
    else:
        categories = (batch_index, *categories)
    through = hidden_units if fused else hidden_units_by_columns
    hidden = through(module.decoder.px_decoder, z, continuous, categories)
    if module.dispersion == "gene":
        theta = module.px_r.exp()
    elif module.dispersion == "gene-cell":
        theta = module.decoder.px_r_decoder(hidden).exp()
    else:
        of_cell = batch_index if module.dispersion == "gene-batch" else cast(Tensor, y)
        theta = module.px_r.exp().t().index_select(0, of_cell.squeeze(-1).long())
        theta = beside_draws(theta, lead)
    log_size = cast(Tensor, size_factor) if module.use_size_factor_key else library
    log_size = beside_draws(log_size, lead)
    return CountLikelihood(
        module.decoder, module.gene_likelihood, hidden, log_size.expand(*lead, 1), theta, fused
    )


def latent_priors(module: VAE, z: Tensor, batch_index: Tensor) -> dict[str, Distribution | None]:
    """Priors of the log library size and of z, as :meth:`scvi.module.VAE.generative` returns them.

    ``pl`` is over `(B, 1)`, or ``None`` where library sizes are observed; ``pz``, the standard
    normal, is of the shape of `z`.
    """
    pl = None
    if not module.use_observed_lib_size:
        means, variances = module._compute_local_library_params(batch_index)
        pl = Normal(means, variances.sqrt(), validate_args=False)
    # To validate arguments, the host would wait for an accelerator.
    return {"pl": pl, "pz": Normal(torch.zeros_like(z), torch.ones_like(z), validate_args=False)}
