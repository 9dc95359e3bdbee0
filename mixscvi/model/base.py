"""What :class:`mixscvi.MixSCVI` and :class:`mixscvi.MixSCANVI` have in common."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.data._constants import _SETUP_ARGS_KEY
from scvi.data._utils import _check_if_view
from scvi.model import SCVI
from scvi.module.base import BaseModuleClass
from torch import Tensor

from mixscvi.checks import (
    check_anndata,
    check_batches,
    check_choice,
    check_gene_list,
    check_genes,
    check_indices,
    check_loader,
    check_number,
    check_positive_int,
    is_in_memory,
)
from mixscvi.model.adapted import AdaptedMixin
from mixscvi.model.components import ComponentsMixin
from mixscvi.model.data import MINIFY_UNS_KEY, check_data, counts_have_fractions, name_counts
from mixscvi.model.differential import DifferentialMixin
from mixscvi.model.evaluation import EvaluationMixin
from mixscvi.model.expression import ExpressionMixin
from mixscvi.model.given import GivenMinibatches, is_of_a_data_module, registry_of
from mixscvi.model.inputs import (
    check_dispersion,
    check_keywords,
    check_known_categories,
    take_sparse_array,
)
from mixscvi.model.latents import LatentsMixin
from mixscvi.model.loader_arguments import check_loader_arguments
from mixscvi.model.loaders import LeanDataLoader
from mixscvi.model.minified import MinifiedMixin, counts_are_gone
from mixscvi.model.persistence import PersistenceMixin
from mixscvi.model.queries import QueriesMixin
from mixscvi.model.runner import Runner
from mixscvi.module import MixtureOptions
from mixscvi.system import naming_what_takes_memory, physical_memory
from mixscvi.warning import warn_user

if TYPE_CHECKING:
    from scvi.data import AnnDataManager

__all__ = ["MixtureMixin", "check_made_of", "making_what_fits"]

_BYTES_A_WEIGHT = 16  # with its gradient, and two moments of Adam


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of scvi-tools look at its arguments, and warn if the model is not trained."""

    @functools.wraps(method)
    def checked(self: MixtureMixin, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(method).bind(self, *args, **kwargs)
        # Numbers of a model that is not trained mean nothing; of library sizes scvi-tools says so.
        self._check_if_trained(warn=method is not SCVI.get_latent_library_size)
        self._check_arguments(given.arguments)
        if method in (SCVI.get_likelihood_parameters, SCVI.get_feature_correlation_matrix):
            check_dispersion(self.module, f"{method.__name__}()")
        of_module = given.arguments.get("kwargs")
        check_keywords(of_module, [BaseModuleClass.forward], argument=f"{method.__name__}()")
        if "dataloader" in given.arguments:
            given.arguments["dataloader"] = self._given(given.arguments["dataloader"])
        return method(*given.args, **given.kwargs)

    return checked


@contextmanager
def making_what_fits(
    mixture: MixtureOptions, n_hidden: int, n_latent: int, n_layers: int, data: Any
) -> Iterator[None]:
    """Say what to choose where a model is too large to be made, or to be trained here.

    `data` are the cells or the registry that it is made of, if there are any.
    """
    too_large = (
        f"a model of n_components={mixture.n_components} with component_encoder="
        f"{mixture.component_encoder!r}, n_hidden={n_hidden}, n_latent={n_latent}, n_layers="
        f"{n_layers} and n_prior_components={mixture.n_prior_components} does not fit into memory: "
        "choose smaller ones, or component_encoder='amortized', which shares one encoder"
    )
    # At least; systems hand out more memory than they have, and end whoever uses it.
    n_weights = n_hidden * (_n_genes(data) + n_hidden * (n_layers - 1) + 2 * n_latent)
    if mixture.component_encoder == "separate":
        n_weights *= mixture.n_components
    if mixture.prior == "mog":
        n_weights += 2 * n_latent * mixture.n_prior_components
    memory = physical_memory()
    if memory is not None and n_weights * _BYTES_A_WEIGHT > memory:
        raise MemoryError(too_large)
    with naming_what_takes_memory(too_large):
        yield


def check_made_of(adata: Any, registry: Any) -> None:
    """Raise if a model can be made of neither data nor a registry.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.
    """
    if adata is not None:
        check_anndata(adata)
    elif registry is not None and not isinstance(registry, Mapping):
        raise TypeError(f"registry must be that of a data module, got {registry!r:.60}")
    elif registry is not None and "field_registries" not in registry:
        raise ValueError(f"registry must have 'field_registries', got {[*registry]}")


def _n_genes(data: Any) -> int:
    """Number of genes in cells or in a registry; 0 if it says nothing of them."""
    if isinstance(data, Mapping):
        x = data.get("field_registries", {}).get(REGISTRY_KEYS.X_KEY, {})
        return x.get("summary_stats", {}).get("n_vars", 0)
    return getattr(data, "n_vars", 0)


class MixtureMixin(
    LatentsMixin,
    EvaluationMixin,
    DifferentialMixin,
    ExpressionMixin,
    AdaptedMixin,
    ComponentsMixin,
    QueriesMixin,
    MinifiedMixin,
    PersistenceMixin,
):
    """A model of scvi-tools with a mixture posterior: what it does with its cells.

    It comes ahead of scvi-tools' model among the bases.
    """

    _mixture: MixtureOptions
    var_names_: list[str] | None = None
    """Names of the genes trained on."""
    # Whether its own counts did when it was made; ``None`` of those that are not in memory.
    _had_fractions: bool | None = None
    _train_runner_cls = Runner
    _data_loader_cls = LeanDataLoader

    get_elbo = _checked(SCVI.get_elbo)
    get_reconstruction_error = _checked(SCVI.get_reconstruction_error)
    get_likelihood_parameters = _checked(SCVI.get_likelihood_parameters)
    get_feature_correlation_matrix = _checked(SCVI.get_feature_correlation_matrix)
    get_latent_library_size = _checked(SCVI.get_latent_library_size)
    posterior_predictive_sample = _checked(SCVI.posterior_predictive_sample)

    def _check_arguments(self, given: Mapping[str, Any]) -> None:
        """Raise if an argument of a method, by name, cannot be what it is for."""
        check_loader_arguments(given.get("data_loader_kwargs"))
        if "n_samples" in given:
            check_positive_int("n_samples", given["n_samples"])
        if given.get("gene_list") is not None:
            check_gene_list(given["gene_list"], pd.Index(self.get_var_names()))
        if given.get("transform_batch") is not None and given.get("dataloader") is None:
            check_batches(given["transform_batch"], self._known_batches())
        if "rna_size_factor" in given:
            check_number("rna_size_factor", given["rna_size_factor"], above=0)
        if "correlation_type" in given:
            check_choice("correlation_type", given["correlation_type"], ("spearman", "pearson"))

    def _given(self, dataloader: Iterable[Mapping[str, Tensor]] | None) -> GivenMinibatches | None:
        """Minibatches of the user's own, if there are any, each of which is checked."""
        check_loader(dataloader)
        if dataloader is None or isinstance(dataloader, GivenMinibatches):
            return dataloader
        return GivenMinibatches(dataloader, self.module)

    def _names_of(self, adata: AnnData | None, indices: Any) -> pd.Index:
        """Names of the cells that are chosen, all by default."""
        names = (self.adata if adata is None else adata).obs_names
        return names if indices is None else names[np.asarray(indices)]

    def _known_batches(self) -> list[Any]:
        """Batches that the model was trained on."""
        field = self.registry["field_registries"][REGISTRY_KEYS.BATCH_KEY]
        return list(field["state_registry"]["categorical_mapping"])

    def _complete_summary(self, title: str, own_title: str) -> None:
        """Put the model's name into scvi-tools' summary, and the mixture behind it."""
        mixture = self._mixture
        prior = mixture.prior if isinstance(mixture.prior, str) else type(mixture.prior).__name__
        self._model_summary_string = self._model_summary_string.replace(
            title, own_title, 1
        ).removesuffix(".") + (
            f", n_components: {mixture.n_components}, n_sampled_components: "
            f"{mixture.n_sampled_components}, estimator: {mixture.estimator}, component_encoder: "
            f"{mixture.component_encoder}, prior: {prior}, n_flow_steps: {mixture.n_flow_steps}, "
            f"n_samples: {mixture.n_samples}, objective: {mixture.objective}."
        )

    def _know_data(self) -> None:
        """Check what the model was made of, and note it, to notice changes in place."""
        self.var_names_ = [str(gene) for gene in self.get_var_names()]
        if self.adata is not None and self._has_counts(self.adata_manager):
            check_data(self.adata_manager, self.module)
            self._had_fractions = counts_have_fractions(self.adata_manager)

    def _validate_anndata(self, adata: AnnData | None = None, copy_if_view: bool = True) -> AnnData:
        if adata is None:
            if self.adata is None:
                raise ValueError("the model holds no data: give adata")
            adata = self.adata
        elif self.adata is None and not registry_of(self):
            self._check_if_trained(warn=False)
            raise ValueError(
                "the model was made without data, so that it knows no genes, batches or covariates "
                "of an AnnData: give dataloader, or make the model with adata or registry"
            )
        elif self.adata is None and is_of_a_data_module(registry_of(self)):
            raise ValueError(
                "the model was made of a data module, which says nothing of an AnnData: give "
                "dataloader=datamodule.inference_dataloader(), or load the saved model with an "
                "adata that is set up with the same batches"
            )
        check_anndata(adata)
        if self.var_names_ is not None:
            check_genes(adata.var_names, self.var_names_)
            if self.adata is not None and adata is not self.adata:
                check_known_categories(adata, self.registry)
        _check_if_view(adata, copy_if_view=copy_if_view)  # as scvi-tools does next
        take_sparse_array(adata, registry_of(self).get(_SETUP_ARGS_KEY, {}).get("layer"))
        adata = super()._validate_anndata(adata, copy_if_view=copy_if_view)
        manager = self.get_anndata_manager(adata, required=True)
        if self._has_counts(manager):
            if adata is not self.adata:
                check_data(manager, self.module)
            elif is_in_memory(manager.get_from_registry(REGISTRY_KEYS.X_KEY)):
                self._check_changed(manager)  # there it may be changed in place
        return adata

    def _check_changed(self, manager: AnnDataManager) -> None:
        """Raise or warn if the model's own data are no counts any more."""
        check_data(manager, self.module)
        if self._had_fractions is False and counts_have_fractions(manager):
            warn_user(
                f"{name_counts(manager)} has changed since the model was made: it has values that "
                "are no whole numbers now, and was of whole numbers. The model needs counts: "
                "normalize a copy, adata.copy(), or keep counts in a layer, "
                "setup_anndata(adata, layer='counts')"
            )

    @staticmethod
    def _has_counts(manager: AnnDataManager) -> bool:
        """Whether data have counts, and not the parameters of posteriors in their place."""
        return MINIFY_UNS_KEY not in manager.adata.uns and not counts_are_gone(manager)

    def _make_data_loader(
        self,
        adata: AnnData,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> LeanDataLoader:
        """Minibatches for every method; their cells are checked here for all of them."""
        positions = None if indices is None else check_indices(indices, adata.n_obs)
        if batch_size is not None:
            batch_size = check_positive_int("batch_size", batch_size)
        if counts_are_gone(self.get_anndata_manager(adata, required=True)):
            raise ValueError(
                "adata has latent posteriors in place of its counts: call minify_adata() first"
            )
        return super()._make_data_loader(adata, positions, batch_size, *args, **kwargs)

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
        check_loader_arguments(data_loader_kwargs)
        if dataloader is not None and adata is not None:
            raise ValueError("give either adata or dataloader, got both")
        given = self._given(dataloader)
        if given is not None:
            return iter(given)
        if adata is None and self.adata is None:
            raise ValueError("the model holds no data: give adata or dataloader")
        adata = self._validate_anndata(adata)
        return iter(
            self._make_data_loader(
                adata=adata, indices=indices, batch_size=batch_size, **(data_loader_kwargs or {})
            )
        )
