"""MixSCVI: AnnData in, latents, likelihoods and diagnostics out."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from scvi.dataloaders import DataSplitter
from scvi.model import SCANVI, SCVI
from scvi.train import TrainingPlan

from mixscvi.mixture import Prior
from mixscvi.model.base import MixtureMixin, check_made_of, making_what_fits
from mixscvi.model.checkpoints import CheckpointsMixin
from mixscvi.model.conversion import ConversionMixin
from mixscvi.model.data import LeanDataSplitter, WithoutSingleCells
from mixscvi.model.inputs import as_list, check_network, check_setup
from mixscvi.model.runner import WithoutData
from mixscvi.model.training import LeanTrainingPlan, ScviTrainingPlan
from mixscvi.module import FusedVAE, MixtureOptions, MixVAE, ScviVAE

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["MixSCVI"]


class MixSCVI(MixtureMixin, ConversionMixin, CheckpointsMixin, SCVI, WithoutData):
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
    n_hidden
        Units of a hidden layer.
    n_latent
        Latent dimensions, `D`.
    n_layers
        Hidden layers of the encoders, and of the decoder.
    dropout_rate
        Share of hidden units that training leaves out of the encoders at random.
    dispersion
        What the inverse dispersion of a gene depends on beside the gene: ``"gene"``, nothing;
        ``"gene-batch"``, the batch; ``"gene-label"``, the label; ``"gene-cell"``, the latents.
    gene_likelihood
        Distribution of the counts: zero-inflated negative binomial, negative binomial, Poisson, or
        normal, which raw counts are not.
    use_observed_lib_size
        Whether a cell's library size is the sum of its counts, or inferred as a latent.
    latent_distribution
        ``"normal"``, or ``"ln"``, the logistic normal: draws are mapped to the simplex.
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
    MemoryError
        If the model is too large for this machine, naming what to choose.

    Notes
    -----
    The VampPrior's pseudo-cells are random until :meth:`train` starts them as cells that it trains
    on, the first of its shuffled minibatches (with a data module, those of the first one), and
    beyond their number as averages of two.

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
            further={**kwargs, "use_observed_lib_size": use_observed_lib_size},
        )
        if adata is None and registry is not None and not use_observed_lib_size:
            raise ValueError(
                "use_observed_lib_size=False takes its library priors from adata, got a registry "
                "alone"
            )
        check_made_of(adata, registry)
        data = registry if adata is None else adata
        with making_what_fits(self._mixture, n_hidden, n_latent, n_layers, data):
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
        self._complete_summary("SCVI model", "MixSCVI model")
        if self._module_init_on_train:
            # scvi-tools forgets this one argument.
            self._module_kwargs["use_observed_lib_size"] = use_observed_lib_size
            self.var_names_ = None
        else:
            self._know_data()
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
        **kwargs
            What scvi-tools passes on when it registers data for a model that there is.

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
            **kwargs,
        )
        super().setup_anndata(
            adata,
            layer=layer,
            batch_key=batch_key,
            labels_key=labels_key,
            size_factor_key=size_factor_key,
            categorical_covariate_keys=as_list(categorical_covariate_keys),
            continuous_covariate_keys=as_list(continuous_covariate_keys),
            **kwargs,
        )

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
                f"{self._mixture.prior!r}: use mixscvi.MixSCANVI.from_scvi_model, or train one "
                "with n_components=1"
            )
        names = {field.name for field in fields(MixtureOptions)}
        of_scvi = {k: v for k, v in self._init_params["non_kwargs"].items() if k not in names}
        return {**self._init_params, "non_kwargs": of_scvi}

    @init_params_.setter
    def init_params_(self, value: dict[str, dict]) -> None:
        self._init_params = value

    @property
    def _training_plan_cls(self) -> type[TrainingPlan]:
        return LeanTrainingPlan if self._mixture.likelihood == "fused" else ScviTrainingPlan

    @property
    def _data_splitter_cls(self) -> type[DataSplitter]:
        normalized = self.module is not None and any(
            isinstance(part, torch.nn.BatchNorm1d) for part in self.module.modules()
        )
        return WithoutSingleCells if normalized else LeanDataSplitter
