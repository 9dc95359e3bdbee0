"""The data of a semi-supervised model: checked, and split into minibatches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scvi import REGISTRY_KEYS, settings
from scvi.dataloaders import SemiSupervisedDataSplitter
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["LabeledSplitter", "check_labels", "known_labels"]


def check_labels(
    adata: AnnData,
    labels_key: Any,
    unlabeled_category: Any,
    source_registry: Mapping[str, Any] | None,
) -> None:
    """Raise if a semi-supervised model cannot learn from labels, or does not know them.

    Parameters
    ----------
    adata, labels_key, unlabeled_category
        As in :meth:`mixscvi.MixSCANVI.setup_anndata`.
    source_registry
        Of the model that the data are for, if there is one.

    Raises
    ------
    TypeError
        If a key is missing.
    ValueError
        If there are fewer than two labels, or some that the model was not trained on.
    """
    if labels_key is None:
        raise TypeError("labels_key must name a column of adata.obs with labels, got None")
    if unlabeled_category is None or pd.isna(unlabeled_category):
        raise TypeError(
            "unlabeled_category must be the value of adata.obs[labels_key] in cells without a "
            f"label, such as 'Unknown', got {unlabeled_category!r}"
        )
    if not isinstance(adata.obs, pd.DataFrame) or labels_key not in adata.obs:
        return
    found = [y for y in adata.obs[labels_key].unique().tolist() if y != unlabeled_category]
    source = f"adata.obs[{labels_key!r}]"
    if source_registry is not None:
        state = source_registry["field_registries"][REGISTRY_KEYS.LABELS_KEY]["state_registry"]
        known = np.asarray(state["categorical_mapping"]).tolist()
        unknown = [y for y in found if y not in known]
        if unknown:
            raise ValueError(
                f"{source} has labels that the model was not trained on, {unknown}: replace them "
                f"by unlabeled_category={unlabeled_category!r}"
            )
    elif len(found) < 2:
        raise ValueError(
            f"{source} must have at least two labels beside unlabeled_category="
            f"{unlabeled_category!r}, got {found}"
        )


def known_labels(mapping: np.ndarray, unlabeled_category: Any) -> list[Any]:
    """The labels of a registry, in the order of their codes, without that of unlabeled cells."""
    return [y for y in np.asarray(mapping).tolist() if y != unlabeled_category]


class LabeledSplitter(SemiSupervisedDataSplitter):
    """scvi-tools' splitter, without training minibatches of one cell.

    Batch normalization has no variance to divide by in such a minibatch, and training would stop.
    All cells, or those with labels, may leave a last minibatch of one: then all minibatches are
    made larger by a cell, or by as many as it takes.

    Raises
    ------
    ValueError
        If a single training cell has a label.
    """

    def train_dataloader(self) -> DataLoader:
        """Minibatches of the training cells: all, and those with labels."""
        loader = super().train_dataloader()
        counts = [len(part.indices) for part in getattr(loader, "dataloaders", [loader])]
        if counts[-1] == 1 and len(counts) > 1:
            raise ValueError(
                "one training cell has a label, and batch normalization needs two: label more "
                "cells, give train_size=1.0, or use_batch_norm='none'"
            )
        if self.drop_last:
            return loader
        given = self.data_loader_kwargs.get("batch_size") or settings.batch_size
        batch_size = given
        while batch_size > 1 and any(n % batch_size == 1 for n in counts):
            batch_size += 1
        if batch_size == given:
            return loader
        self.data_loader_kwargs["batch_size"] = batch_size
        return super().train_dataloader()
