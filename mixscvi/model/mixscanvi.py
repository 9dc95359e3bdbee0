"""MixSCANVI: labels of some cells in, labels of all out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS
from scvi.dataloaders import SemiSupervisedDataSplitter
from scvi.model import SCANVI
from scvi.module import SCANVAE, VAE

from mixscvi.model.base import MixtureMixin, check_made_of, making_what_fits
from mixscvi.model.checkpoints import CheckpointsMixin
from mixscvi.model.inputs import as_list, check_network, check_setup
from mixscvi.model.labels import (
    LabeledSplitter,
    LabeledTrainingPlan,
    LabeledWithoutSingleCells,
    check_classifier,
    check_label_prior,
    check_labels,
    check_module_labels,
    known_labels,
)
from mixscvi.model.prediction import PredictionMixin
from mixscvi.model.pretrained import PretrainedMixin
from mixscvi.model.training_arguments import check_data_module
from mixscvi.module import FusedSCANVAE, MixSCANVAE, MixtureOptions, ScviSCANVAE
from mixscvi.module.signatures import signed_as

if TYPE_CHECKING:
    from anndata import AnnData
    from lightning import LightningDataModule

__all__ = ["MixSCANVI"]


class MixSCANVI(MixtureMixin, PretrainedMixin, PredictionMixin, CheckpointsMixin, SCANVI):
    r"""scANVI with a mixture of Gaussians as posterior: some cells have labels, all get them.

    The generative model is that of :class:`scvi.model.SCANVI`: a label y and a latent u stand below
    the latent z of a cell in batch b,

    .. math:: p(x, z, u, y) = p(y) \, p(u) \, p(z \mid u, y) \, p(x \mid z, b).

    The posterior of z is a mixture,

    .. math:: q(z \mid x) = \frac{1}{A} \sum_{a=1}^{A}
        \mathcal{N}(z; \mu_a(x), \mathrm{diag}\, \sigma_a(x)^2),

    and training maximizes, over all cells,

    .. math:: \frac{1}{A} \sum_a \mathbb{E}_{q_a(z \mid x)} \Big[ \log p(x \mid z) - \log q(z \mid
        x) + \sum_y q(y \mid z) \, \mathbb{E}_{q(u \mid z, y)} \Big[ \log \frac{p(z \mid u, y) \,
        p(u) \, p(y)}{q(u \mid z, y) \, q(y \mid z)} \Big] \Big],

    less the cross-entropy of q(y | z), the classifier, in cells with labels. q(z | x) is the
    density of the whole mixture, so components are rewarded for covering what the others do not;
    the classifier sees a draw of each. With ``n_components=1`` it is :class:`scvi.model.SCANVI`.

    Parameters
    ----------
    adata
        Data registered with :meth:`MixSCANVI.setup_anndata`.
    registry, datamodule
        Registry of a data module and the module, instead of `adata`.
    n_hidden, n_latent, n_layers, dropout_rate, dispersion, gene_likelihood
        As in :class:`mixscvi.MixSCVI`.
    use_observed_lib_size
        As in :class:`mixscvi.MixSCVI`.
    linear_classifier
        Whether the classifier of the latents is linear, or a network with hidden layers.
    n_components, n_sampled_components, estimator, component_encoder, n_flow_steps
        As in :class:`mixscvi.MixSCVI`.
    n_samples, objective, likelihood
        As in :class:`mixscvi.MixSCVI`.
    **kwargs
        Passed to :class:`scvi.module.SCANVAE`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as above, the counts are negative, NaN, infinite, or all zero in a
        cell, or dispersions are to be those of labels that some cells do not have.
    MemoryError
        If the model is too large for this machine, naming what to choose.

    Notes
    -----
    There is no choice of prior: p(z) is what labels and u make it. Its density is estimated without
    bias, so :meth:`get_marginal_ll` and exact posteriors are those of this model, and k-hat sees
    the noise. scANVI's own counts z under a standard normal there, beside p(z | u, y).

    Examples
    --------
    >>> import mixscvi, scvi
    >>> adata = mixscvi.datasets.pbmc68k()
    >>> labels = adata.obs["cell_type"].astype(str)
    >>> adata.obs["label"] = labels.where([i % 2 == 0 for i in range(700)], "Unknown")
    >>> mixscvi.MixSCVI.setup_anndata(adata, labels_key="label")
    >>> pretrained = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
    >>> pretrained.train(max_epochs=1, enable_progress_bar=False)
    >>> model = mixscvi.MixSCANVI.from_scvi_model(pretrained, unlabeled_category="Unknown")
    >>> scvi.settings.verbosity = 30  # warnings, and not that it trains
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> scvi.settings.verbosity = 20
    >>> model.predict().shape, model.predict(soft=True).shape
    ((700,), (700, 10))
    """

    _by_scvi_tools: ClassVar[str] = "SCANVI"
    _training_plan_cls = LabeledTrainingPlan

    @property
    def _module_cls(self) -> Callable[..., MixSCANVAE | ScviSCANVAE]:
        """The module's class: scvi-tools' own where the options describe scANVI."""
        if self._mixture.is_scvi:
            cls = FusedSCANVAE if self._mixture.likelihood == "fused" else ScviSCANVAE
            fixed: dict[str, Any] = {}
        else:
            cls, fixed = MixSCANVAE, {"mixture": self._mixture}
        labels = known_labels(self._label_mapping, self.unlabeled_category_)

        @signed_as(cls)
        def make(*args: Any, **kwargs: Any) -> MixSCANVAE | ScviSCANVAE:
            check_label_prior(kwargs.get("y_prior"), len(labels))
            # scvi-tools takes one more for a query whose cells all have labels.
            return cls(*args, **{**kwargs, **fixed, "n_labels": len(labels)})

        return make

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
        linear_classifier: bool = False,
        datamodule: LightningDataModule | None = None,
        *,
        n_components: int = 4,
        n_sampled_components: int | None = None,
        estimator: Literal["all_to_all", "some_to_all", "some_to_some"] = "all_to_all",
        component_encoder: Literal["separate", "amortized"] = "separate",
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
            n_flow_steps=n_flow_steps,
            n_samples=n_samples,
            objective=objective,
            likelihood=likelihood,
        )
        self._check_alternatives(kwargs)
        check_network(
            n_hidden=n_hidden,
            n_latent=n_latent,
            n_layers=n_layers,
            dropout_rate=dropout_rate,
            dispersion=dispersion,
            gene_likelihood=gene_likelihood,
            latent_distribution="normal",
            further={
                **kwargs,
                "use_observed_lib_size": use_observed_lib_size,
                "linear_classifier": linear_classifier,
            },
            networks=(VAE, SCANVAE),
        )
        check_classifier(kwargs.get("classifier_parameters"))
        check_made_of(adata, registry)
        check_data_module(datamodule)
        if adata is None:
            registry = self._check_registry(registry, datamodule, use_observed_lib_size)
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
                linear_classifier=linear_classifier,
                datamodule=datamodule,
                **kwargs,
            )
        self.n_labels = self.module.n_labels
        self._complete_summary("ScanVI Model", "MixSCANVI model")
        self._know_data()
        if dispersion == "gene-label" and len(self._unlabeled_indices):
            raise ValueError(
                "dispersion='gene-label' takes the dispersions of a cell from its label, and "
                f"{len(self._unlabeled_indices)} cells are {self.unlabeled_category_!r}: choose "
                "'gene', 'gene-batch' or 'gene-cell'"
            )
        self.init_params_ = self._get_init_params(locals())
        del self.init_params_["non_kwargs"]["datamodule"]  # a file of the model holds no data

    @staticmethod
    def _check_registry(
        registry: dict[str, Any] | None,
        datamodule: LightningDataModule | None,
        use_observed_lib_size: bool,
    ) -> dict[str, Any]:
        """Registry of a model without an AnnData; raise if nothing can be made of it."""
        if registry is None and datamodule is None:
            raise ValueError("give adata, or the registry of a data module")
        if registry is None:
            registry = cast(Any, datamodule).registry
        if not use_observed_lib_size:
            raise ValueError(
                "use_observed_lib_size=False takes its library priors from adata, got a registry "
                "alone"
            )
        check_module_labels(registry, datamodule)
        return registry

    @staticmethod
    def _check_alternatives(kwargs: dict[str, Any]) -> None:
        """Raise if an argument is of MixSCVI, and has no place here."""
        if kwargs.get("latent_distribution", "normal") != "normal":
            raise ValueError(
                "latent_distribution must be 'normal' in MixSCANVI, whose p(z | u, y) is a "
                f"Gaussian, got {kwargs['latent_distribution']!r}"
            )
        for name in ("prior", "n_prior_components"):
            if name in kwargs:
                raise TypeError(
                    f"MixSCANVI has no argument {name!r}: its p(z) is made of the labels, got "
                    f"{name}={kwargs[name]!r}"
                )

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        labels_key: str,
        unlabeled_category: str,
        layer: str | None = None,
        batch_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        use_minified: bool = True,
        **kwargs: Any,
    ) -> None:
        """Register the AnnData fields with counts, labels, batches and covariates.

        Parameters
        ----------
        adata
            Cells with raw counts, `(n, G)`.
        labels_key
            Column of ``obs`` with the labels.
        unlabeled_category
            Value of that column in cells without a label.
        layer, batch_key, size_factor_key
            As in :meth:`mixscvi.MixSCVI.setup_anndata`.
        categorical_covariate_keys, continuous_covariate_keys
            As in :meth:`mixscvi.MixSCVI.setup_anndata`.
        use_minified
            Whether data that were minified are registered as such.
        **kwargs
            As in :meth:`mixscvi.MixSCVI.setup_anndata`.

        Raises
        ------
        ValueError
            If data or categories do not fit, or there are fewer than two labels, or unknown ones.
        TypeError
            If counts or covariates are no numbers, or an argument is of another type.
        KeyError
            If there is no such layer or column.

        Examples
        --------
        >>> import mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCANVI.setup_anndata(adata, "cell_type", unlabeled_category="Unknown")
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
        check_labels(adata, labels_key, unlabeled_category, kwargs.get("source_registry"))
        super().setup_anndata(
            adata,
            labels_key=labels_key,
            unlabeled_category=unlabeled_category,
            layer=layer,
            batch_key=batch_key,
            size_factor_key=size_factor_key,
            categorical_covariate_keys=as_list(categorical_covariate_keys),
            continuous_covariate_keys=as_list(continuous_covariate_keys),
            use_minified=use_minified,
            **kwargs,
        )

    def _set_indices_and_labels(self, datamodule: LightningDataModule | None = None) -> None:
        """Note which cells have labels; see scvi-tools, whose version 1.4 needs data for it."""
        if self.adata is not None or datamodule is not None:
            super()._set_indices_and_labels(datamodule)
            return
        state = self.get_state_registry(REGISTRY_KEYS.LABELS_KEY)
        self.original_label_key = state.original_key
        self.unlabeled_category_ = state.unlabeled_category
        self._label_mapping = state.categorical_mapping
        self._code_to_label = dict(enumerate(self._label_mapping))
        self.labels_ = np.asarray(known_labels(self._label_mapping, self.unlabeled_category_))
        self._labeled_indices = self._unlabeled_indices = np.array([], dtype=int)

    def _validate_anndata(self, adata: AnnData | None = None, copy_if_view: bool = True) -> AnnData:
        key = self.original_label_key
        obs = getattr(adata, "obs", None)
        if isinstance(obs, pd.DataFrame) and key not in obs:
            raise KeyError(
                f"adata.obs has no column {key!r} of labels: for cells without, set "
                f"adata.obs[{key!r}] = {self.unlabeled_category_!r}"
            )
        return super()._validate_anndata(adata, copy_if_view=copy_if_view)

    @property
    def _data_splitter_cls(self) -> type[SemiSupervisedDataSplitter]:
        normalized = any(isinstance(part, torch.nn.BatchNorm1d) for part in self.module.modules())
        return LabeledWithoutSingleCells if normalized else LabeledSplitter

    @signed_as(SCANVI.train, checkpoint_dir=None, checkpoint_every=None)
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train the model; see ``SCANVI.train``.

        ``plan_kwargs={"classification_ratio": ...}`` weighs the cross-entropy of the labels
        against the bound, 50 by default.

        Parameters
        ----------
        *args, **kwargs
            As in ``SCANVI.train``, and `checkpoint_dir` and `checkpoint_every` as in
            :meth:`mixscvi.MixSCVI.train`.

        Raises
        ------
        TypeError, IndexError, AttributeError, FileNotFoundError, MemoryError
            As in :meth:`mixscvi.MixSCVI.train`.
        ValueError
            As in :meth:`mixscvi.MixSCVI.train`; or if a model without an AnnData is not told
            `max_epochs`.

        Warns
        -----
        UserWarning
            If a component is dead in more than a tenth of the cells; see
            :meth:`mixscvi.MixSCVI.train`.

        Examples
        --------
        >>> import mixscvi, scvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> labels = adata.obs["cell_type"].astype(str)
        >>> adata.obs["label"] = labels.where([i % 2 == 0 for i in range(700)], "Unknown")
        >>> mixscvi.MixSCANVI.setup_anndata(adata, "label", unlabeled_category="Unknown")
        >>> model = mixscvi.MixSCANVI(adata, n_components=2, n_hidden=16)
        >>> scvi.settings.verbosity = 30  # warnings, and not that it trains
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> scvi.settings.verbosity = 20
        >>> len(model.history["elbo_train"])
        1
        """
        given = inspect.signature(SCANVI.train).bind(self, *args, **kwargs).arguments
        if self.adata is None and given.get("max_epochs") is None and "datamodule" in given:
            raise ValueError(
                "max_epochs must be given with datamodule: by default it depends on the number of "
                "cells in adata"
            )
        return super().train(*args, **kwargs)
