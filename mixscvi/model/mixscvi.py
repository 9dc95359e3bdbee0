"""MixSCVI: AnnData in, latents, likelihoods and diagnostics out."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from scvi import REGISTRY_KEYS
from scvi.dataloaders import DataSplitter
from scvi.model import SCANVI, SCVI
from scvi.train import TrainingPlan
from torch import Tensor

from mixscvi.checks import check_genes, check_indices
from mixscvi.mixture import Prior
from mixscvi.model.adapted import AdaptedMixin
from mixscvi.model.checkpoints import CheckpointsMixin
from mixscvi.model.components import ComponentsMixin
from mixscvi.model.conversion import ConversionMixin
from mixscvi.model.data import MINIFY_UNS_KEY, LeanDataSplitter, WithoutSingleCells, check_data
from mixscvi.model.evaluation import EvaluationMixin
from mixscvi.model.expression import ExpressionMixin
from mixscvi.model.inputs import check_known_categories, check_network, check_setup
from mixscvi.model.latents import LatentsMixin
from mixscvi.model.loaders import LeanDataLoader
from mixscvi.model.persistence import PersistenceMixin
from mixscvi.model.queries import QueriesMixin, counts_are_gone
from mixscvi.model.runner import Runner, WithoutData
from mixscvi.model.training import LeanTrainingPlan
from mixscvi.module import FusedVAE, MixtureOptions, MixVAE, ScviVAE

if TYPE_CHECKING:
    from anndata import AnnData
    from scvi.data import AnnDataManager

__all__ = ["MixSCVI"]


def _once_trained(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of scvi-tools warn if the model is not trained: its numbers mean nothing."""

    @functools.wraps(method)
    def checked(self: MixSCVI, *args: Any, **kwargs: Any) -> Any:
        self._check_if_trained(warn=True)
        return method(self, *args, **kwargs)

    return checked


@contextmanager
def _naming_what_takes_memory(mixture: MixtureOptions, n_hidden: int) -> Iterator[None]:
    """Say what to choose where a model is too large to be made."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        raise MemoryError(
            f"a model of n_components={mixture.n_components} with component_encoder="
            f"{mixture.component_encoder!r} and n_hidden={n_hidden} does not fit into memory: "
            "choose fewer components, or component_encoder='amortized', which shares one encoder"
        ) from error


class MixSCVI(
    LatentsMixin,
    EvaluationMixin,
    ExpressionMixin,
    AdaptedMixin,
    ComponentsMixin,
    ConversionMixin,
    QueriesMixin,
    PersistenceMixin,
    CheckpointsMixin,
    SCVI,
    WithoutData,
):
    r"""scVI with a mixture of Gaussians as posterior, trained with MISELBO.

    The generative model is that of :class:`scvi.model.SCVI`. The posterior is

    .. math:: q(z \mid x) = \frac{1}{A} \sum_{a=1}^{A}
        \mathcal{N}(z; \mu_a(x), \mathrm{diag}\, \sigma_a(x)^2),

    and training maximizes :math:`\frac{1}{A} \sum_a \mathbb{E}_{q_a}[\log p(x, z) - \log q(z \mid
    x)]`, which rewards components for covering what the others do not (Kviman et al., arXiv
    2209.15514; Hotti et al., arXiv 2406.07083). With ``n_components=1`` it is
    :class:`scvi.model.SCVI`.

    Parameters
    ----------
    adata
        Data registered with :meth:`MixSCVI.setup_anndata`.
    registry
        Registry of a data module, instead of `adata`. Without either, the model is made when it is
        trained: ``train(datamodule=...)``.
    n_hidden, n_latent, n_layers, dropout_rate, dispersion, gene_likelihood
        As in :class:`scvi.model.SCVI`.
    use_observed_lib_size, latent_distribution
        As in :class:`scvi.model.SCVI`.
    n_components
        Number of components, `A`. 4 is a good start; more tighten the bound at more cost.
    n_sampled_components
        Components that a training step draws from, `S`. By default all `A` with
        ``"all_to_all"``, and 1 with the other estimators. Fewer make a step cheaper: choose it for
        many components. ``get_elbo`` then draws from `S` as well, with all components in the
        denominator: with the MISELBO objective an unbiased estimate of the bound.
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
        ``"miselbo"``: the average over components, importance-weighted where `n_samples` > 1
        (IW-MISELBO). ``"siwae"``: all draws inside the logarithm, for one component alone (IWAE):
        with several, each cell would be left to one of them and the others would die.
    likelihood
        ``"fused"``: log-likelihoods with their gradients in one go, several times as fast;
        parameters after a step agree with scvi-tools' to rounding. ``"reference"``: scvi-tools'
        own distributions; with ``n_components=1`` the model is :class:`scvi.model.SCVI` to the bit.
    **kwargs
        Passed to :class:`scvi.module.VAE`.

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

    @property
    def _module_cls(self) -> Callable[..., MixVAE | ScviVAE]:
        """The module's class: scvi-tools' own where the options describe scVI."""
        if self._mixture.is_scvi:
            return FusedVAE if self._mixture.likelihood == "fused" else ScviVAE
        return functools.partial(MixVAE, mixture=self._mixture)

    get_elbo = _once_trained(SCVI.get_elbo)
    get_reconstruction_error = _once_trained(SCVI.get_reconstruction_error)
    posterior_predictive_sample = _once_trained(SCVI.posterior_predictive_sample)
    get_likelihood_parameters = _once_trained(SCVI.get_likelihood_parameters)

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict[str, Any] | None = None,
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
        likelihood: Literal["fused", "reference"] = "fused",
        **kwargs: Any,
    ) -> None:
        self._mixture = MixtureOptions(
            n_components=n_components,
            n_sampled_components=n_sampled_components,
            estimator=estimator,
            component_encoder=component_encoder,
            prior=prior,
            n_prior_components=n_prior_components,
            n_flow_steps=n_flow_steps,
            n_samples=n_samples,
            objective=objective,
            likelihood=likelihood,
        )
        check_network(
            n_hidden=n_hidden,
            n_latent=n_latent,
            n_layers=n_layers,
            dropout_rate=dropout_rate,
            dispersion=dispersion,
            gene_likelihood=gene_likelihood,
            latent_distribution=latent_distribution,
        )
        if adata is None and registry is not None and not use_observed_lib_size:
            raise ValueError(
                "use_observed_lib_size=False takes its library priors from adata, got a registry "
                "alone"
            )
        with _naming_what_takes_memory(self._mixture, n_hidden):
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
                **kwargs,
            )
        prior_name = prior if isinstance(prior, str) else type(prior).__name__
        self._model_summary_string = self._model_summary_string.replace(
            "SCVI model", "MixSCVI model", 1
        ).removesuffix(".") + (
            f", n_components: {n_components}, n_sampled_components: "
            f"{self._mixture.n_sampled_components}, estimator: {estimator}, component_encoder: "
            f"{component_encoder}, prior: {prior_name}, n_flow_steps: {n_flow_steps}, n_samples: "
            f"{n_samples}, objective: {objective}."
        )
        if self._module_init_on_train:
            # scvi-tools forgets this one argument.
            self._module_kwargs["use_observed_lib_size"] = use_observed_lib_size
            self.var_names_ = None
        else:
            self.var_names_ = [str(gene) for gene in self.get_var_names()]
        if adata is not None and self._has_counts(self.adata_manager):
            check_data(self.adata_manager, self.module)
            if prior == "vamp":
                self._initialize_pseudo_cells(adata, n_prior_components)
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
        **kwargs: Any,
    ) -> None:
        """Register the AnnData fields with counts, batches and covariates.

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
            Column of ``obs`` with size factors, positive, instead of library sizes.
        categorical_covariate_keys, continuous_covariate_keys
            Columns of ``obs`` with further covariates.

        Raises
        ------
        ValueError
            If cells, genes or categories are missing, or are not those of a model being loaded.
        TypeError
            If counts or covariates are no numbers, or an argument is of another type.
        KeyError
            If there is no such layer or column.

        Examples
        --------
        >>> import mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        """
        check_setup(
            adata,
            layer=layer,
            batch_key=batch_key,
            labels_key=labels_key,
            size_factor_key=size_factor_key,
            categorical_covariate_keys=categorical_covariate_keys,
            continuous_covariate_keys=continuous_covariate_keys,
            may_lack_labels=kwargs.get("allow_missing_labels", False),
        )
        source = kwargs.get("source_registry")
        if source is not None:
            if not kwargs.get("extend_categories"):
                check_known_categories(adata, source)
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

    _train_runner_cls = Runner

    @property
    def init_params_(self) -> dict[str, dict]:
        """Arguments that made the model, by name.

        Raises
        ------
        TypeError
            If :class:`scvi.model.SCANVI` is to be made of several components.
        """
        # SCANVI takes all arguments for its own and stops at those that it does not know. Nothing
        # else of ours is called on that way.
        caller = sys._getframe(1)
        if (caller.f_code.co_name, caller.f_globals.get("__name__")) != (
            "from_scvi_model",
            SCANVI.__module__,
        ):
            return self._init_params
        if not self._mixture.is_scvi:
            raise TypeError(
                f"SCANVI has one Gaussian as posterior and a standard normal prior, but this "
                f"MixSCVI has n_components={self._mixture.n_components}, prior="
                f"{self._mixture.prior!r}: train one with n_components=1"
            )
        names = {field.name for field in fields(MixtureOptions)}
        of_scvi = {k: v for k, v in self._init_params["non_kwargs"].items() if k not in names}
        return {**self._init_params, "non_kwargs": of_scvi}

    @init_params_.setter
    def init_params_(self, value: dict[str, dict]) -> None:
        self._init_params = value

    @property
    def _training_plan_cls(self) -> type[TrainingPlan]:
        return LeanTrainingPlan if self._mixture.likelihood == "fused" else TrainingPlan

    _data_loader_cls = LeanDataLoader

    @property
    def _data_splitter_cls(self) -> type[DataSplitter]:
        normalized = self.module is not None and any(
            isinstance(part, torch.nn.BatchNorm1d) for part in self.module.modules()
        )
        return WithoutSingleCells if normalized else LeanDataSplitter

    def _initialize_pseudo_cells(self, adata: AnnData, n_pseudo: int) -> None:
        chosen = torch.randperm(adata.n_obs)[:n_pseudo]
        loader = self._make_data_loader(adata=adata, indices=chosen.tolist(), batch_size=n_pseudo)
        self.module.initialize_pseudo_cells(next(iter(loader)))

    def _validate_anndata(self, adata: AnnData | None = None, copy_if_view: bool = True) -> AnnData:
        if adata is not None and self.var_names_ is not None:
            check_genes(adata.var_names, self.var_names_)
            if self.adata is not None and adata is not self.adata:
                check_known_categories(adata, self.registry)
        adata = super()._validate_anndata(adata, copy_if_view=copy_if_view)
        if adata is not self.adata:
            manager = self.get_anndata_manager(adata, required=True)
            if self._has_counts(manager):
                check_data(manager, self.module)
        return adata

    @staticmethod
    def _has_counts(manager: AnnDataManager) -> bool:
        """Whether data have counts, and not the parameters of posteriors in their place."""
        return MINIFY_UNS_KEY not in manager.adata.uns and not counts_are_gone(manager)

    def _make_data_loader(
        self,
        adata: AnnData,
        indices: Sequence[int] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> LeanDataLoader:
        """Minibatches for every method; their cells are checked here for all of them."""
        if indices is not None:
            check_indices(indices, adata.n_obs)
        if counts_are_gone(self.get_anndata_manager(adata, required=True)):
            raise ValueError(
                "adata has latent posteriors in place of its counts: call minify_adata() first"
            )
        return super()._make_data_loader(adata, indices, *args, **kwargs)

    def _minibatches(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        batch_size: int | None,
        dataloader: Iterator[dict[str, Tensor]] | None,
        data_loader_kwargs: dict[str, Any] | None,
    ) -> Iterator[dict[str, Tensor]]:
        """Minibatches of cells in order, from `adata` or the user's own loader."""
        self._check_if_trained(warn=False)
        if dataloader is not None:
            if adata is not None:
                raise ValueError("give either adata or dataloader, got both")
            return iter(dataloader)
        if adata is None and self.adata is None:
            raise ValueError("the model holds no data: give adata or dataloader")
        adata = self._validate_anndata(adata)
        return iter(
            self._make_data_loader(
                adata=adata, indices=indices, batch_size=batch_size, **(data_loader_kwargs or {})
            )
        )
