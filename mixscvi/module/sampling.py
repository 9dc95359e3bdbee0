"""Importance sampling of log p(x), for scvi-tools' module and for ours."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, NamedTuple

import torch
from scvi import REGISTRY_KEYS
from scvi.distributions import Normal
from torch import Tensor
from torch.distributions import Distribution

from mixscvi.mixture import (
    ImportanceDraws,
    InverseAutoregressiveFlow,
    MixturePosterior,
    Prior,
    importance_weighted_miselbo,
    siwae,
)
from mixscvi.module.adapting import Adaptation
from mixscvi.module.decoding import decode
from mixscvi.module.devices import auto_move_data
from mixscvi.module.encoding import encoder_input
from mixscvi.module.options import MixtureOptions

__all__ = ["FORMS", "Encoded", "ImportanceSampling"]

FORMS = {"siwae": siwae, "iw_miselbo": importance_weighted_miselbo}
_ELEMENTS_PER_DECODE = 2**22


class Encoded(NamedTuple):
    """Encoder outputs for a minibatch."""

    posterior: MixturePosterior
    """Ahead of the flow, batch shape `(B,)`."""
    ql: Distribution | None
    """Posterior of the log library size, `(B, 1)`, where it is modeled."""
    library: Tensor
    """Log library size, observed or drawn, `(B, 1)`."""


class ImportanceSampling(Adaptation):
    """What a :class:`scvi.module.VAE` needs for importance sampling with its posterior.

    The module has a ``prior`` over `D` dimensions and a ``flow``, or ``None``.

    Examples
    --------
    What both modules offer, for a minibatch as scvi-tools loads it:

    >>> import torch
    >>> from mixscvi.module import MixVAE
    >>> module = MixVAE(20, n_latent=3).eval()  # A = 4
    >>> x = torch.poisson(torch.full((6, 20), 2.0))
    >>> tensors = {"X": x, "batch": torch.zeros(6, 1), "labels": torch.zeros(6, 1)}
    >>> module.importance_draws(tensors, n_samples=5).log_weights.shape  # (L, B, A)
    torch.Size([5, 6, 4])
    >>> module.marginal_ll(tensors, n_mc_samples=20).shape
    torch.Size([6])
    """

    mixture: MixtureOptions
    n_components: int
    """Number of components, `A`."""
    prior: Prior
    flow: InverseAutoregressiveFlow | None

    @abstractmethod
    def _encode_components(
        self, dense: Tensor, categories: tuple[Tensor, ...], components: Tensor | None
    ) -> MixturePosterior:
        """The posterior from the encoder's inputs; all components when `components` is ``None``."""

    def encode(
        self,
        x: Tensor,
        batch_index: Tensor,
        cont_covs: Tensor | None = None,
        cat_covs: Tensor | None = None,
        components: Tensor | None = None,
    ) -> Encoded:
        """Posteriors of z and of the library size.

        Parameters
        ----------
        x, batch_index, cont_covs, cat_covs
            As in :meth:`scvi.module.VAE.inference`.
        components
            The `S` components to encode, `(S,)`; all `A` when ``None``.

        Returns
        -------
        Posteriors, and the log library size.
        """
        dense, categories = encoder_input(self, x, batch_index, cont_covs, cat_covs)
        posterior = self._encode_components(dense, categories, components)
        if self.use_observed_lib_size:
            return Encoded(posterior, None, x.sum(1, keepdim=True).log())
        return Encoded(posterior, *self.l_encoder(dense, *categories))

    def stored_posterior(self, qzm: Tensor, qzv: Tensor) -> MixturePosterior:
        """The posterior that minified data store.

        Parameters
        ----------
        qzm, qzv
            Means and variances of all components, `(B, A * D)` each.

        Returns
        -------
        The mixture, batch shape `(B,)`.
        """
        shape = (-1, self.n_latent)
        return MixturePosterior(qzm.unflatten(-1, shape), qzv.unflatten(-1, shape).sqrt())

    @torch.inference_mode()
    @auto_move_data
    def posterior(self, tensors: dict[str, Tensor]) -> MixturePosterior:
        """The mixture posterior of a minibatch, before any flow.

        Parameters
        ----------
        tensors
            A minibatch, of counts or minified.

        Returns
        -------
        The mixture, batch shape `(B,)`.
        """
        inputs = self._get_inference_input(tensors)
        if "qzm" in inputs:
            return self.stored_posterior(inputs["qzm"], inputs["qzv"])
        return self.encode(**inputs).posterior

    def prior_distribution(self) -> Distribution:
        """Build p(z).

        Returns
        -------
        A distribution with event shape `(D,)`: has ``log_prob`` and ``sample``.
        """
        return self.prior(self.z_encoder)

    def push_forward(self, z0: Tensor) -> tuple[Tensor, Tensor | float]:
        """Push draws of the posterior through the flow, if there is one.

        Parameters
        ----------
        z0
            Draws, `(..., D)`.

        Returns
        -------
        z, `(..., D)`, and ``log |det dz/dz0|``, `(...)`, or 0 without a flow.
        """
        return (z0, 0.0) if self.flow is None else self.flow(z0)

    @torch.inference_mode()
    @auto_move_data
    def importance_draws(
        self, tensors: dict[str, Tensor], n_samples: int, draws_per_pass: int | None = None
    ) -> ImportanceDraws:
        """Densities of `n_samples` draws from each component, for any importance-sampled quantity.

        The cells are encoded once; draws are decoded in passes, so memory follows the pass.

        Parameters
        ----------
        tensors
            A minibatch.
        n_samples
            Draws per component, `L`.
        draws_per_pass
            Draws per cell that are decoded at once; by default, as many as make about four
            million decoded values.

        Returns
        -------
        Log-densities, each `(L, B, A)`.
        """
        inputs = self._get_inference_input(tensors, full_forward_pass=True)
        posterior, ql, library = self.encode(**inputs)
        prior = self.prior_distribution()
        x = tensors[REGISTRY_KEYS.X_KEY]
        if draws_per_pass is None:
            draws_per_pass = max(1, _ELEMENTS_PER_DECODE // x.numel())
        n_draws = n_samples * self.n_components
        passes = []
        for start in range(0, n_draws, draws_per_pass):
            stop = min(start + draws_per_pass, n_draws)
            component = torch.arange(start, stop, device=x.device) % self.n_components
            z0 = posterior.rsample_stratified(1, component)
            own = posterior.own_log_prob(z0, component)
            log_q = posterior.stratified_log_prob(z0)
            z, log_det = self.push_forward(z0)
            log_joint = prior.log_prob(z)
            if ql is not None:
                library, log_ratio = self._library_draws(ql, stop - start, tensors)
                log_joint = log_joint + log_ratio
            drawn = {"z": self.z_encoder.z_transformation(z), "library": library}
            fused = self.mixture.likelihood == "fused"
            px = decode(self, **self._get_generative_input(tensors, drawn), fused=fused)
            log_joint = log_joint + px.log_prob(x)
            passes.append(torch.stack((log_joint, own - log_det, log_q - log_det)))
        stacked = torch.cat(passes, dim=-1).squeeze(1)  # (3, B, L * A)
        return ImportanceDraws(*stacked.unflatten(-1, (n_samples, -1)).movedim(-2, 1))

    def _library_draws(
        self, ql: Distribution, n_draws: int, tensors: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Log library sizes `(1, B, n_draws, 1)` with log p(l) - log q(l), `(1, B, n_draws)`."""
        means, variances = self._compute_local_library_params(tensors[REGISTRY_KEYS.BATCH_KEY])
        library = ql.sample((n_draws,))
        log_ratio = Normal(means, variances.sqrt()).log_prob(library) - ql.log_prob(library)
        return library.transpose(0, 1)[None], log_ratio.sum(-1).t()[None]

    @torch.inference_mode()
    @auto_move_data
    def marginal_ll(
        self,
        tensors: dict[str, Tensor],
        n_mc_samples: int,
        return_mean: bool = False,
        n_mc_samples_per_pass: int | None = None,
        form: Literal["siwae", "iw_miselbo"] = "siwae",
    ) -> Tensor | float:
        """Estimate log p(x) of a minibatch; see :meth:`mixscvi.MixSCVI.get_marginal_ll`.

        Parameters
        ----------
        tensors
            A minibatch, with counts.
        n_mc_samples
            Draws per cell, rounded up to as many from each component.
        return_mean
            Whether to return the mean over cells instead.
        n_mc_samples_per_pass
            Draws per cell that are decoded at once.
        form
            Estimate, a name in :data:`FORMS`.

        Returns
        -------
        `(B,)`, or its mean, in nats.
        """
        n_samples = math.ceil(n_mc_samples / self.n_components)
        draws = self.importance_draws(tensors, n_samples, n_mc_samples_per_pass)
        log_px = FORMS[form](draws.log_weights)
        return log_px.mean().item() if return_mean else log_px
