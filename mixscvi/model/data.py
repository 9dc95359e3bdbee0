"""The data that a model trains on: checked, and split into minibatches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scvi import REGISTRY_KEYS
from scvi.dataloaders import DataSplitter

from mixscvi.checks import (
    check_counts,
    check_finite,
    check_positive,
    has_fractions,
    is_in_memory,
)
from mixscvi.model.distributed import SplitAlike
from mixscvi.model.loaders import TrainingLoader

if TYPE_CHECKING:
    from scvi.data import AnnDataManager
    from scvi.module import VAE
    from torch.utils.data import DataLoader

__all__ = [
    "MINIFY_UNS_KEY",
    "LeanDataSplitter",
    "WithoutSingleCells",
    "check_data",
    "counts_have_fractions",
    "name_counts",
]

# Where scvi-tools notes in ``adata.uns`` that the data are minified.
MINIFY_UNS_KEY = "_scvi_adata_minify_type"


class LeanDataSplitter(SplitAlike, DataSplitter):
    """scvi-tools' splitter, to the same minibatches in less time if the data allow it.

    Several ranks split the cells alike, and shuffle them by the user's seed.
    """

    data_loader_cls = TrainingLoader

    def train_dataloader(self) -> DataLoader:
        """Minibatches of the training cells."""
        loader = super().train_dataloader()
        plan = getattr(self.trainer, "lightning_module", None)
        loader.mostly_zero = getattr(plan, "takes_nonzeros", False)
        return loader


class WithoutSingleCells(LeanDataSplitter):
    """scvi-tools' splitter, which leaves a last training minibatch of one cell out.

    Batch normalization has no variance to divide by in such a minibatch, and training would stop.
    Shuffling makes it another cell in every epoch.
    """

    def train_dataloader(self) -> DataLoader:
        """Minibatches of the training cells."""
        batch_size = self.data_loader_kwargs.get("batch_size")
        n_train = math.ceil(self.n_train / self._n_ranks)  # the sampler gives each as many
        given = self.drop_last
        if n_train > 1 and n_train % batch_size == 1:
            self.drop_last = True
        try:
            return super().train_dataloader()
        finally:  # a splitter may be set up again, for other cells
            self.drop_last = given


def name_counts(manager: AnnDataManager) -> str:
    """Where the counts are, for messages."""
    layer = manager.data_registry[REGISTRY_KEYS.X_KEY].attr_key
    return "adata.X" if layer is None else f"adata.layers[{layer!r}]"


def counts_have_fractions(manager: AnnDataManager) -> bool | None:
    """Whether counts are no whole numbers, at a look; ``None`` if they are not in memory."""
    x = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
    return has_fractions(x) if is_in_memory(x) else None


def check_data(manager: AnnDataManager, module: VAE) -> None:
    """Raise if a model cannot use the registered counts, covariates or size factors.

    Parameters
    ----------
    manager
        Of the data.
    module
        Says which values its likelihood takes, and where library sizes come from.

    Raises
    ------
    ValueError
        Naming the field and the first offending cells.
    """
    adata = manager.adata
    scaled_by_factor = REGISTRY_KEYS.SIZE_FACTOR_KEY in manager.data_registry
    above = None
    if module.gene_likelihood == "normal":
        above = -1.0 if module.log_variational else -np.inf
    check_counts(
        manager.get_from_registry(REGISTRY_KEYS.X_KEY),
        adata.obs_names,
        source=name_counts(manager),
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
