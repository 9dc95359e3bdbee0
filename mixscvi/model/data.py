"""The data that a model trains on: checked, and split into minibatches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.data import AnnTorchDataset
from scvi.dataloaders import AnnDataLoader, DataSplitter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mixscvi.checks import check_counts, check_finite, check_positive
from mixscvi.model.distributed import n_ranks, of_first_rank

if TYPE_CHECKING:
    from scvi.data import AnnDataManager
    from scvi.module import VAE

__all__ = [
    "MINIFY_UNS_KEY",
    "LeanDataSplitter",
    "Minibatches",
    "WithoutSingleCells",
    "check_data",
]

# Where scvi-tools notes in ``adata.uns`` that the data are minified.
MINIFY_UNS_KEY = "_scvi_adata_minify_type"


class Minibatches(Dataset):
    """Registered data that lie in memory, by lists of cells.

    It gives the tensors that scvi-tools' dataset gives, in less time: what can be looked up or
    converted for all cells is not for each minibatch.

    Parameters
    ----------
    dataset
        scvi-tools' dataset.
    cells
        Which cells there are, and in which order, `(n,)`.

    Raises
    ------
    TypeError
        If a field is neither an array, a data frame nor a CSR matrix in memory.
    """

    def __init__(self, dataset: AnnTorchDataset, cells: np.ndarray) -> None:
        self._cells = np.asarray(cells)
        self._arrays: dict[str, np.ndarray] = {}
        self._sparse: dict[str, tuple[Tensor, Tensor, Tensor, int]] = {}
        for key, dtype in dataset.keys_and_dtypes.items():
            data = dataset.data[key]
            if isinstance(data, pd.DataFrame):
                data = data.to_numpy()
            if isinstance(data, np.ndarray):
                # Counts may be large: those of a minibatch are converted when it is made.
                self._arrays[key] = data if key == REGISTRY_KEYS.X_KEY else data.astype(dtype)
            elif isinstance(data, sparse.csr_matrix):
                values = data.data.astype(dtype, copy=False)
                parts = (data.indptr.astype(np.int64), data.indices, values)
                self._sparse[key] = (*map(torch.from_numpy, parts), data.shape[1])
            else:
                raise TypeError(f"{key} is a {type(data).__name__}")
        self._dtypes = dataset.keys_and_dtypes

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, positions: list[int]) -> dict[str, Tensor]:
        """A minibatch of the cells at some positions."""
        cells = self._cells[positions]
        minibatch = {}
        for key, dtype in self._dtypes.items():
            if key in self._sparse:
                minibatch[key] = _dense_rows(torch.from_numpy(cells), *self._sparse[key])
            else:
                rows = self._arrays[key][cells].astype(dtype, copy=False)
                minibatch[key] = torch.from_numpy(rows)
        return minibatch


def _dense_rows(
    rows: Tensor, indptr: Tensor, indices: Tensor, data: Tensor, n_columns: int
) -> Tensor:
    """Rows of a CSR matrix, entries of one place added up."""
    start = indptr[rows]
    n_entries = indptr[rows + 1] - start
    row = torch.repeat_interleave(n_entries)
    first = n_entries.cumsum(0) - n_entries
    entry = torch.arange(len(row)) + (start - first)[row]
    dense = data.new_zeros(len(rows) * n_columns)
    dense.scatter_add_(0, row * n_columns + indices[entry], data[entry])
    return dense.view(len(rows), n_columns)


class LeanDataSplitter(DataSplitter):
    """scvi-tools' splitter, whose training minibatches take less time if the data allow it.

    They are the same minibatches: the sampler is scvi-tools'. Several ranks split the cells alike,
    and shuffle them by the user's seed.
    """

    def setup(self, stage: str | None = None) -> None:
        """Split the cells into training, validation and test."""
        super().setup(stage)
        if n_ranks() > 1:
            # Without a seed, each would draw a split of its own.
            split = self.train_idx, self.val_idx, self.test_idx, int(torch.randint(2**31, ()))
            split = of_first_rank(split)
            self.train_idx, self.val_idx, self.test_idx, self.shuffle_seed = split

    def train_dataloader(self):
        """Minibatches of the training cells."""
        loader = super().train_dataloader()
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.seed = self.shuffle_seed
        in_memory = not self.adata_manager.adata.isbacked and not self.load_sparse_tensor
        if type(loader) is not AnnDataLoader or loader.num_workers > 0 or not in_memory:
            return loader
        try:
            dataset = Minibatches(self.adata_manager.create_torch_dataset(), loader.indices)
        except TypeError:  # data of other kinds are scvi-tools' to read
            return loader
        return DataLoader(
            dataset, batch_size=None, sampler=loader.sampler, pin_memory=loader.pin_memory
        )


class WithoutSingleCells(LeanDataSplitter):
    """scvi-tools' splitter, which leaves a last training minibatch of one cell out.

    Batch normalization has no variance to divide by in such a minibatch, and training would stop.
    Shuffling makes it another cell in every epoch.
    """

    def train_dataloader(self):
        """Minibatches of the training cells."""
        batch_size = self.data_loader_kwargs.get("batch_size")
        n_train = math.ceil(self.n_train / n_ranks())  # the sampler gives each as many
        if n_train > 1 and n_train % batch_size == 1:
            self.drop_last = True
        return super().train_dataloader()


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
