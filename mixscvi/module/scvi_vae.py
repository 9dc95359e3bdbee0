"""scvi-tools' own module, for the options that describe scVI: as it is, and faster."""

from __future__ import annotations

from typing import Any

from scvi.module import VAE
from torch import Tensor
from torch.distributions import Distribution, Normal

from mixscvi.mixture import MixturePosterior, StandardNormal
from mixscvi.mixture.layers import LinearByFeature
from mixscvi.module.decoding import CountLikelihood, decode, latent_priors
from mixscvi.module.devices import auto_move_data, without_waiting
from mixscvi.module.options import MixtureOptions
from mixscvi.module.sampling import ImportanceSampling
from mixscvi.module.signatures import signed_as

__all__ = ["FusedVAE", "ScviVAE"]


@signed_as(VAE)
class ScviVAE(ImportanceSampling, VAE):
    """scvi-tools' own module, with importance sampling mixed in.

    It is identical to that of :class:`scvi.model.SCVI`, bit for bit.
    Its posterior is a mixture of one component, `A` = 1.

    Parameters
    ----------
    *args, **kwargs
        As in :class:`scvi.module.VAE`.

    Examples
    --------
    >>> import torch
    >>> module = ScviVAE(20, n_latent=3).eval()
    >>> x = torch.poisson(torch.full((6, 20), 2.0))
    >>> tensors = {"X": x, "batch": torch.zeros(6, 1), "labels": torch.zeros(6, 1)}
    >>> module.posterior(tensors)
    MixturePosterior(batch_shape=(6,), n_components=1, n_latent=3)
    """

    mixture = MixtureOptions(n_components=1, likelihood="reference")
    n_components = 1
    flow = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prior = StandardNormal(self.n_latent)

    def _encode_components(
        self, dense: Tensor, categories: tuple[Tensor, ...], components: Tensor | None
    ) -> MixturePosterior:
        normal, _ = self.z_encoder(dense, *categories)
        return MixturePosterior(normal.loc.unsqueeze(1), normal.scale.unsqueeze(1))

    @signed_as(VAE.generative)
    @auto_move_data
    def generative(
        self, z: Tensor, library: Tensor, batch_index: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Distribution | None]:
        """As in scvi-tools, and for several draws where batches are embedded.

        Parameters
        ----------
        z
            Draws, `(B, D)` or `(n, B, D)`.
        library
            Log library sizes, `(B, 1)`, or broadcasting to the draws.
        batch_index
            Batch of each cell, `(B, 1)`.
        *args, **kwargs
            As in :meth:`scvi.module.VAE.generative`.

        Returns
        -------
        ``px``, the likelihood of the counts, over `(..., G)`; ``pl`` and ``pz``, the priors of the
        log library size and z.
        """
        if z.dim() == 3 and self.batch_representation == "embedding":
            px = decode(self, z, library, batch_index, *args, **kwargs)
            return latent_priors(self, z, batch_index) | {"px": px.distribution()}
        return super().generative(z, library, batch_index, *args, **kwargs)

    def as_importance_density(self, qz: Distribution) -> Distribution:
        """What scvi-tools' importance weights are to divide by.

        Parameters
        ----------
        qz
            Posterior that ``inference`` returned.

        Returns
        -------
        The same.
        """
        return qz

    def train_covariates_only(self, *, freeze_expression: bool) -> None:
        """Freeze the encoder for scArches; scvi-tools has done it.

        Parameters
        ----------
        freeze_expression
            Not used.
        """


class _LikelihoodOfCells:
    """What scvi-tools' loss asks of a likelihood: ``log_prob(x).sum(-1)``, one value per cell."""

    def __init__(self, likelihood: CountLikelihood) -> None:
        self.likelihood = likelihood

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-likelihood of each cell, `(B, 1)`."""
        return self.likelihood.log_prob(x, equal_rows=True).unsqueeze(-1)


@signed_as(VAE)
class FusedVAE(ScviVAE):
    """scvi-tools' own module, whose loss takes the likelihood in one go.

    Parameters, draws, loss and gradients are those of :class:`ScviVAE` to rounding.

    Parameters
    ----------
    *args, **kwargs
        As in :class:`scvi.module.VAE`.

    Examples
    --------
    >>> import torch
    >>> module = FusedVAE(20, n_latent=3).eval()
    >>> x = torch.poisson(torch.full((6, 20), 2.0))
    >>> tensors = {"X": x, "batch": torch.zeros(6, 1), "labels": torch.zeros(6, 1)}
    >>> inference, generative, losses = module(tensors)
    >>> losses.reconstruction_loss["reconstruction_loss"].shape
    torch.Size([6])
    """

    mixture = MixtureOptions(n_components=1)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        first = self.z_encoder.encoder.fc_layers[0]
        first[0] = LinearByFeature(first[0])  # of counts, which are mostly zero

    def _cached_inference(self, qzm: Tensor, qzv: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Draws of minified data, the same as of the counts, whose encoder draws one first."""
        if kwargs.get("n_samples", 1) > 1:
            Normal(qzm, qzv.sqrt()).sample()
        return super()._cached_inference(qzm, qzv, *args, **kwargs)

    def forward(
        self,
        tensors: dict[str, Tensor],
        *args: Any,
        generative_kwargs: dict[str, Any] | None = None,
        compute_loss: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run inference, the generative model and the loss; see ``BaseModuleClass.forward``.

        Parameters
        ----------
        tensors
            A minibatch.
        *args, **kwargs
            As in ``BaseModuleClass.forward``.
        generative_kwargs
            Passed to :meth:`generative`.
        compute_loss
            Whether the loss is computed.

        Returns
        -------
        What inference and the generative model return, and the loss if it is computed.
        """
        if compute_loss:
            generative_kwargs = {"for_loss": True, **(generative_kwargs or {})}
        with without_waiting(self):
            return super().forward(
                tensors,
                *args,
                generative_kwargs=generative_kwargs,
                compute_loss=compute_loss,
                **kwargs,
            )

    @signed_as(ScviVAE.generative, for_loss=False)
    @auto_move_data
    def generative(
        self,
        z: Tensor,
        library: Tensor,
        batch_index: Tensor,
        *args: Any,
        for_loss: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in scvi-tools; for the loss, ``px`` is no more than its log-likelihood.

        Parameters
        ----------
        z, library, batch_index, *args, **kwargs
            As in :meth:`ScviVAE.generative`.
        for_loss
            Whether the loss alone is to read ``px``.

        Returns
        -------
        ``px``, the likelihood of the counts, over `(..., G)`; ``pl`` and ``pz``, the priors of the
        log library size and z.
        """
        if not for_loss:
            return super().generative(z, library, batch_index, *args, **kwargs)
        px = decode(self, z, library, batch_index, *args, **kwargs)
        return latent_priors(self, z, batch_index) | {"px": _LikelihoodOfCells(px)}
