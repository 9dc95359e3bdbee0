"""Differential expression, of cells in memory and on disk, under either kind of posteriors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scvi.model import SCVI

from mixscvi.checks import check_anndata, check_comparison, groups_to_compare
from mixscvi.model.adapted import warn_of_adapted_tails
from mixscvi.model.expression import DrawsOfCells
from mixscvi.model.raw_counts import with_raw_counts
from mixscvi.model.rows import is_on_disk
from mixscvi.module.signatures import signed_as

__all__ = ["DifferentialMixin"]

_TEMPORARY = "_scvi_temp_de"


class DifferentialMixin:
    """Methods of :class:`mixscvi.MixSCVI` that compare the expression of groups of cells.

    The model provides ``adata``, ``_validate_anndata``, ``_make_data_loader``, ``_check_counts``
    and ``_known_batches``, and decodes expression.
    """

    @signed_as(SCVI.differential_expression)
    def differential_expression(self, *args: Any, **kwargs: Any) -> pd.DataFrame:
        """Differential expression between groups of cells; see ``SCVI.differential_expression``.

        Parameters
        ----------
        groupby
            Column of ``obs`` whose groups are compared: each of `group1`, all by default, with
            `group2`, by default all other cells.
        group1, group2
            Values of that column.
        idx1, idx2
            Instead of them, the cells: positions, a mask, or a query of ``obs``.
        subset_idx
            Cells, in the same way, to which `group1` and `group2` are confined. All others are of
            a group named ``"other"``; without `group2`, a group is compared with these as well.
        mode
            ``"vanilla"``: which of two cells, one of each group, expresses a gene more.
            ``"change"``: whether the log2 fold change between them exceeds `delta`.
        batch_correction
            Whether both cells are decoded as if they were of one batch.
        fdr_target
            Expected share of false ones among the genes that ``is_de_fdr_...`` calls.
        weights
            ``"adapted"``, beside those of scvi-tools: expression is drawn from the exact posterior
            of each cell, as in :meth:`get_normalized_expression`, whose options
            `importance_weighting_kwargs` holds. A cell's draws are kept, so however many
            comparisons and batches it takes part in, it is adapted anew only where one asks for
            more than 100 draws of it.
        *args, **kwargs
            These and others as in scvi-tools.

        Returns
        -------
        Table by comparison and gene. With ``mode="change"`` it has, among others, ``lfc_mean`` and
        ``lfc_std``, the log2 fold change; ``proba_de``, how probable a change is; and
        ``is_de_fdr_0.05``, whether the gene is called. In both modes ``raw_mean1`` and
        ``raw_mean2`` are means of the counts, and ``non_zeros_proportion1`` and
        ``non_zeros_proportion2`` the shares of cells with any.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        KeyError
            If `groupby` is no column of ``adata.obs``.
        TypeError, IndexError
            If `idx1`, `idx2` or `subset_idx` are no positions of cells, a mask or a query.
        ValueError
            If they choose no cell or leave none to compare with, `group1` or `group2` is no value
            of the column, or an argument of the test is out of range; or as
            :meth:`get_normalized_expression`.

        Warns
        -----
        UserWarning
            Of groups of the column that have no cells, or none in `subset_idx`: they are left out.

        Examples
        --------
        >>> import mixscvi, scvi
        >>> scvi.settings.seed = 0
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16, n_latent=2)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> table = model.differential_expression(
        ...     idx1=[0, 1], idx2=[2, 3], mode="change", weights="adapted", silent=True
        ... )
        >>> len(table)
        765
        """
        self._check_if_trained(warn=False)
        given = inspect.signature(super().differential_expression).bind(*args, **kwargs)
        if isinstance(given.arguments.get("group1"), Iterator):
            given.arguments["group1"] = [*given.arguments["group1"]]
        if self.adata is None and given.arguments.get("dataloader") is None:
            self._validate_anndata(given.arguments.get("adata"))  # knows why there may be none
        given.arguments.update(self._checked_groups(given.arguments))
        with self._without_temporary_column(given.arguments.get("adata")):
            return self._compare(given)

    @contextmanager
    def _without_temporary_column(self, adata: AnnData | None) -> Iterator[None]:
        """Take out the column of ``obs`` that scvi-tools leaves there where it is interrupted."""
        obs = getattr(self.adata if adata is None else adata, "obs", None)
        try:
            yield
        finally:
            if isinstance(obs, pd.DataFrame) and _TEMPORARY in obs:
                del obs[_TEMPORARY]

    def _compare(self, given: inspect.BoundArguments) -> pd.DataFrame:
        if self._counts_are_on_disk(given.arguments):
            self._check_pseudocounts(given.arguments)
            if given.arguments.get("all_stats", True):
                return self._with_raw_counts(given)
        if given.arguments.get("weights") != "adapted":
            return super().differential_expression(*given.args, **given.kwargs)
        self._check_counts(given.arguments.get("adata"))
        draws = DrawsOfCells()
        given.arguments["importance_weighting_kwargs"] = {
            **({"progress": False} if given.arguments.get("silent") else {}),
            **(given.arguments.get("importance_weighting_kwargs") or {}),
            "known_draws": draws,
        }
        table = super().differential_expression(*given.args, **given.kwargs)
        if draws:
            warn_of_adapted_tails(np.array(list(draws.pareto_k.values())))
        return table

    def _checked_groups(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Which groups to compare, where scvi-tools would not find that out.

        Raises if it is not clear which cells to compare.
        """
        adata = self.adata if arguments.get("adata") is None else arguments["adata"]
        if adata is not None:
            check_anndata(adata)
        obs = getattr(adata, "obs", None)  # that of collections cannot be queried
        if not isinstance(obs, pd.DataFrame) or arguments.get("dataloader") is not None:
            return {}
        given = {**arguments, **arguments.get("kwargs", {})}
        check_comparison(obs, given, self._known_batches())
        return groups_to_compare(obs, given)

    def _counts_are_on_disk(self, arguments: Mapping[str, Any]) -> bool:
        no_data = self.adata is None and arguments.get("adata") is None
        if no_data or arguments.get("dataloader") is not None:
            return False
        adata = self._validate_anndata(arguments.get("adata"))
        return is_on_disk(self.get_anndata_manager(adata, required=True))

    def _check_pseudocounts(self, arguments: Mapping[str, Any]) -> None:
        """Raise if scvi-tools would estimate pseudocounts of the wrong cells.

        It selects the cells of a group by a mask, which collections take for the numbers 0 and 1.
        """
        adata = self.adata if arguments.get("adata") is None else arguments["adata"]
        pseudocounts = arguments.get("kwargs", {}).get("pseudocounts")
        if arguments.get("mode") == "change" and pseudocounts is None and not hasattr(adata, "X"):
            raise ValueError(
                "pseudocounts must be given for mode='change' on a collection, of whose counts "
                "they cannot be estimated: 1e-5, say, or what a table of some of the cells in "
                "memory has in its column of that name"
            )

    def _with_raw_counts(self, given: inspect.BoundArguments) -> pd.DataFrame:
        """Differential expression of cells on disk, whose counts do not fit into memory."""
        given.arguments["all_stats"] = False
        table = self.differential_expression(*given.args, **given.kwargs)
        adata = self._validate_anndata(given.arguments.get("adata"))
        return with_raw_counts(table, adata, self._make_data_loader(adata), given.arguments)
