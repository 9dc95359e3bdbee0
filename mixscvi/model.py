"""MixSCVI: AnnData in, latents, likelihoods and diagnostics out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.dataloaders import DataSplitter
from scvi.model import SCVI
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    StudentT,
    TransformedDistribution,
)

from mixscvi.checks import (
    check_choice,
    check_counts,
    check_finite,
    check_genes,
    check_positive,
    check_positive_int,
)
from mixscvi.encoding import FactorizedMixture
from mixscvi.evaluation import EvaluationMixin
from mixscvi.mixture import Estimator, Prior
from mixscvi.module import MixVAE
from mixscvi.persistence import PersistenceMixin

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["LatentMixture", "MixSCVI"]

_MINIFY_UNS_KEY = "_scvi_adata_minify_type"


class LatentMixture(NamedTuple):
    """Parameters of each cell's mixture posterior."""

    loc: np.ndarray
    """Component means, `(n, A, D)`."""
    scale: np.ndarray
    """Component standard deviations, `(n, A, D)`."""


class _DataSplitter(DataSplitter):
    """scvi-tools' splitter, which leaves a last training minibatch of one cell out.

    Batch normalisation has no variance to divide by in such a minibatch, and training would stop.
    Shuffling makes it another cell in every epoch.
    """

    def train_dataloader(self):
        batch_size = self.data_loader_kwargs.get("batch_size")
        if self.n_train > 1 and self.n_train % batch_size == 1:
            self.drop_last = True
        return super().train_dataloader()


def _once_trained(method: Callable) -> Callable:
    """Make a method of scvi-tools refuse an untrained model, whose numbers mean nothing."""

    @functools.wraps(method)
    def checked(self, *args, **kwargs):
        self._check_if_trained(warn=False)
        return method(self, *args, **kwargs)

    return checked


class MixSCVI(EvaluationMixin, PersistenceMixin, SCVI):
    r"""scVI with a mixture of Gaussians as posterior, trained with MISELBO.

    The generative model is that of :class:`scvi.model.SCVI`. The posterior is

    .. math:: q(z \mid x) = \frac{1}{A} \sum_{a=1}^{A}
        \mathcal{N}(z; \mu_a(x), \mathrm{diag}\, \sigma_a(x)^2),

    and training maximises :math:`\frac{1}{A} \sum_a \mathbb{E}_{q_a}[\log p(x, z) - \log q(z \mid
    x)]`, which rewards components for covering what the others do not (Kviman et al., arXiv
    2209.15514; Hotti et al., arXiv 2406.07083). With ``n_components=1`` it is
    :class:`scvi.model.SCVI`, bit for bit.

    Parameters
    ----------
    adata
        Data registered with :meth:`MixSCVI.setup_anndata`.
    registry
        Registry of a data module, in the place of `adata`.
    n_hidden, n_latent, n_layers, dropout_rate, dispersion, gene_likelihood, \
    use_observed_lib_size, latent_distribution
        As in :class:`scvi.model.SCVI`.
    n_components
        Number of components, `A`. 4 is a good start; more tighten the bound at more cost.
    n_sampled_components
        Components that a training step draws from, `S`; ``None`` for all. Fewer make a step
        cheaper: choose it for many components. :meth:`get_elbo` then draws from `S` as well, with
        all components in the denominator: with the MISELBO objective an unbiased estimate of the
        bound.
    estimator
        ``"all_to_all"`` is exact and right for a few components. ``"some_to_all"`` draws from `S`
        of them and stays unbiased: the choice for many. ``"some_to_some"`` forgets the others for
        the step: cheapest, a looser bound, for hundreds of separate encoders.
    component_encoder
        ``"separate"``: `A` encoders, the most flexible; for a few components. ``"amortized"``:
        one encoder with a learned code per component; for many, or for little data. No difference
        with one component.
    prior
        ``"normal"`` is scVI's. ``"mog"``, a mixture of Gaussians, suits clustered data.
        ``"vamp"``, the posteriors of learned pseudo-cells, suits large data whose latent density
        is far from one Gaussian. A :class:`mixscvi.mixture.Prior` over `D` dimensions is copied,
        and trained.
    n_prior_components
        Components of the mixture of Gaussians, or pseudo-cells, `K`.
    n_flow_steps
        Steps of the inverse autoregressive flow on z; 0 for none. Choose 2 when components stay
        correlated; the latent mean is then a Monte-Carlo average.
    n_samples
        Importance samples per component in training, `L`. More tighten the bound and flatten the
        gradient of the encoder; 1 is a good start.
    objective
        ``"miselbo"``: the papers' form. ``"siwae"``: all draws inside of the logarithm, tighter,
        with less pressure on each component to be good alone.
    **kwargs
        Passed to :class:`mixscvi.module.MixVAE`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as above, or the counts are negative, NaN, infinite, or all zero in
        a cell.

    Notes
    -----
    The VampPrior's pseudo-cells start as cells drawn from `adata`, and beyond their number as
    averages of two; with a registry alone, at random.

    Examples
    --------
    >>> import mixscvi
    >>> adata = mixscvi.datasets.pbmc68k()
    >>> mixscvi.MixSCVI.setup_anndata(adata)
    >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_latent_representation().shape
    (700, 10)
    """

    _module_cls = MixVAE

    get_elbo = _once_trained(SCVI.get_elbo)
    get_reconstruction_error = _once_trained(SCVI.get_reconstruction_error)
    get_normalized_expression = _once_trained(SCVI.get_normalized_expression)
    posterior_predictive_sample = _once_trained(SCVI.posterior_predictive_sample)
    get_likelihood_parameters = _once_trained(SCVI.get_likelihood_parameters)

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: Literal["gene", "gene-batch", "gene-label", "gene-cell"] = "gene",
        gene_likelihood: Literal["zinb", "nb", "poisson", "normal"] = "zinb",
        use_observed_lib_size: bool = True,
        latent_distribution: Literal["normal", "ln"] = "normal",
        *,
        n_components: int = 4,
        n_sampled_components: int | None = None,
        estimator: Literal["all_to_all", "some_to_all", "some_to_some"] = "all_to_all",
        component_encoder: Literal["separate", "amortized"] = "separate",
        prior: Literal["normal", "mog", "vamp"] | Prior = "normal",
        n_prior_components: int = 50,
        n_flow_steps: int = 0,
        n_samples: int = 1,
        objective: Literal["miselbo", "siwae"] = "miselbo",
        **kwargs,
    ) -> None:
        n_components = check_positive_int("n_components", n_components)
        n_samples = check_positive_int("n_samples", n_samples)
        n_flow_steps = check_positive_int("n_flow_steps", n_flow_steps, least=0)
        n_prior_components = check_positive_int("n_prior_components", n_prior_components)
        check_choice("estimator", estimator, [str(name) for name in Estimator])
        check_choice("component_encoder", component_encoder, ("separate", "amortized"))
        if not isinstance(prior, Prior) and prior not in ("normal", "mog", "vamp"):
            raise ValueError(
                "prior must be one of 'normal', 'mog', 'vamp', or an instance of "
                f"mixscvi.mixture.Prior, got {prior!r}"
            )
        if adata is None and registry is not None and not use_observed_lib_size:
            raise ValueError(
                "use_observed_lib_size=False takes its library priors from adata, got a registry "
                "alone"
            )
        check_choice("objective", objective, ("miselbo", "siwae"))
        if n_sampled_components is not None:
            n_sampled_components = check_positive_int("n_sampled_components", n_sampled_components)
            if n_sampled_components > n_components:
                raise ValueError(
                    f"n_sampled_components must be at most n_components={n_components}, got "
                    f"{n_sampled_components}"
                )
            if estimator == Estimator.ALL_TO_ALL and n_sampled_components != n_components:
                raise ValueError(
                    f"estimator='all_to_all' draws from all n_components={n_components}, got "
                    f"n_sampled_components={n_sampled_components}: choose 'some_to_all' or "
                    "'some_to_some'"
                )
        super().__init__(
            adata,
            registry,
            n_hidden=n_hidden,
            n_latent=n_latent,
            n_layers=n_layers,
            dropout_rate=dropout_rate,
            dispersion=dispersion,
            gene_likelihood=gene_likelihood,
            use_observed_lib_size=use_observed_lib_size,
            latent_distribution=latent_distribution,
            n_components=n_components,
            n_sampled_components=n_sampled_components,
            estimator=str(estimator),
            component_encoder=component_encoder,
            prior=prior,
            n_prior_components=n_prior_components,
            n_flow_steps=n_flow_steps,
            n_samples=n_samples,
            objective=objective,
            **kwargs,
        )
        prior_name = prior if isinstance(prior, str) else type(prior).__name__
        self._model_summary_string = self._model_summary_string.replace(
            "SCVI model", "MixSCVI model", 1
        ).removesuffix(".") + (
            f", n_components: {n_components}, estimator: {estimator}, component_encoder: "
            f"{component_encoder}, prior: {prior_name}, n_flow_steps: {n_flow_steps}."
        )
        self.var_names_ = [str(gene) for gene in self.get_var_names()]
        if adata is not None and self.minified_data_type is None:
            self._check_data(adata)
            if prior == "vamp":
                self._initialise_pseudo_cells(adata, n_prior_components)
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        **kwargs,
    ) -> None:
        """Say where the counts, batches and covariates stand in an AnnData.

        Parameters
        ----------
        adata
            Cells with raw counts, `(n, G)`.
        layer
            Layer with the counts; ``X`` if ``None``.
        batch_key
            Column of ``obs`` with the batches to integrate over.
        labels_key
            Column of ``obs`` with labels, for ``dispersion="gene-label"``.
        size_factor_key
            Column of ``obs`` with size factors, positive, in the place of library sizes.
        categorical_covariate_keys, continuous_covariate_keys
            Columns of ``obs`` with further covariates.

        Raises
        ------
        ValueError
            If a saved model is being loaded onto other genes than it was trained on.

        Examples
        --------
        >>> import mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        """
        source = kwargs.get("source_registry")
        if source is not None:
            trained_on = source["field_registries"][REGISTRY_KEYS.X_KEY]["state_registry"]
            check_genes(adata.var_names, trained_on["column_names"])
        super().setup_anndata(
            adata,
            layer=layer,
            batch_key=batch_key,
            labels_key=labels_key,
            size_factor_key=size_factor_key,
            categorical_covariate_keys=categorical_covariate_keys,
            continuous_covariate_keys=continuous_covariate_keys,
            **kwargs,
        )

    @property
    def _data_splitter_cls(self) -> type[DataSplitter]:
        normalised = self.module is not None and any(
            isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
            for part in self.module.modules()
        )
        return _DataSplitter if normalised else DataSplitter

    def _initialise_pseudo_cells(self, adata: AnnData, n_pseudo: int) -> None:
        chosen = torch.randperm(adata.n_obs)[:n_pseudo].numpy()
        loader = self._make_data_loader(adata=adata, indices=chosen, batch_size=n_pseudo)
        self.module.initialise_pseudo_cells(next(iter(loader)))

    def _check_data(self, adata: AnnData) -> None:
        """Refuse counts and size factors that this model cannot use."""
        manager = self.get_anndata_manager(adata, required=True)
        module = self.module
        layer = manager.data_registry[REGISTRY_KEYS.X_KEY].attr_key
        scaled_by_factor = bool(module.use_size_factor_key)
        above = None
        if module.gene_likelihood == "normal":
            above = -1.0 if module.log_variational else -np.inf
        check_counts(
            manager.get_from_registry(REGISTRY_KEYS.X_KEY),
            adata.obs_names,
            source="adata.X" if layer is None else f"adata.layers[{layer!r}]",
            above=above,
            allow_empty=scaled_by_factor or not module.use_observed_lib_size,
        )
        if REGISTRY_KEYS.CONT_COVS_KEY in manager.data_registry:
            check_finite(manager.get_from_registry(REGISTRY_KEYS.CONT_COVS_KEY), source="adata.obs")
        if scaled_by_factor:
            field = manager.data_registry[REGISTRY_KEYS.SIZE_FACTOR_KEY]
            check_positive(
                manager.get_from_registry(REGISTRY_KEYS.SIZE_FACTOR_KEY),
                adata.obs_names,
                source=f"adata.obs[{field.attr_key!r}]",
            )

    def _validate_anndata(self, adata: AnnData | None = None, copy_if_view: bool = True):
        if adata is not None:
            check_genes(adata.var_names, self.var_names_)
        adata = super()._validate_anndata(adata, copy_if_view=copy_if_view)
        if adata is not self.adata and _MINIFY_UNS_KEY not in adata.uns:
            self._check_data(adata)
        return adata

    def _minibatches(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        batch_size: int | None,
        dataloader: Iterator[dict[str, Tensor]] | None,
        data_loader_kwargs: dict | None,
    ) -> Iterator[dict[str, Tensor]]:
        """Minibatches of cells in order, from `adata` or the user's own loader."""
        self._check_if_trained(warn=False)
        if dataloader is not None:
            if adata is not None:
                raise ValueError("dataloader stands in the place of adata: give one or the other")
            return iter(dataloader)
        if adata is None and self.adata is None:
            raise ValueError("the model holds no data: give adata or dataloader")
        adata = self._validate_anndata(adata)
        return iter(
            self._make_data_loader(
                adata=adata, indices=indices, batch_size=batch_size, **(data_loader_kwargs or {})
            )
        )

    @torch.inference_mode()
    def get_latent_mixture(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dataloader: Iterator[dict[str, Tensor]] | None = None,
        **data_loader_kwargs,
    ) -> LatentMixture:
        """Means and standard deviations of every component of every cell's posterior.

        With a flow they are those of the base mixture, before the flow.

        Parameters
        ----------
        adata
            Data like those trained on; by default those.
        indices
            Cells to use; all by default.
        batch_size
            Cells per minibatch.
        dataloader
            Minibatches of the user's own, in the place of `adata`; `indices` and `batch_size` are
            then ignored, as in scvi-tools.
        **data_loader_kwargs
            Passed to the data loader.

        Returns
        -------
        Named arrays ``loc`` and ``scale``, each `(n, A, D)`.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If the genes are not those trained on, or the counts are bad.

        Examples
        --------
        >>> import mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> model.get_latent_mixture().scale.shape
        (700, 2, 10)
        """
        posteriors = [
            self.module.posterior(tensors)
            for tensors in self._minibatches(
                adata, indices, batch_size, dataloader, data_loader_kwargs
            )
        ]
        return LatentMixture(
            torch.cat([q.component_loc.cpu() for q in posteriors]).numpy(),
            torch.cat([q.component_scale.cpu() for q in posteriors]).numpy(),
        )

    @torch.inference_mode()
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        give_mean: bool = True,
        mc_samples: int = 5_000,
        batch_size: int | None = None,
        return_dist: bool = False,
        dataloader: Iterator[dict[str, Tensor]] | None = None,
        representation: Literal["mean", "components", "parameters"] = "mean",
        **data_loader_kwargs,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Latent representation of the cells.

        Parameters
        ----------
        adata, indices, batch_size, dataloader, **data_loader_kwargs
            As in :meth:`get_latent_mixture`.
        give_mean
            Whether to return the mean of the mixture, or a draw from it.
        mc_samples
            Draws behind the mean, where it has no closed form: with a flow or the logistic normal
            latent. They are stratified over the components and come from a seeded generator, so
            the result repeats.
        return_dist
            Whether to return mean and variance of the mixture, the pair of `(n, D)`.
        representation
            ``"mean"``: `(n, D)`, for neighbours and UMAP. ``"components"``: all component means,
            `(n, A * D)`. ``"parameters"``: all component means, then all component variances,
            `(n, 2 * A * D)`, the features that the mixture papers classify. The latter two are
            those of the base mixture if there is a flow.

        Returns
        -------
        Array of the shape above.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If `representation` is unknown or is at odds with `give_mean` and `return_dist`, the
            genes are not those trained on, or the counts are bad.

        Examples
        --------
        >>> import mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> model.get_latent_representation(representation="parameters").shape
        (700, 40)
        """
        check_choice("representation", representation, ("mean", "components", "parameters"))
        if representation != "mean":
            if return_dist or not give_mean:
                raise ValueError(
                    f"representation={representation!r} is neither a draw nor a distribution: "
                    f"got give_mean={give_mean}, return_dist={return_dist}"
                )
            loc, scale = self.get_latent_mixture(
                adata, indices, batch_size, dataloader, **data_loader_kwargs
            )
            loc = loc.reshape(len(loc), -1)
            if representation == "components":
                return loc
            return np.concatenate([loc, np.square(scale).reshape(len(loc), -1)], axis=1)

        module = self.module
        without_closed_form = not module.is_scvi and (
            module.flow is not None or (module.latent_distribution == "ln" and not return_dist)
        )
        if not without_closed_form or not (give_mean or return_dist):
            return super().get_latent_representation(
                adata,
                indices=indices,
                give_mean=give_mean,
                mc_samples=mc_samples,
                batch_size=batch_size,
                return_dist=return_dist,
                dataloader=dataloader,
                **data_loader_kwargs,
            )
        moments = [
            module.latent_moments(
                module.posterior(tensors), mc_samples, transformed=not return_dist
            )
            for tensors in self._minibatches(
                adata, indices, batch_size, dataloader, data_loader_kwargs
            )
        ]
        means = torch.cat([mean.cpu() for mean, _ in moments]).numpy()
        if not return_dist:
            return means
        return means, torch.cat([variance.cpu() for _, variance in moments]).numpy()

    def get_importance_weights(
        self, adata, indices, qz: Distribution, px: Distribution, zs: Tensor, *args, **kwargs
    ) -> np.ndarray:
        """As in scvi-tools, with this model's prior, flow and mixture posterior.

        scvi-tools scores draws under a standard normal prior and divides by the posterior density
        it asks of `qz`; what our prior adds to the former is taken out of the latter.
        """
        if self.module.is_scvi:
            return super().get_importance_weights(adata, indices, qz, px, zs, *args, **kwargs)
        module = self.module

        class _Scored(FactorizedMixture):
            def log_prob(self, value: Tensor) -> Tensor:
                return module.posterior_minus_prior(self, value).unsqueeze(-1)

        qz = _Scored(qz.component_loc, qz.component_scale)
        return super().get_importance_weights(adata, indices, qz, px, zs, *args, **kwargs)

    @torch.inference_mode()
    def get_aggregated_posterior(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dof: float | None = 3.0,
    ) -> Distribution:
        """Mixture of the posteriors of all cells: `n * A` components, under the flow if any.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_mixture`.
        dof
            Degrees of freedom of Student's t components; ``None`` for Gaussians.

        Returns
        -------
        Distribution with event shape `(D,)`.
        """
        if indices is not None and len(indices) == 0:
            indices = None
        loc, scale = (
            torch.from_numpy(part).flatten(0, 1).to(self.device)
            for part in self.get_latent_mixture(adata, indices, batch_size)
        )
        components = Normal(loc, scale) if dof is None else StudentT(dof, loc, scale)
        aggregated = MixtureSameFamily(
            Categorical(logits=torch.zeros(len(loc), device=self.device)),
            Independent(components, 1),
        )
        if self.module.flow is None:
            return aggregated
        return TransformedDistribution(aggregated, [self.module.flow.transform])
