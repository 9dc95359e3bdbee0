"""The mixture core behind scvi-tools' module contract."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.distributions import (
    NegativeBinomial,
    Normal,
    Poisson,
    ZeroInflatedNegativeBinomial,
)
from scvi.module import VAE
from scvi.module.base import LossOutput, auto_move_data
from scvi.utils import unsupported_if_adata_minified
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from mixscvi.encoding import FactorizedMixture, MixtureEncoder, PseudoCells
from mixscvi.likelihoods import nb_log_prob, poisson_log_prob, zinb_log_prob
from mixscvi.mixture import (
    AmortizedEncoder,
    Estimator,
    GaussianMixture,
    ImportanceDraws,
    InverseAutoregressiveFlow,
    MixturePosterior,
    Prior,
    SeparateEncoder,
    StandardNormal,
    VampPrior,
    importance_weighted_miselbo,
    mixture_log_prob,
    siwae,
)

__all__ = ["FORMS", "MixVAE"]

_COMPONENT_ENCODERS = {"separate": SeparateEncoder, "amortized": AmortizedEncoder}
FORMS = {"siwae": siwae, "paper": importance_weighted_miselbo}
_OBJECTIVES = {"siwae": siwae, "miselbo": importance_weighted_miselbo}
_ELEMENTS_PER_DECODE = 2**22
_FLOW_WIDTH = 8  # elements that a flow holds for each of its inputs, roughly


class _Encoded(NamedTuple):
    """What the encoders say about a minibatch."""

    qz: FactorizedMixture
    ql: Distribution | None
    library: Tensor  # log library, (B, 1)


class MixVAE(VAE):
    r"""scVI's generative model with a mixture of `A` Gaussians as its posterior.

    Every parameter of :class:`scvi.module.VAE` means the same here. With ``n_components=1`` and
    the other defaults below, every method is inherited and nothing of ours runs: the module is
    scvi-tools', bit for bit.

    Parameters
    ----------
    n_components
        Number of components, `A`.
    n_sampled_components
        Number of components that a training step draws from, `S`; ``None`` for all.
    estimator
        Which components are drawn from and which form the denominator; see
        :class:`~mixscvi.mixture.Estimator`.
    component_encoder
        ``"separate"``: `A` encoders in one stack. ``"amortized"``: one trunk and a learned code
        per component.
    prior
        ``"normal"``, ``"mog"`` (mixture of Gaussians), ``"vamp"`` (VampPrior), or a
        :class:`~mixscvi.mixture.Prior` of the user's own, over `D` dimensions.
    n_prior_components
        Components of the prior, or pseudo-cells of the VampPrior, `K`.
    n_flow_steps
        Steps of the inverse autoregressive flow that all components share; 0 for none.
    n_samples
        Importance samples per component in the training objective, `L`.
    objective
        ``"miselbo"``: the papers' form. ``"siwae"``: all draws inside of the logarithm.

    Notes
    -----
    Draws are `(L, B, S, D)` in the loss and decoded as `L * B * S` rows in one call.
    """

    def __init__(
        self,
        n_input: int,
        n_batch: int = 0,
        n_labels: int = 0,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        n_continuous_cov: int = 0,
        n_cats_per_cov: list[int] | None = None,
        dropout_rate: float = 0.1,
        dispersion: Literal["gene", "gene-batch", "gene-label", "gene-cell"] = "gene",
        log_variational: bool = True,
        gene_likelihood: Literal["zinb", "nb", "poisson", "normal"] = "zinb",
        latent_distribution: Literal["normal", "ln"] = "normal",
        encode_covariates: bool = False,
        deeply_inject_covariates: bool = True,
        batch_representation: Literal["one-hot", "embedding"] = "one-hot",
        use_batch_norm: Literal["encoder", "decoder", "none", "both"] = "both",
        use_layer_norm: Literal["encoder", "decoder", "none", "both"] = "none",
        use_size_factor_key: bool = False,
        use_observed_lib_size: bool = True,
        extra_payload_autotune: bool = False,
        library_log_means: np.ndarray | None = None,
        library_log_vars: np.ndarray | None = None,
        var_activation: Callable[[Tensor], Tensor] | None = None,
        extra_encoder_kwargs: dict | None = None,
        extra_decoder_kwargs: dict | None = None,
        batch_embedding_kwargs: dict | None = None,
        n_components: int = 4,
        n_sampled_components: int | None = None,
        estimator: Literal["all_to_all", "some_to_all", "some_to_some"] = "all_to_all",
        component_encoder: Literal["separate", "amortized"] = "separate",
        prior: Literal["normal", "mog", "vamp"] | Prior = "normal",
        n_prior_components: int = 50,
        n_flow_steps: int = 0,
        n_samples: int = 1,
        objective: Literal["miselbo", "siwae"] = "miselbo",
    ) -> None:
        super().__init__(
            n_input,
            n_batch=n_batch,
            n_labels=n_labels,
            n_hidden=n_hidden,
            n_latent=n_latent,
            n_layers=n_layers,
            n_continuous_cov=n_continuous_cov,
            n_cats_per_cov=n_cats_per_cov,
            dropout_rate=dropout_rate,
            dispersion=dispersion,
            log_variational=log_variational,
            gene_likelihood=gene_likelihood,
            latent_distribution=latent_distribution,
            encode_covariates=encode_covariates,
            deeply_inject_covariates=deeply_inject_covariates,
            batch_representation=batch_representation,
            use_batch_norm=use_batch_norm,
            use_layer_norm=use_layer_norm,
            use_size_factor_key=use_size_factor_key,
            use_observed_lib_size=use_observed_lib_size,
            extra_payload_autotune=extra_payload_autotune,
            library_log_means=library_log_means,
            library_log_vars=library_log_vars,
            var_activation=var_activation,
            extra_encoder_kwargs=extra_encoder_kwargs,
            extra_decoder_kwargs=extra_decoder_kwargs,
            batch_embedding_kwargs=batch_embedding_kwargs,
        )
        self.n_components = n_components
        self.n_sampled_components = n_sampled_components or n_components
        self.estimator = Estimator(estimator)
        self.n_samples = n_samples
        self.objective = objective
        self.is_scvi = (
            n_components == 1 and prior == "normal" and n_flow_steps == 0 and n_samples == 1
        )
        self.prior, self.flow = StandardNormal(n_latent), None
        if self.is_scvi:
            return

        dense_width = self.z_encoder.encoder.fc_layers[0][0].in_features
        dense_width -= self.z_encoder.encoder.n_cov
        n_cat_list = self.z_encoder.encoder.n_cat_list
        encoder_kwargs = dict(extra_encoder_kwargs or {})
        if "activation_fn" in encoder_kwargs:
            encoder_kwargs["activation"] = encoder_kwargs.pop("activation_fn")
        self.z_encoder = MixtureEncoder(
            _COMPONENT_ENCODERS[component_encoder](
                n_components,
                dense_width,
                n_latent,
                n_hidden=n_hidden,
                n_layers=n_layers,
                n_covariates=sum(n_cat_list),
                inject_covariates=deeply_inject_covariates,
                dropout_rate=dropout_rate,
                use_batch_norm=use_batch_norm in ("encoder", "both"),
                use_layer_norm=use_layer_norm in ("encoder", "both"),
                var_activation=var_activation,
                **encoder_kwargs,
            ),
            n_cat_list,
            latent_distribution,
        )
        if isinstance(prior, Prior):
            self.prior = copy.deepcopy(prior)
        elif prior == "mog":
            self.prior = GaussianMixture(n_latent, n_prior_components)
        elif prior == "vamp":
            self.prior = VampPrior(
                PseudoCells(
                    n_prior_components,
                    n_input,
                    dense_width,
                    [n_cat for n_cat in n_cat_list if n_cat > 1],
                    non_negative=gene_likelihood != "normal",
                )
            )
        if n_flow_steps:
            self.flow = InverseAutoregressiveFlow(n_latent, n_flow_steps)
        event_shape = tuple(self.prior(self.z_encoder).event_shape)
        if event_shape != (n_latent,):
            raise ValueError(
                f"prior must have event shape ({n_latent},), as n_latent={n_latent}, got "
                f"{event_shape}"
            )

    @torch.no_grad()
    def initialise_pseudo_cells(self, tensors: dict[str, Tensor]) -> None:
        """Start the VampPrior's pseudo-cells from a minibatch of real cells.

        Pseudo-cells beyond their number start as averages of two of them.
        """
        dense, categories = self._encoder_input(**self._get_inference_input(tensors))
        seen = [
            category
            for n_cat, category in zip(self.z_encoder.n_cat_list, categories, strict=False)
            if n_cat > 1
        ]
        surplus = len(self.prior.pseudo_inputs.dense) - len(dense)
        if surplus > 0:
            one, other = torch.randint(len(dense), (2, surplus), device=dense.device)
            dense = torch.cat((dense, (dense[one] + dense[other]) / 2))
            seen = [torch.cat((category, category[one])) for category in seen]
        self.prior.pseudo_inputs.initialise(dense, *seen)

    def prior_distribution(self) -> Distribution:
        """Build p(z), with event shape `(D,)`: has ``log_prob`` and ``sample``."""
        return self.prior(self.z_encoder)

    def _encoder_input(
        self,
        x: Tensor,
        batch_index: Tensor,
        cont_covs: Tensor | None = None,
        cat_covs: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Dense columns and categories that the encoders see, put together as in scvi-tools."""
        dense = torch.log1p(x) if self.log_variational else x
        categories: tuple[Tensor, ...] = ()
        if self.encode_covariates:
            if cont_covs is not None:
                dense = torch.cat((dense, cont_covs), dim=-1)
            if cat_covs is not None:
                categories = torch.split(cat_covs, 1, dim=1)
        if self.batch_representation == "embedding":
            if self.encode_covariates:
                batch = self.compute_embedding(REGISTRY_KEYS.BATCH_KEY, batch_index)
                dense = torch.cat((dense, batch), dim=-1)
        else:
            categories = (batch_index, *categories)
        return dense, categories

    def _encode(
        self,
        x: Tensor,
        batch_index: Tensor,
        cont_covs: Tensor | None = None,
        cat_covs: Tensor | None = None,
        components: Tensor | None = None,
    ) -> _Encoded:
        dense, categories = self._encoder_input(x, batch_index, cont_covs, cat_covs)
        if self.is_scvi:
            normal, _ = self.z_encoder(dense, *categories)
            loc, scale = normal.loc[:, None], normal.scale[:, None]
        else:
            posterior = self.z_encoder(dense, *categories, components=components)
            loc, scale = posterior.component_loc, posterior.component_scale
        if self.use_observed_lib_size:
            ql, library = None, x.sum(1, keepdim=True).log()
        else:
            ql, library = self.l_encoder(dense, *categories)
        return _Encoded(FactorizedMixture(loc, scale), ql, library)

    def _choose_components(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Components to encode and, counted among those, components to draw from."""
        chosen = self.estimator.choose(self.n_components, self.n_sampled_components)
        if chosen is None:
            return None, None
        chosen = chosen.to(device)
        if self.estimator is Estimator.SOME_TO_SOME and self.training:
            return chosen, None
        return None, chosen

    def _flow(self, z0: Tensor) -> tuple[Tensor, Tensor | float]:
        return (z0, 0.0) if self.flow is None else self.flow(z0)

    def _stratified_draws(self, qz: FactorizedMixture, components: Tensor | None) -> dict:
        """Draws `(L, B, S, D)` for the loss, with their log-density under the mixture."""
        z0 = qz.rsample_stratified(self.n_samples, components)
        z, log_det = self._flow(z0)
        return {
            "z": self.z_encoder.z_transformation(z),
            "untransformed_z": z,
            "log_qz": mixture_log_prob(qz.cross_log_prob(z0)) - log_det,
        }

    def _plain_draws(self, qz: FactorizedMixture, n_samples: int) -> dict:
        """Draws from the mixture, `(B, D)` or `(n_samples, B, D)`."""
        z0 = qz.rsample() if n_samples == 1 else qz.sample((n_samples,))
        z, _ = self._flow(z0)
        return {"z": self.z_encoder.z_transformation(z), "untransformed_z": z}

    def forward(
        self, tensors, *args, inference_kwargs: dict | None = None, compute_loss=True, **kwargs
    ):
        """Run inference, the generative model and the loss; see ``BaseModuleClass.forward``.

        The loss takes stratified draws, one for each sampled component; every other caller takes
        plain draws from the mixture.
        """
        if compute_loss and not self.is_scvi:
            inference_kwargs = {"stratified": True, **(inference_kwargs or {})}
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
        if self.is_scvi:
            return super()._regular_inference(
                x, batch_index, cont_covs=cont_covs, cat_covs=cat_covs, n_samples=n_samples
            )
        encode, draw = self._choose_components(x.device) if stratified else (None, None)
        qz, ql, library = self._encode(x, batch_index, cont_covs, cat_covs, components=encode)
        if stratified:
            draws = self._stratified_draws(qz, draw)
        else:
            draws = self._plain_draws(qz, n_samples)
            if n_samples > 1:
                library = (
                    library.expand(n_samples, -1, -1) if ql is None else ql.sample((n_samples,))
                )
        return {**draws, "qz": qz, "ql": ql, "library": library}

    @auto_move_data
    def _cached_inference(
        self,
        qzm: Tensor,
        qzv: Tensor,
        observed_lib_size: Tensor,
        n_samples: int = 1,
        stratified: bool = False,
    ) -> dict[str, Tensor | Distribution | None]:
        if self.is_scvi:
            return super()._cached_inference(qzm, qzv, observed_lib_size, n_samples=n_samples)
        qz = FactorizedMixture(
            qzm.unflatten(-1, (-1, self.n_latent)), qzv.unflatten(-1, (-1, self.n_latent)).sqrt()
        )
        library = observed_lib_size.log()
        if stratified:
            draws = self._stratified_draws(qz, None)
        else:
            draws = self._plain_draws(qz, n_samples)
            if n_samples > 1:
                library = library.expand(n_samples, -1, -1)
        return {**draws, "qz": qz, "ql": None, "library": library}

    @auto_move_data
    def generative(
        self,
        z: Tensor,
        library: Tensor,
        batch_index: Tensor,
        cont_covs: Tensor | None = None,
        cat_covs: Tensor | None = None,
        size_factor: Tensor | None = None,
        y: Tensor | None = None,
        transform_batch: Tensor | None = None,
    ) -> dict[str, Distribution | None]:
        """Decode draws of any leading shape in one call; see ``VAE.generative``."""
        # scvi-tools' own path for several draws cannot take an embedded batch.
        scvi_takes = self.is_scvi and z.dim() == 3 and self.batch_representation == "one-hot"
        if z.dim() == 2 or scvi_takes:
            return super().generative(
                z, library, batch_index, cont_covs, cat_covs, size_factor, y, transform_batch
            )
        lead = z.shape[:-1]

        def rows(per_cell: Tensor | None) -> Tensor | None:
            if per_cell is None:
                return None
            if per_cell.dim() == 2 and z.dim() == 4:
                per_cell = per_cell.unsqueeze(1)
            return per_cell.expand(*lead, per_cell.shape[-1]).flatten(0, -2)

        outputs = super().generative(
            z.flatten(0, -2),
            rows(library),
            rows(batch_index),
            rows(cont_covs),
            rows(cat_covs),
            rows(size_factor),
            rows(y),
            transform_batch,
        )
        if not self.use_observed_lib_size:
            means, variances = self._compute_local_library_params(batch_index)
            outputs["pl"] = Normal(means, variances.sqrt())
        outputs["px"] = _unflatten_likelihood(outputs["px"], lead)
        return outputs

    def _dispersion(self, px: Distribution, tensors: dict[str, Tensor]) -> Tensor:
        """Inverse dispersion, `(G,)` or `(B, 1, G)` where all draws of a cell share it."""
        if self.dispersion == "gene":
            return self.px_r.exp()
        if self.dispersion == "gene-batch":
            batch = tensors[REGISTRY_KEYS.BATCH_KEY].squeeze(-1).long()
            return self.px_r.exp().t().index_select(0, batch).unsqueeze(1)
        if self.dispersion == "gene-label":
            label = tensors[REGISTRY_KEYS.LABELS_KEY].squeeze(-1).long()
            return self.px_r.exp().t().index_select(0, label).unsqueeze(1)
        return px.theta

    def _log_likelihood(self, px: Distribution, tensors: dict[str, Tensor]) -> Tensor:
        """log p(x | z) of each draw, `(L, B, S)`."""
        x = tensors[REGISTRY_KEYS.X_KEY]
        if self.gene_likelihood == "zinb":
            return zinb_log_prob(x, px.mu, self._dispersion(px, tensors), px.zi_logits)
        if self.gene_likelihood == "nb":
            return nb_log_prob(x, px.mu, self._dispersion(px, tensors))
        if self.gene_likelihood == "poisson":
            return poisson_log_prob(x, px.rate)
        return px.log_prob(x.unsqueeze(1)).sum(-1)

    @unsupported_if_adata_minified
    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Tensor | Distribution | None],
        generative_outputs: dict[str, Distribution | None],
        kl_weight: Tensor | float = 1.0,
    ) -> LossOutput:
        r"""Negative bound of the minibatch.

        With ``n_samples=1`` and the MISELBO objective this is the reconstruction error plus
        `kl_weight` times :math:`\frac{1}{S} \sum_s \log q(z_s) - \log p(z_s)`. In the other
        objectives the two do not separate, and ``kl_local`` reports the bound less the
        reconstruction error, so that their sum is always the negative bound.
        """
        if self.is_scvi:
            return super().loss(tensors, inference_outputs, generative_outputs, kl_weight=kl_weight)
        if "log_qz" not in inference_outputs:
            raise ValueError(
                "the loss needs stratified draws: call the module itself, or inference with "
                "stratified=True"
            )
        bound = _OBJECTIVES[self.objective]
        log_px = self._log_likelihood(generative_outputs["px"], tensors)
        log_pz = self.prior_distribution().log_prob(inference_outputs["untransformed_z"])
        log_ratio = log_pz - inference_outputs["log_qz"]
        reconstruction_loss = -log_px.mean((0, -1))
        kl_z = -bound(log_px + log_ratio) - reconstruction_loss
        if self.use_observed_lib_size:
            kl_library = torch.zeros_like(kl_z)
        else:
            kl_library = kl_divergence(inference_outputs["ql"], generative_outputs["pl"]).sum(1)
        loss = (kl_library - bound(log_px + kl_weight * log_ratio)).mean()
        extra_metrics = (
            {
                "z": inference_outputs["qz"].loc,
                "batch": tensors[REGISTRY_KEYS.BATCH_KEY],
                "labels": tensors[REGISTRY_KEYS.LABELS_KEY],
            }
            if self.extra_payload_autotune
            else {}
        )
        return LossOutput(
            loss=loss,
            reconstruction_loss=reconstruction_loss,
            kl_local={"kl_divergence_l": kl_library, "kl_divergence_z": kl_z},
            extra_metrics=extra_metrics,
        )

    @torch.inference_mode()
    @auto_move_data
    def posterior(self, tensors: dict[str, Tensor]) -> FactorizedMixture:
        """The mixture posterior of a minibatch, before any flow."""
        inputs = self._get_inference_input(tensors)
        if "qzm" in inputs:
            outputs = self._cached_inference(**inputs)["qz"]
            if isinstance(outputs, FactorizedMixture):
                return outputs
            return FactorizedMixture(outputs.loc[:, None], outputs.scale[:, None])
        return self._encode(**inputs).qz

    @torch.inference_mode()
    def latent_moments(
        self, qz: FactorizedMixture, n_draws: int, *, transformed: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of z, `(B, D)` each, where they have no closed form.

        Averages over draws behind the flow (and on the simplex, if `transformed`), stratified
        over the components, from a generator of its own with a fixed seed. All cells share the
        noise, so a cell's moments do not depend on its minibatch.
        """
        loc, scale = qz.component_loc.unsqueeze(0), qz.component_scale.unsqueeze(0)
        generator = torch.Generator(device=loc.device).manual_seed(0)

        def push(z0: Tensor) -> Tensor:
            z, _ = self._flow(z0)
            return self.z_encoder.z_transformation(z) if transformed else z

        n_samples = math.ceil(n_draws / qz.n_components)
        per_pass = max(1, _ELEMENTS_PER_DECODE // (_FLOW_WIDTH * 128 * loc[0, 0].numel()))
        centre = push(qz.loc)  # variances are taken about it, for their digits' sake
        total = torch.zeros_like(qz.loc)
        total_square = torch.zeros_like(total)
        for start in range(0, n_samples, per_pass):
            shape = (min(per_pass, n_samples - start), 1, *loc.shape[2:])
            noise = torch.randn(shape, dtype=loc.dtype, device=loc.device, generator=generator)
            deviation = push(loc + scale * noise) - centre.unsqueeze(1)
            total += deviation.sum((0, 2))
            total_square += deviation.square().sum((0, 2))
        shift = total / (n_samples * qz.n_components)
        variance = total_square / (n_samples * qz.n_components) - shift.square()
        return centre + shift, variance

    @torch.inference_mode()
    def posterior_minus_prior(self, qz: FactorizedMixture, z: Tensor) -> Tensor:
        """log q(z | x) - log p(z) + log N(z; 0, I) for any points, on the CPU.

        Parameters
        ----------
        qz
            Posteriors of `B` cells.
        z
            Points in latent space, `(..., 1, D)`: each is scored under every cell.

        Returns
        -------
        `(..., B)`.
        """
        joint = MixturePosterior(
            qz.component_loc.to(self.device), qz.component_scale.to(self.device)
        )
        prior = self.prior_distribution()
        standard_normal = StandardNormal(self.n_latent).to(self.device)(None)
        rows = z.reshape(-1, 1, z.shape[-1])
        per_pass = max(1, _ELEMENTS_PER_DECODE // joint.component_loc.numel())
        scores = []
        for chunk in rows.split(per_pass):
            points = chunk.to(self.device)
            base, log_det = (points, 0.0) if self.flow is None else self.flow.inverse(points)
            log_q = joint.log_prob(base) - log_det
            scores.append((log_q - prior.log_prob(points) + standard_normal.log_prob(points)).cpu())
        return torch.cat(scores).reshape(*z.shape[:-2], -1)

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
        qz, ql, library = self._encode(**self._get_inference_input(tensors, full_forward_pass=True))
        prior = self.prior_distribution()
        x = tensors[REGISTRY_KEYS.X_KEY]
        if draws_per_pass is None:
            draws_per_pass = max(1, _ELEMENTS_PER_DECODE // x.numel())
        n_draws = n_samples * self.n_components
        passes = []
        for start in range(0, n_draws, draws_per_pass):
            stop = min(start + draws_per_pass, n_draws)
            component = torch.arange(start, stop, device=x.device) % self.n_components
            z0 = qz.rsample_stratified(1, component)
            cross = qz.cross_log_prob(z0)
            own = cross.gather(-1, component.expand(*cross.shape[:2], -1)[..., None]).squeeze(-1)
            z, log_det = self._flow(z0)
            log_joint = prior.log_prob(z)
            if ql is not None:
                library, log_ratio = self._library_draws(ql, stop - start, tensors)
                log_joint = log_joint + log_ratio
            generative_input = self._get_generative_input(
                tensors, {"z": self.z_encoder.z_transformation(z), "library": library}
            )
            px = self.generative(**generative_input)["px"]
            log_joint = log_joint + self._log_likelihood(px, tensors)
            passes.append(
                torch.stack((log_joint, own - log_det, mixture_log_prob(cross) - log_det))
            )
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
        form: Literal["siwae", "paper"] = "siwae",
    ) -> Tensor | float:
        """Estimate log p(x) of a minibatch; see :meth:`mixscvi.MixSCVI.get_marginal_ll`."""
        n_samples = math.ceil(n_mc_samples / self.n_components)
        draws = self.importance_draws(tensors, n_samples, n_mc_samples_per_pass)
        log_px = FORMS[form](draws.log_weights)
        return log_px.mean().item() if return_mean else log_px


def _unflatten_likelihood(px: Distribution, lead: torch.Size) -> Distribution:
    """Reshape a likelihood of rows to the leading shape of the draws; broadcasts stay views."""

    def shaped(parameter: Tensor) -> Tensor:
        return parameter.view(*lead, -1)

    if isinstance(px, ZeroInflatedNegativeBinomial):
        return ZeroInflatedNegativeBinomial(
            mu=shaped(px.mu),
            theta=shaped(px.theta),
            zi_logits=shaped(px.zi_logits),
            scale=shaped(px.scale),
        )
    if isinstance(px, NegativeBinomial):
        return NegativeBinomial(mu=shaped(px.mu), theta=shaped(px.theta), scale=shaped(px.scale))
    if isinstance(px, Poisson):
        return Poisson(rate=shaped(px.rate), scale=shaped(px.scale))
    return Normal(shaped(px.loc), shaped(px.scale), normal_mu=shaped(px.normal_mu))
