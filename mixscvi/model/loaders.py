"""Minibatches of registered data: scvi-tools' own, in less time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning import LightningDataModule
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.data import AnnTorchDataset
from scvi.dataloaders import AnnDataLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mixscvi import csr
from mixscvi.mixture.mostly_zero import MostlyZero, SparseRows
from mixscvi.mixture.nonzeros import MOST_NONZERO
from mixscvi.model.rows import RowsOnDisk, is_on_disk

__all__ = ["LeanDataLoader", "Minibatches", "TrainingLoader", "training_minibatches"]


class Minibatches(Dataset):
    """Registered data that lie in memory, by lists of cells.

    It gives the tensors that scvi-tools' dataset gives, in less time: what can be looked up or
    converted for all cells is not for each minibatch, and rows of sparse counts are put together
    by a compiled function.

    Parameters
    ----------
    dataset
        scvi-tools' dataset.
    cells
        Which cells there are, and in which order, `(n,)`.
    mostly_zero
        Whether sparse counts with few non-zeros become
        :class:`~mixscvi.mixture.mostly_zero.MostlyZero` instead of dense tensors.

    Raises
    ------
    TypeError
        If a field is neither an array, a data frame nor a CSR matrix in memory, or if sparse rows
        cannot be put together as numba compiles nothing.
    """

    def __init__(
        self, dataset: AnnTorchDataset, cells: np.ndarray, *, mostly_zero: bool = False
    ) -> None:
        self._cells = np.arange(len(dataset))[cells]
        self._mostly_zero = False
        self._dtypes = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._sparse: dict[str, sparse.csr_matrix | sparse.csr_array] = {}
        for key, dtype in dataset.keys_and_dtypes.items():
            data = dataset.data[key]
            if isinstance(data, pd.DataFrame):
                data = data.to_numpy()
            if isinstance(data, str) and key == REGISTRY_KEYS.MINIFY_TYPE_KEY:
                continue
            self._dtypes[key] = dtype
            if isinstance(data, np.ndarray):
                # Counts may be large: those of a minibatch are converted when it is made.
                self._arrays[key] = data if key == REGISTRY_KEYS.X_KEY else data.astype(dtype)
            elif isinstance(data, sparse.csr_matrix | sparse.csr_array) and csr.compiles():
                self._sparse[key] = data
                if key == REGISTRY_KEYS.X_KEY and mostly_zero:
                    size = np.prod(data.shape, dtype=float)
                    self._mostly_zero = bool(data.nnz <= MOST_NONZERO * size)
            else:
                raise TypeError(f"{key} is a {type(data).__name__}")

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, positions: list[int]) -> dict[str, Tensor]:
        """A minibatch of the cells at some positions."""
        cells = self._cells[positions]
        minibatch = {}
        for key, dtype in self._dtypes.items():
            if key in self._sparse:
                by_nonzeros = key == REGISTRY_KEYS.X_KEY and self._mostly_zero
                minibatch[key] = _rows(self._sparse[key], cells, dtype, by_nonzeros=by_nonzeros)
            else:
                rows = self._arrays[key][cells].astype(dtype, copy=False)
                minibatch[key] = torch.from_numpy(rows)
        return minibatch


def _rows(
    matrix: sparse.csr_matrix | sparse.csr_array,
    cells: np.ndarray,
    dtype: type,
    *,
    by_nonzeros: bool,
) -> Tensor:
    """Rows of a matrix."""
    arguments = (cells, matrix.indptr, matrix.indices, matrix.data, matrix.shape[1], dtype)
    if by_nonzeros:
        entries = csr.sparse_rows(*arguments)
        if entries is not None:
            return MostlyZero(SparseRows(*map(torch.from_numpy, entries)), matrix.shape[1])
    dense = csr.dense_rows(*arguments)
    if dense is None:  # numba failed at this function alone, or does not know the type
        dense = matrix[cells].astype(dtype, copy=False).toarray()
    return torch.from_numpy(dense)


class LeanDataLoader(AnnDataLoader):
    """scvi-tools' loader, to the same minibatches in less time if the data allow it.

    The sampler is scvi-tools', and random numbers are drawn alike. Data in memory with worker
    processes or a collation of their own, and sparse tensors are left to scvi-tools.

    Of data on disk, scvi-tools sorts the cells of each minibatch, and results for cells in another
    order would be those of others. Here they are in the order asked for.
    """

    _sorts = False
    # Set before minibatches are asked for; see `Minibatches`.
    mostly_zero = False

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Go through the minibatches once."""
        return super().__iter__() if self._lean is None else iter(self._lean)

    @cached_property
    def _lean(self) -> DataLoader | None:
        dataset = self.dataset.dataset  # of all cells; the loader's own remaps positions
        if (
            type(dataset) is not AnnTorchDataset
            or dataset.load_sparse_tensor
            or self.batch_size is not None
        ):
            return None
        if is_on_disk(dataset.adata_manager):
            rows = RowsOnDisk(dataset, self.indices, sorts=self._sorts)
            return DataLoader(rows, **{**self.kwargs, "generator": self.generator})
        if self.num_workers > 0 or "collate_fn" in self.kwargs:
            return None
        try:
            minibatches = Minibatches(dataset, self.indices, mostly_zero=self.mostly_zero)
        except TypeError:  # data of other kinds are scvi-tools' to read
            return None
        return DataLoader(
            minibatches,
            batch_size=None,
            sampler=self.sampler,
            pin_memory=self.pin_memory,
            generator=self.generator,
        )


class TrainingLoader(LeanDataLoader):
    """A loader for training, of scvi-tools' very minibatches: sorted where they are on disk."""

    _sorts = True


def training_minibatches(datamodule: LightningDataModule, device: torch.device) -> Iterator[Any]:
    """Minibatches of the training cells, as the steps of a training are given them.

    Parameters
    ----------
    datamodule
        scvi-tools' splitter or the user's own, set up. Streams that are read once lose them.
    device
        Where they are to be.
    """
    for tensors in datamodule.train_dataloader():
        tensors = datamodule.on_before_batch_transfer(tensors, 0)
        tensors = datamodule.transfer_batch_to_device(tensors, device, 0)
        yield datamodule.on_after_batch_transfer(tensors, 0)
