"""The mixture core behind scvi-tools' module contract."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import Any, cast

import torch
from scvi import REGISTRY_KEYS
from scvi.module import VAE
from scvi.module.base import LossOutput
from scvi.utils import unsupported_if_adata_minified
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from mixscvi.mixture import (
    AmortizedEncoder,
    Estimator,
    GaussianMixture,
    InverseAutoregressiveFlow,
    MixturePosterior,
    Prior,
    SeparateEncoder,
    StackedMLP,
    StandardNormal,
    VampPrior,
    importance_weighted_miselbo,
    siwae,
)
from mixscvi.module.decoding import CountLikelihood, decode, latent_priors
from mixscvi.module.densities import importance_density, latent_moments
from mixscvi.module.devices import auto_move_data, moved_ahead, without_waiting
from mixscvi.module.encoding import MixtureEncoder, encoder_input
from mixscvi.module.factorized import FactorizedMixture
from mixscvi.module.options import MixtureOptions
from mixscvi.module.pseudo_cells import PseudoCells
from mixscvi.module.sampling import ImportanceSampling
from mixscvi.module.signatures import signed_as

__all__ = ["MixVAE"]

_COMPONENT_ENCODERS = {"separate": SeparateEncoder, "amortized": AmortizedEncoder}
_OBJECTIVES = {"siwae": siwae, "miselbo": importance_weighted_miselbo}
_DEFAULT = MixtureOptions()


@signed_as(VAE, mixture=_DEFAULT)
class MixVAE(ImportanceSampling, VAE):
    r"""scVI's generative model with a mixture of `A` Gaussians as its posterior.

    Parameters
    ----------
    *args, **kwargs
        As in :class:`scvi.module.VAE`; they mean the same here.
    mixture
        Posterior, prior and objective.

    Raises
    ------
    ValueError
        If the prior is not one over `D` dimensions.

    Notes
    -----
    Draws are `(L, B, S, D)` in the loss and decoded as `L * B * S` rows in one call.

    Examples
    --------
    >>> import torch
    >>> module = MixVAE(20, n_latent=3, mixture=MixtureOptions(n_components=4))
    >>> x = torch.poisson(torch.full((6, 20), 2.0))
    >>> tensors = {"X": x, "batch": torch.zeros(6, 1), "labels": torch.zeros(6, 1)}
    >>> inference, generative, losses = module(tensors)
    >>> inference["z"].shape, losses.loss.shape  # (L, B, S, D)
    (torch.Size([1, 6, 4, 3]), torch.Size([]))
    """

    # Of the components that a step draws from; torch's own when None.
    component_generator: torch.Generator | None = None

    def __init__(self, *args: Any, mixture: MixtureOptions = _DEFAULT, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = inspect.signature(VAE).bind(*args, **kwargs)
        given.apply_defaults()
        self.mixture = mixture
        self.n_components = mixture.n_components
        self._make_encoder(given.arguments)
        self.prior = self._make_prior(mixture)
        self.flow = (
            InverseAutoregressiveFlow(self.n_latent, mixture.n_flow_steps)
            if mixture.n_flow_steps
            else None
        )
        event_shape = tuple(self.prior_distribution().event_shape)
        if event_shape != (self.n_latent,):
            raise ValueError(
                f"prior must have event shape ({self.n_latent},), as n_latent={self.n_latent}, "
                f"got {event_shape}"
            )

    def _make_encoder(self, vae: dict[str, Any]) -> None:
        """Replace scvi-tools' encoder by the mixture's, after reading its input sizes."""
        replaced = self.z_encoder.encoder
        self._n_dense = replaced.fc_layers[0][0].in_features - replaced.n_cov
        n_cat_list = list(replaced.n_cat_list)
        encoder_kwargs = dict(vae["extra_encoder_kwargs"] or {})
        if "activation_fn" in encoder_kwargs:
            encoder_kwargs["activation"] = encoder_kwargs.pop("activation_fn")
        encoder = _COMPONENT_ENCODERS[self.mixture.component_encoder](
            self.n_components,
            self._n_dense,
            self.n_latent,
            n_hidden=vae["n_hidden"],
            n_layers=vae["n_layers"],
            n_covariates=sum(n_cat_list),
            inject_covariates=vae["deeply_inject_covariates"],
            dropout_rate=vae["dropout_rate"],
            use_batch_norm=vae["use_batch_norm"] in ("encoder", "both"),
            use_layer_norm=vae["use_layer_norm"] in ("encoder", "both"),
            var_activation=vae["var_activation"],
            **encoder_kwargs,
        )
        self.z_encoder = MixtureEncoder(encoder, n_cat_list, self.latent_distribution)

    def _make_prior(self, mixture: MixtureOptions) -> Prior:
        if isinstance(mixture.prior, Prior):
            return copy.deepcopy(mixture.prior)
        if mixture.prior == "normal":
            return StandardNormal(self.n_latent)
        if mixture.prior == "mog":
            return GaussianMixture(self.n_latent, mixture.n_prior_components)
        return VampPrior(
            PseudoCells(
                mixture.n_prior_components,
                self.n_input,
                self._n_dense,
                self.z_encoder.n_cat_list,
                non_negative=self.gene_likelihood != "normal",
            )
        )

    @property
    def has_random_pseudo_cells(self) -> bool:
        """Whether the prior has pseudo-cells to be trained that are none of real cells yet."""
        if self.mixture.prior != "vamp":
            return False
        cells = self._pseudo_cells
        return cells.dense.requires_grad and not cells.started

    @property
    def _pseudo_cells(self) -> PseudoCells:
        return cast(PseudoCells, cast(VampPrior, self.prior).pseudo_inputs)

    @torch.no_grad()
    def initialize_pseudo_cells(self, minibatches: Iterable[dict[str, Tensor]]) -> None:
        """Start the VampPrior's `K` pseudo-cells from the first `K` real cells.

        Parameters
        ----------
        minibatches
            Of the cells; none is taken beyond the `K`-th cell.
        """
        inputs = (encoder_input(self, **self._get_inference_input(cells)) for cells in minibatches)
        self._pseudo_cells.initialize((dense, *categories) for dense, categories in inputs)

    def _encode_components(
        self, dense: Tensor, categories: tuple[Tensor, ...], components: Tensor | None
    ) -> MixturePosterior:
        return self.z_encoder(dense, *categories, components=components)

    def _choose_components(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Components to encode and, counted among those, components to draw from."""
        estimator = Estimator(self.mixture.estimator)
        n_drawn = estimator.n_drawn(self.n_components, self.mixture.n_sampled_components)
        chosen = estimator.choose(self.n_components, n_drawn, self.component_generator)
        if chosen is None:
            return None, None
        chosen = moved_ahead(chosen, device)
        if estimator is Estimator.SOME_TO_SOME and self.training:
            return chosen, None
        return None, chosen

    def forward(
        self,
        tensors: dict[str, Tensor],
        *args: Any,
        inference_kwargs: dict[str, Any] | None = None,
        compute_loss: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run inference, the generative model and the loss; see ``BaseModuleClass.forward``.

        The loss takes stratified draws, one for each sampled component; every other caller takes
        plain draws from the mixture.

        Parameters
        ----------
        tensors
            A minibatch.
        *args, **kwargs
            As in ``BaseModuleClass.forward``.
        inference_kwargs
            Passed to ``inference``.
        compute_loss
            Whether the loss is computed.

        Returns
        -------
        What inference and the generative model return, and the loss if it is computed.
        """
        if compute_loss:
            inference_kwargs = {"stratified": True, **(inference_kwargs or {})}
        with without_waiting(self):
            return super().forward(
                tensors,
                *args,
                inference_kwargs=inference_kwargs,
                compute_loss=compute_loss,
                **kwargs,
            )

    @auto_move_data
    def _regular_inference(
        self,
        x: Tensor,
        batch_index: Tensor,
        cont_covs: Tensor | None = None,
        cat_covs: Tensor | None = None,
        n_samples: int = 1,
        stratified: bool = False,
    ) -> dict[str, Tensor | Distribution | None]:
        encode, draw = self._choose_components(x.device) if stratified else (None, None)
        posterior, ql, library = self.encode(x, batch_index, cont_covs, cat_covs, encode)
        if stratified:
            outputs = self._stratified_draws(posterior, draw)
        else:
            outputs = self._plain_draws(posterior, n_samples)
            if n_samples > 1:
                library = (
                    library.expand(n_samples, -1, -1) if ql is None else ql.sample((n_samples,))
                )
        return {**outputs, "ql": ql, "library": library}

    @auto_move_data
    def _cached_inference(
        self,
        qzm: Tensor,
        qzv: Tensor,
        observed_lib_size: Tensor,
        n_samples: int = 1,
        stratified: bool = False,
    ) -> dict[str, Tensor | Distribution | None]:
        posterior, library = self.stored_posterior(qzm, qzv), observed_lib_size.log()
        if stratified:
            outputs = self._stratified_draws(posterior, None)
        else:
            outputs = self._plain_draws(posterior, n_samples)
            if n_samples > 1:
                library = library.expand(n_samples, -1, -1)
        return {**outputs, "ql": None, "library": library}

    def _stratified_draws(
        self, posterior: MixturePosterior, components: Tensor | None
    ) -> dict[str, Any]:
        """Draws `(L, B, S, D)` for the loss, with their log-density under the mixture."""
        z0 = posterior.rsample_stratified(self.mixture.n_samples, components)
        z, log_det = self.push_forward(z0)
        return {
            "z": self.z_encoder.z_transformation(z),
            "qz": posterior,
            "untransformed_z": z,
            "log_qz": posterior.stratified_log_prob(z0) - log_det,
        }

    def _plain_draws(self, posterior: MixturePosterior, n_samples: int) -> dict[str, Any]:
        """Draws for scvi-tools' methods, `(B, D)` or `(n_samples, B, D)`."""
        qz = FactorizedMixture(posterior.component_loc, posterior.component_scale)
        z0 = qz.rsample() if n_samples == 1 else qz.sample((n_samples,))
        z, _ = self.push_forward(z0)
        return {"z": self.z_encoder.z_transformation(z), "qz": qz, "untransformed_z": z}

    @signed_as(VAE.generative)
    @auto_move_data
    def generative(
        self, z: Tensor, library: Tensor, batch_index: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, CountLikelihood | Distribution | None]:
        """Decode draws of any leading shape in one call; see ``VAE.generative``.

        Of plain draws ``px`` is a distribution of scvi-tools, of the loss's stratified draws the
        :class:`~mixscvi.module.decoding.CountLikelihood` itself.

        Parameters
        ----------
        z
            Draws, `(B, D)`, `(n, B, D)`, or stratified, `(L, B, S, D)`.
        library
            Log library sizes, `(B, 1)`, or broadcasting to the draws.
        batch_index
            Batch of each cell, `(B, 1)`.
        *args, **kwargs
            As in :meth:`scvi.module.VAE.generative`.

        Returns
        -------
        ``px``, the likelihood of the counts; ``pl`` and ``pz``, the priors of the log library size
        and z.
        """
        fused = self.mixture.likelihood == "fused"
        px = decode(self, z, library, batch_index, *args, fused=fused, **kwargs)
        stratified = z.dim() == 4
        priors = latent_priors(self, z, batch_index)
        return priors | {"px": px if stratified else px.distribution()}

    @unsupported_if_adata_minified
    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        kl_weight: Tensor | float = 1.0,
    ) -> LossOutput:
        r"""Negative bound of the minibatch.

        With ``n_samples=1`` and the MISELBO objective this is the reconstruction error plus
        `kl_weight` times :math:`\frac{1}{S} \sum_s \log q(z_s) - \log p(z_s)`. In the other
        objectives the two do not separate, and ``kl_local`` reports the bound less the
        reconstruction error, so that their sum is always the negative bound.

        Parameters
        ----------
        tensors
            A minibatch.
        inference_outputs, generative_outputs
            What ``inference`` and ``generative`` returned of stratified draws.
        kl_weight
            Weight of the KL term.

        Returns
        -------
        The loss, a mean over cells, and its parts by cell, `(B,)`, in nats.

        Raises
        ------
        ValueError
            If the draws are not the stratified ones, `(L, B, S, D)`.
        """
        if "log_qz" not in inference_outputs:
            raise ValueError(
                "the loss needs stratified draws: call the module itself, or inference with "
                "stratified=True"
            )
        log_px = self._log_likelihood(tensors, generative_outputs)
        log_pz = self.prior_distribution().log_prob(inference_outputs["untransformed_z"])
        log_ratio = log_pz - inference_outputs["log_qz"]
        return self._losses(
            log_px, log_ratio, kl_weight, tensors, inference_outputs, generative_outputs
        )

    def _log_likelihood(
        self, tensors: dict[str, Tensor], generative_outputs: dict[str, Any]
    ) -> Tensor:
        """log p(x | z) of the loss's draws, `(L, B, S)`."""
        # With one sample of each component, MISELBO is a mean over draws.
        equal_rows = self.mixture.objective == "miselbo" and self.mixture.n_samples == 1
        x = tensors[REGISTRY_KEYS.X_KEY]
        return generative_outputs["px"].log_prob(x, equal_rows=equal_rows)

    def _losses(
        self,
        log_whole: Tensor,
        log_warmed: Tensor,
        kl_weight: Tensor | float,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        library_weight: Tensor | float = 1.0,
    ) -> LossOutput:
        """Negative bound of log-weights in two parts, `(L, B, S)` each.

        Parameters
        ----------
        log_whole
            The part that counts in full from the start of training: reported as reconstruction
            loss.
        log_warmed
            The part that counts by `kl_weight`: reported as KL divergence, with what the bound
            takes from putting the logarithm outside.
        kl_weight, library_weight
            Of the second part, and of the KL divergence of the library size.
        tensors, inference_outputs, generative_outputs
            As in :meth:`loss`.
        """
        bound = _OBJECTIVES[self.mixture.objective]
        reconstruction_loss = -log_whole.mean((0, -1))
        kl_z = -bound(log_whole + log_warmed) - reconstruction_loss
        if self.use_observed_lib_size:
            kl_library = torch.zeros_like(kl_z)
        else:
            kl_library = kl_divergence(inference_outputs["ql"], generative_outputs["pl"]).sum(1)
        loss = (library_weight * kl_library - bound(log_whole + kl_weight * log_warmed)).mean()
        extra_metrics = {}
        if self.extra_payload_autotune:
            extra_metrics = {
                "z": inference_outputs["qz"].mean,
                "batch": tensors[REGISTRY_KEYS.BATCH_KEY],
                "labels": tensors[REGISTRY_KEYS.LABELS_KEY],
            }
        return LossOutput(
            loss=loss,
            reconstruction_loss=reconstruction_loss,
            kl_local={"kl_divergence_l": kl_library, "kl_divergence_z": kl_z},
            extra_metrics=extra_metrics,
        )

    @torch.inference_mode()
    @auto_move_data
    def latent_moments(
        self, tensors: dict[str, Tensor], n_draws: int, *, on_simplex: bool
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of each cell's latents, `(B, D)` each.

        Parameters
        ----------
        tensors
            A minibatch.
        n_draws
            Draws per cell behind them, where there is no closed form.
        on_simplex
            Whether the latents are taken after the map to the simplex, if there is one.

        Returns
        -------
        Mean and variance, `(B, D)` each.
        """
        posterior = self.posterior(tensors)
        on_simplex = on_simplex and self.latent_distribution == "ln"
        if self.flow is None and not on_simplex:
            return posterior.mean, posterior.variance

        def transform(z0: Tensor) -> Tensor:
            z, _ = self.push_forward(z0)
            return self.z_encoder.z_transformation(z) if on_simplex else z

        return latent_moments(posterior, transform, n_draws)

    def as_importance_density(self, qz: FactorizedMixture) -> FactorizedMixture:
        """What scvi-tools' importance weights are to divide by, with this prior and flow.

        Parameters
        ----------
        qz
            Posterior that ``inference`` returned.

        Returns
        -------
        A posterior whose ``log_prob`` is log q(z | x) - log p(z) + log N(z; 0, I).
        """
        posterior = MixturePosterior(
            qz.component_loc.to(self.device), qz.component_scale.to(self.device)
        )
        prior, flow = self.prior_distribution(), self.flow

        class _Density(FactorizedMixture):
            def log_prob(self, value: Tensor) -> Tensor:
                return importance_density(posterior, value, prior, flow).unsqueeze(-1)

        return _Density(qz.component_loc, qz.component_scale)

    def train_covariates_only(self, *, freeze_expression: bool) -> None:
        """Freeze the encoder for scArches, but for the weights of the covariates.

        Parameters
        ----------
        freeze_expression
            Whether the first layer's other weights are frozen as well.
        """
        trunk = cast(StackedMLP, self.z_encoder.encoder.trunk)
        trunk.train_covariates_only(freeze_first_layer=freeze_expression)
