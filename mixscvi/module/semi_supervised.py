"""Labels of some of the cells: scANVI's generative model under a mixture posterior.

scANVI puts a label y and a latent u below z: p(y) p(u) p(z | u, y) p(x | z). That is scVI's model
with another prior of z, :class:`LabelPrior`, so all that importance-samples z works as it is.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from scvi import REGISTRY_KEYS
from scvi.module import SCANVAE
from scvi.module.base import LossOutput
from scvi.utils import unsupported_if_adata_minified
from torch import Tensor
from torch.distributions import Normal

from mixscvi.mixture import MixturePosterior
from mixscvi.module.devices import auto_move_data
from mixscvi.module.encoding import encoder_input
from mixscvi.module.label_prior import BelowZ, LabelPrior
from mixscvi.module.options import MixtureOptions
from mixscvi.module.scvi_vae import FusedVAE, ScviVAE
from mixscvi.module.signatures import signed_as
from mixscvi.module.vae import MixVAE

if TYPE_CHECKING:
    from scvi.model.base import BaseModelClass

__all__ = ["FusedSCANVAE", "MixSCANVAE", "ScviSCANVAE"]

_DEFAULT = MixtureOptions()
_NOTHING_TO_CLASSIFY = "give x and batch_index, or qzm and qzv of minified data"


class _Labeled:
    """What the modules of scANVI have in common: labels stand below z.

    The module is a :class:`scvi.module.SCANVAE` with
    :class:`~mixscvi.module.ImportanceSampling`.
    """

    def prior_distribution(self) -> LabelPrior:
        """Build p(z).

        Returns
        -------
        A distribution with event shape `(D,)`: has ``log_prob`` and ``sample``.
        """
        return LabelPrior(self)

    def labeled_among(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Those cells of a minibatch that have labels.

        scvi-tools passes cells with labels, but for minibatches of a data module, and where no
        cell has a label and there are covariates of both kinds: then it passes all.

        Parameters
        ----------
        tensors
            A minibatch, or ``None``.

        Returns
        -------
        The minibatch of these cells; ``None`` if they are fewer than two.
        """
        if tensors is None:
            return None
        has_label = tensors[REGISTRY_KEYS.LABELS_KEY].squeeze(-1) < self.n_labels
        if has_label.all():
            return tensors
        if has_label.sum() < 2:  # batch normalization has no variance of a single cell
            return None
        return {
            name: values[has_label]
            if values is not None and len(values) == len(has_label)
            else values
            for name, values in tensors.items()
        }

    def on_load(self, model: BaseModelClass, **kwargs: Any) -> None:
        """Mend what scvi-tools saved before its version 1.1; there is nothing without data.

        Parameters
        ----------
        model
            The model that was loaded.
        **kwargs
            As in ``BaseModuleClass.on_load``.
        """
        if model.adata is not None:
            super().on_load(model, **kwargs)


@signed_as(SCANVAE, mixture=_DEFAULT)
class MixSCANVAE(_Labeled, SCANVAE, MixVAE):
    r"""scANVI's generative model with a mixture of `A` Gaussians as its posterior of z.

    Parameters
    ----------
    *args, **kwargs
        As in :class:`scvi.module.SCANVAE`; they mean the same here.
    mixture
        Posterior and objective. Its prior is that of u: ``"normal"``.

    Examples
    --------
    >>> import torch
    >>> module = MixSCANVAE(20, n_latent=3, n_labels=5, mixture=MixtureOptions(n_components=4))
    >>> x = torch.poisson(torch.full((6, 20), 2.0))
    >>> tensors = {"X": x, "batch": torch.zeros(6, 1), "labels": torch.zeros(6, 1)}
    >>> labeled = {"labelled_tensors": tensors, "classification_ratio": 50}
    >>> _, _, losses = module(tensors, loss_kwargs=labeled)
    >>> losses.logits.shape
    torch.Size([6, 5])
    """

    def log_labels(self, z: Tensor) -> Tensor:
        """log q(y | z) of draws.

        Parameters
        ----------
        z
            Draws, `(..., D)`.

        Returns
        -------
        `(..., C)`, in nats.
        """
        scores = self.classifier(z.flatten(0, -2)).unflatten(0, z.shape[:-1])
        return scores.log_softmax(-1) if self.classifier.logits else scores.log()

    @unsupported_if_adata_minified
    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_ouputs: dict[str, Any],
        kl_weight: Tensor | float = 1.0,
        labelled_tensors: dict[str, Tensor] | None = None,
        classification_ratio: float | None = None,
    ) -> LossOutput:
        r"""Negative bound of a minibatch, and the cross-entropy of cells with known labels.

        The bound is an average over a draw z of each component, with the density q(z | x) of the
        whole mixture, of

        .. math:: \log p(x \mid z) - \log q(z \mid x) + \sum_y q(y \mid z) \Big(
            \mathbb{E}_{q(u \mid z, y)}[\log p(z \mid u, y)] - \mathrm{KL}\big(q(u \mid z, y)
            \,\|\, p(u)\big)\Big) - \mathrm{KL}\big(q(y \mid z) \,\|\, p(y)\big),

        whose KL divergences count by `kl_weight`, as in scANVI.

        Parameters
        ----------
        tensors
            A minibatch.
        inference_outputs, generative_ouputs
            What ``inference`` and ``generative`` returned of stratified draws.
        kl_weight
            Weight of the KL divergences.
        labelled_tensors
            Cells with known labels, for the cross-entropy.
        classification_ratio
            Weight of the cross-entropy.

        Returns
        -------
        The loss and its parts, in nats; labels and scores of the cells that were classified.
        """
        log_px = self._log_likelihood(tensors, generative_ouputs)
        z = inference_outputs["untransformed_z"]
        draws = self.prior_distribution().below(z.flatten(0, -2))
        below = BelowZ(*(term.unflatten(0, z.shape[:-1]) for term in draws))
        log_y = self.log_labels(z)
        # Importance weights bound log p(x) with what was drawn, not with what is expected of it.
        kl_u = below.kl_u if self.mixture.n_samples == 1 else -below.log_ratio
        kl_y = log_y - self.y_prior.log().squeeze(0)
        losses = self._losses(
            log_px - inference_outputs["log_qz"] + (log_y.exp() * below.log_pz).sum(-1),
            -(log_y.exp() * (kl_u + kl_y)).sum(-1),
            kl_weight,
            tensors,
            inference_outputs,
            generative_ouputs,
            library_weight=kl_weight,
        )
        labelled_tensors = self.labeled_among(labelled_tensors)
        if labelled_tensors is None:
            return losses
        cross_entropy, labels, logits = self.classification_loss(labelled_tensors)
        return replace(
            losses,
            loss=losses.loss + cast(float, classification_ratio) * cross_entropy,
            classification_loss=cross_entropy,
            true_labels=labels,
            logits=logits,
        )

    @auto_move_data
    def classification_loss(
        self, labelled_dataset: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of known labels at the mean of each component, averaged over components.

        Each component learns to classify on its own. From the logarithm of averaged probabilities,
        which this bounds, a component would learn in proportion to how right it is already.

        Parameters
        ----------
        labelled_dataset
            A minibatch of cells with known labels.

        Returns
        -------
        The cross-entropy, the labels `(B, 1)`, and the logarithm of the averaged probabilities,
        `(B, C)`.
        """
        inputs = self._get_inference_input(labelled_dataset, full_forward_pass=True)
        encode, _ = self._choose_components(inputs["x"].device)
        posterior = self._encode_components(*encoder_input(self, **inputs), encode)
        log_labels = self._log_labels_of(posterior, use_posterior_mean=True)
        labels = labelled_dataset[REGISTRY_KEYS.LABELS_KEY]
        own = labels.long().expand(-1, log_labels.shape[1])
        cross_entropy = F.nll_loss(log_labels.flatten(0, 1), own.flatten())
        return cross_entropy, labels, _average(log_labels)

    @auto_move_data
    def classify(
        self,
        x: Tensor | None = None,
        batch_index: Tensor | None = None,
        cont_covs: Tensor | None = None,
        cat_covs: Tensor | None = None,
        use_posterior_mean: bool = True,
        *,
        qzm: Tensor | None = None,
        qzv: Tensor | None = None,
        observed_lib_size: Tensor | None = None,
    ) -> Tensor:
        """Scores of the labels, with probabilities averaged over the components.

        Parameters
        ----------
        x, batch_index, cont_covs, cat_covs
            As in :meth:`scvi.module.SCANVAE.classify`.
        use_posterior_mean
            Whether the mean of each component is classified, or a draw from each.
        qzm, qzv, observed_lib_size
            Of minified data, instead of counts.

        Returns
        -------
        log q(y | x), `(B, C)`; its exponential if the classifier gives probabilities.

        Raises
        ------
        ValueError
            If there are neither counts nor minified posteriors.
        """
        if qzm is not None and qzv is not None:
            posterior = self.stored_posterior(qzm, qzv)
        elif x is not None and batch_index is not None:
            dense, categories = encoder_input(self, x, batch_index, cont_covs, cat_covs)
            posterior = self._encode_components(dense, categories, None)
        else:
            raise ValueError(_NOTHING_TO_CLASSIFY)
        log_y = _average(self._log_labels_of(posterior, use_posterior_mean=use_posterior_mean))
        return log_y if self.classifier.logits else log_y.exp()

    def _log_labels_of(self, posterior: MixturePosterior, *, use_posterior_mean: bool) -> Tensor:
        """log q(y | z) at the mean of each component or at a draw from it, `(B, A, C)`."""
        z0 = posterior.component_loc
        if not use_posterior_mean:
            z0 = posterior.rsample_stratified(1).squeeze(0)
        z, _ = self.push_forward(z0)
        return self.log_labels(z)


def _average(log_labels: Tensor) -> Tensor:
    """Logarithm of probabilities averaged over components, `(B, C)` from `(B, A, C)`."""
    return log_labels.logsumexp(1) - math.log(log_labels.shape[1])


@signed_as(SCANVAE)
class ScviSCANVAE(_Labeled, SCANVAE, ScviVAE):
    """scvi-tools' own module, with importance sampling mixed in.

    It is identical to that of :class:`scvi.model.SCANVI`, bit for bit. Its posterior is a mixture
    of one component.

    Parameters
    ----------
    *args, **kwargs
        As in :class:`scvi.module.SCANVAE`.

    Examples
    --------
    >>> import torch
    >>> module = ScviSCANVAE(20, n_latent=3, n_labels=5).eval()
    >>> module.classify(torch.ones(6, 20), torch.zeros(6, 1)).shape
    torch.Size([6, 5])
    """

    @signed_as(SCANVAE.loss)
    def loss(
        self,
        tensors: dict[str, Tensor],
        *args: Any,
        labelled_tensors: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> LossOutput:
        """As in scvi-tools, of cells with labels alone.

        Parameters
        ----------
        tensors
            A minibatch.
        *args, **kwargs
            As in :meth:`scvi.module.SCANVAE.loss`.
        labelled_tensors
            Cells with known labels; those without are left out.

        Returns
        -------
        The loss and its parts, in nats.
        """
        labeled = self.labeled_among(labelled_tensors)
        return super().loss(tensors, *args, labelled_tensors=labeled, **kwargs)

    def classification_loss(
        self, labelled_dataset: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in scvi-tools, by the encoder: also of minified data, which keep their counts here.

        Parameters
        ----------
        labelled_dataset
            A minibatch of cells with known labels.

        Returns
        -------
        The cross-entropy, the labels `(B, 1)`, and the scores `(B, C)`.
        """
        minified, self._minified_data_type = self._minified_data_type, None
        try:
            return super().classification_loss(labelled_dataset)
        finally:
            self._minified_data_type = minified

    @auto_move_data
    def classify(
        self,
        x: Tensor | None = None,
        batch_index: Tensor | None = None,
        cont_covs: Tensor | None = None,
        cat_covs: Tensor | None = None,
        use_posterior_mean: bool = True,
        *,
        qzm: Tensor | None = None,
        qzv: Tensor | None = None,
        observed_lib_size: Tensor | None = None,
    ) -> Tensor:
        """As in scvi-tools, also for embedded batches and minified data.

        Parameters
        ----------
        x, batch_index, cont_covs, cat_covs, use_posterior_mean
            As in :meth:`scvi.module.SCANVAE.classify`.
        qzm, qzv, observed_lib_size
            Of minified data, instead of counts.

        Returns
        -------
        Scores of the labels, `(B, C)`.

        Raises
        ------
        ValueError
            If there are neither counts nor minified posteriors.
        """
        if qzm is not None and qzv is not None:
            qz = Normal(qzm, qzv.sqrt())
            z = qz.sample()
        elif x is not None and batch_index is not None:
            dense, categories = encoder_input(self, x, batch_index, cont_covs, cat_covs)
            qz, z = self.z_encoder(dense, *categories)
        else:
            raise ValueError(_NOTHING_TO_CLASSIFY)
        return self.classify_helper(qz.loc if use_posterior_mean else z)


@signed_as(SCANVAE)
class FusedSCANVAE(ScviSCANVAE, FusedVAE):
    """scvi-tools' own module, whose loss takes the likelihood in one go.

    Parameters, draws, loss and gradients are those of :class:`ScviSCANVAE` to rounding.

    Parameters
    ----------
    *args, **kwargs
        As in :class:`scvi.module.SCANVAE`.

    Examples
    --------
    >>> import torch
    >>> module = FusedSCANVAE(20, n_latent=3, n_labels=5).eval()
    >>> x = torch.poisson(torch.full((6, 20), 2.0))
    >>> tensors = {"X": x, "batch": torch.zeros(6, 1), "labels": torch.zeros(6, 1)}
    >>> _, _, losses = module(tensors)
    >>> losses.reconstruction_loss["reconstruction_loss"].shape
    torch.Size([6])
    """
