"""Queries mapped to a reference."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Self, cast

import pandas as pd
import torch
from scvi.model import SCVI
from scvi.model.base import BaseModelClass
from torch import Tensor

from mixscvi.checks import check_anndata, check_boolean, check_unique
from mixscvi.mixture import VampPrior
from mixscvi.model.accelerators import check_device
from mixscvi.model.files import StoredModel, read_model
from mixscvi.model.inputs import check_keywords
from mixscvi.model.persistence import check_class, naming_the_file, read_for
from mixscvi.model.surgery import describe, freeze, n_columns
from mixscvi.module.pseudo_cells import PseudoCells

if TYPE_CHECKING:
    from anndata import AnnData
    from scvi.module import VAE

__all__ = ["QueriesMixin"]


class QueriesMixin:
    """Methods of :class:`mixscvi.MixSCVI` that map queries, in place of scvi-tools' own."""

    @staticmethod
    def prepare_query_anndata(
        adata: AnnData,
        reference_model: str | os.PathLike[str] | SCVI,
        return_reference_var_names: bool = False,
        inplace: bool = True,
        *,
        allow_pickle: bool = False,
    ) -> AnnData | pd.Index | None:
        """Give a query the genes of a reference; see ``SCVI.prepare_query_anndata``.

        Parameters
        ----------
        adata, return_reference_var_names, inplace
            As in ``SCVI.prepare_query_anndata``.
        reference_model
            The reference, or the folder that it was saved to.
        allow_pickle
            As in :meth:`MixSCVI.load`.

        Returns
        -------
        Nothing, as `adata` itself is changed; the changed copy with ``inplace=False``; or the genes
        of the reference with ``return_reference_var_names=True``.

        Raises
        ------
        ValueError
            As :meth:`MixSCVI.load`; or if the query has none of the genes, or one of them twice, or
            lacks genes and has a cell twice.

        Examples
        --------
        Genes that the query lacks are zeros, and those that the reference lacks are left out:

        >>> import mixscvi, scvi
        >>> scvi.settings.verbosity = 30  # warnings, and not the share of genes
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> reference, query = adata[:400].copy(), adata[400:, 20:].copy()
        >>> mixscvi.MixSCVI.setup_anndata(reference)
        >>> model = mixscvi.MixSCVI(reference, n_components=2, n_hidden=16)
        >>> mixscvi.MixSCVI.prepare_query_anndata(query, model)
        >>> scvi.settings.verbosity = 20
        >>> query.n_vars == reference.n_vars
        True
        """
        check_anndata(adata)
        check_unique(adata.var_names, source="adata.var_names")
        source: AbstractContextManager[Any] = nullcontext(reference_model)
        if not isinstance(reference_model, (str, os.PathLike)):
            genes = pd.Index(_checked_reference(reference_model).get_var_names())
        else:
            stored = read_model(reference_model, allow_pickle=allow_pickle)
            source, genes = stored.as_written_by_scvi(), pd.Index(stored.var_names)
        check_unique(genes, source="the reference's genes")
        if not genes.isin(adata.var_names).any():
            first, given = ([str(gene) for gene in of[:2]] for of in (genes, adata.var_names))
            raise ValueError(
                f"adata has none of the reference's {len(genes)} genes, which are {first} and so "
                f"on, got {given}"
            )
        if not genes.isin(adata.var_names).all():  # cells are matched with those of zeros
            check_unique(adata.obs_names, source="adata.obs_names")
        with source as reference:
            return SCVI.prepare_query_anndata(
                adata, reference, return_reference_var_names, inplace=inplace
            )

    @staticmethod
    def prepare_query_mudata(*args: Any, **kwargs: Any) -> None:
        """Refuse: the model takes no MuData, as SCVI takes none.

        scvi-tools' own would read the reference's file, which can run any code, before it fails.

        Parameters
        ----------
        *args, **kwargs
            As in ``SCVI.prepare_query_mudata``.

        Raises
        ------
        NotImplementedError
            Always.

        Examples
        --------
        >>> import mixscvi
        >>> mixscvi.MixSCVI.prepare_query_mudata(None, "reference")
        Traceback (most recent call last):
        ...
        NotImplementedError: the model takes AnnData, no MuData: call prepare_query_anndata()
        """
        raise NotImplementedError(
            "the model takes AnnData, no MuData: call prepare_query_anndata()"
        )

    @classmethod
    def load_query_data(
        cls,
        adata: AnnData | None = None,
        reference_model: str | os.PathLike[str] | SCVI | None = None,
        registry: dict[str, Any] | None = None,
        inplace_subset_query_vars: bool = False,
        accelerator: str = "auto",
        device: int | str = "auto",
        unfrozen: bool = False,
        freeze_dropout: bool = False,
        freeze_expression: bool = True,
        *args: Any,
        allow_pickle: bool = False,
        arguments: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Map query cells onto a trained reference (scArches); see ``SCVI.load_query_data``.

        What scArches trains of scVI's encoder it trains of every component's: the weights of the
        covariates, and those of expression with ``freeze_expression=False``. Where batches are
        embedded, it trains the embeddings of new ones. Before training, cells of the reference
        have the latents and expression that the reference gave them.

        Parameters
        ----------
        adata, registry, inplace_subset_query_vars, accelerator, device, unfrozen, \
        freeze_dropout, freeze_expression, *args, **kwargs
            As in ``SCVI.load_query_data``.
        reference_model
            The reference, or the folder that it was saved to.
        allow_pickle, arguments
            As in :meth:`MixSCVI.load`.

        Returns
        -------
        The model of the query, with the weights of the reference, to be trained.

        Raises
        ------
        TypeError
            If there is no reference.
        ValueError
            As :meth:`MixSCVI.load`; or if the query does not fit the reference.

        Examples
        --------
        >>> import mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> adata.obs["sample"] = ["new" if i % 3 == 0 else "old" for i in range(adata.n_obs)]
        >>> reference = adata[adata.obs["sample"] == "old"].copy()
        >>> query = adata[adata.obs["sample"] == "new"].copy()
        >>> mixscvi.MixSCVI.setup_anndata(reference, batch_key="sample")
        >>> model = mixscvi.MixSCVI(reference, n_components=2, n_hidden=16)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> mapped = mixscvi.MixSCVI.load_query_data(query, model)
        >>> mapped.train(max_epochs=1, plan_kwargs={"weight_decay": 0}, enable_progress_bar=False)
        >>> mapped.get_latent_representation().shape == (query.n_obs, 10)
        True
        """
        if adata is None and registry is None:
            raise ValueError("give adata, the cells of the query, or the registry of a data module")
        if adata is not None:
            check_anndata(adata)
        elif not isinstance(registry, Mapping):
            raise TypeError(f"registry must be that of a data module, got {registry!r:.60}")
        check_device(accelerator, device)
        check_keywords(kwargs, [SCVI.load_query_data], argument="load_query_data()")
        flags = {
            "unfrozen": unfrozen,
            "freeze_dropout": freeze_dropout,
            "freeze_expression": freeze_expression,
            "inplace_subset_query_vars": inplace_subset_query_vars,
            **{name: value for name, value in kwargs.items() if name != "datamodule"},
        }
        for name, value in flags.items():
            check_boolean(name, value)
        if inplace_subset_query_vars and adata is not None:
            check_unique(adata.var_names, source="adata.var_names")
        source: AbstractContextManager[Any] = nullcontext(reference_model)
        naming: AbstractContextManager[Any] = nullcontext()
        stored: StoredModel | None = None
        if isinstance(reference_model, (str, os.PathLike)):
            stored = read_for(cls, reference_model, allow_pickle=allow_pickle, arguments=arguments)
            given, state_dict = stored.attributes["registry_"], stored.state_dict
            trusted = {"allow_pickle": allow_pickle, "arguments": arguments}
            alone = partial(cls.load, reference_model, False, "cpu", **trusted)
            source, naming = stored.as_written_by_scvi(), naming_the_file(stored.path, alone)
        else:
            trained = _checked_reference(reference_model)
            given, state_dict = trained.registry, trained.module.state_dict()
        of_model = "reference_model" if stored is None else str(stored.path)
        check_class(cls, given, source=of_model)
        with naming:
            known = n_columns(given)
            with source as reference:
                bound = inspect.signature(super().load_query_data).bind(
                    adata,
                    reference,
                    registry,
                    inplace_subset_query_vars,
                    accelerator,
                    device,
                    unfrozen,
                    freeze_dropout,
                    freeze_expression,
                    *args,
                    **kwargs,
                )
                model = super().load_query_data(*bound.args, **bound.kwargs)
            new = n_columns(model.registry)
            _order_covariates(model.module, state_dict, known, new)
            if isinstance(model.module.prior, VampPrior):
                # The pseudo-cells are the reference's: none of them is of a batch that is new.
                pseudo_cells = cast(PseudoCells, model.module.prior.pseudo_inputs)
                pseudo_cells.hide_categories(_n_categories(state_dict))
            bound.apply_defaults()
            model.surgery_ = describe(bound.arguments, known, state_dict)
            freeze(model.module, model.surgery_, new, by_scvi=False)
        return model


def _checked_reference(model: Any) -> BaseModelClass:
    if not isinstance(model, BaseModelClass):
        raise TypeError(f"reference_model must be a model or the folder of one, got {model!r:.60}")
    return model


@torch.no_grad()
def _order_covariates(
    module: VAE, reference: Mapping[str, Tensor], known: list[int], new: list[int]
) -> None:
    """Put the weights of the reference's covariates where the query's networks have them.

    scvi-tools adds the columns of new categories behind all others, so those of a new batch take
    the place of the first further covariate's. The one category of a covariate that had no
    columns gets weights of zero: it is what the reference is without.
    """
    if module.batch_representation == "embedding":
        known, new = known[1:], new[1:]
    order: list[int] = []
    zero: list[int] = []
    start, added = 0, sum(known)
    for n_known, n_new in zip(known, new, strict=True):
        if n_new and not n_known:
            zero.append(len(order))
        order += [*range(start, start + n_known), *range(added, added + n_new - n_known)]
        start, added = start + n_known, added + n_new - n_known
    for name, parameter in module.named_parameters():
        if name.startswith(("z_encoder", "l_encoder", "decoder")) and (
            parameter.shape[-1] - reference[name].shape[-1] == sum(new) - sum(known) > 0
        ):
            columns = parameter[..., parameter.shape[-1] - sum(new) :]
            columns.copy_(columns[..., order])
            columns[..., zero] = 0


def _n_categories(state_dict: Mapping[str, Tensor]) -> list[int]:
    """Categories that the pseudo-cells of a reference know, covariate by covariate."""
    return [value.shape[-1] for name, value in state_dict.items() if ".cat_logits." in name]
