"""Rows of registered data that lie on disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from anndata.abc import CSCDataset, CSRDataset
from scvi.data import AnnTorchDataset
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from scvi.data import AnnDataManager

__all__ = ["RowsOnDisk", "is_on_disk"]


def is_on_disk(manager: AnnDataManager) -> bool:
    """Whether some of the data are read from files when they are needed.

    scvi-tools' adapter of collections says that it is backed, whatever its parts.
    """
    return manager.adata.isbacked or any(
        isinstance(manager.get_from_registry(key), CSRDataset | CSCDataset | h5py.Dataset)
        for key in manager.data_registry
    )


class RowsOnDisk(Dataset):
    """Registered data on disk, by lists of cells.

    It gives the arrays that scvi-tools' dataset gives. Rows of CSR matrices in HDF5 are read in
    less time.

    Parameters
    ----------
    dataset
        scvi-tools' dataset.
    cells
        Which cells there are, and in which order, `(n,)`.
    sorts
        Whether the cells of a minibatch are sorted, as scvi-tools does. Otherwise they are in the
        order asked for, as those of data in memory.
    """

    def __init__(self, dataset: AnnTorchDataset, cells: np.ndarray, *, sorts: bool) -> None:
        self._cells, self._sorts = np.arange(len(dataset))[cells], sorts
        self._dtypes = dict(dataset.keys_and_dtypes)
        self._matrices = {
            key: _CsrFile(data)
            for key, data in dataset.data.items()
            if isinstance(data, CSRDataset) and isinstance(data.group, h5py.Group)
        }
        others = {k: v for k, v in self._dtypes.items() if k not in self._matrices}
        self._others = AnnTorchDataset(dataset.adata_manager, others)

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, positions: list[int]) -> dict[str, np.ndarray]:
        """A minibatch of the cells at some positions."""
        cells = self._cells[positions]
        # Files are read in their order, and each row once.
        cells, place = np.unique(cells, return_inverse=True)
        if self._sorts:
            place.sort()
        in_order = len(place) == len(cells) and bool((np.diff(place) > 0).all())
        rows: dict[str, np.ndarray] = self._others[cells]
        for key, matrix in self._matrices.items():
            rows[key] = matrix.rows(cells).astype(self._dtypes[key], copy=False)
        return {
            key: rows[key] if in_order else rows[key][place] for key in self._dtypes if key in rows
        }


class _CsrFile:
    """A CSR matrix in an HDF5 file, some rows of which are read at a time."""

    def __init__(self, matrix: CSRDataset) -> None:
        self._starts = matrix.group["indptr"][:].astype(np.int64, copy=False)
        self._columns, self._values = map(_Entries, (matrix.group["indices"], matrix.group["data"]))
        self._n_columns = matrix.shape[1]

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows in ascending order, dense, `(n, G)`."""
        start, stop = self._starts[rows], self._starts[rows + 1]
        # Rows that follow on each other are read in one go.
        first = np.flatnonzero(np.append(True, start[1:] != stop[:-1]))
        last = np.append(first[1:], len(rows)) - 1
        runs = list(zip(start[first].tolist(), stop[last].tolist(), strict=True))
        columns, values = self._columns.read(runs), self._values.read(runs)
        row = np.repeat(np.arange(len(rows)), stop - start)
        place = row * self._n_columns + columns
        dense = np.zeros(len(rows) * self._n_columns, dtype=values.dtype)
        np.add.at(dense, place, values)  # entries of one place are added up
        return dense.reshape(len(rows), self._n_columns)


class _Entries:
    """One of the arrays of a CSR matrix in a file."""

    def __init__(self, array: h5py.Dataset) -> None:
        self._array = array
        self._offsets = _offsets(array)
        self._n_in_chunk = len(array) if array.chunks is None else array.chunks[0]

    def read(self, runs: list[tuple[int, int]]) -> np.ndarray:
        """The entries from start to stop of each of some runs, one after the other."""
        if self._offsets is None:
            return np.concatenate([self._array[start:stop] for start, stop in runs])
        file, size = self._array.file.id.get_vfd_handle(), self._array.dtype.itemsize
        parts = []
        for start, stop in runs:
            while start < stop:
                # What lies in one chunk is in one piece.
                chunk, within = divmod(start, self._n_in_chunk)
                count = min(stop - start, self._n_in_chunk - within)
                offset = self._offsets[chunk] + within * size
                parts.append(os.pread(file, count * size, offset))
                start += count
        return np.frombuffer(b"".join(parts), dtype=self._array.dtype)


def _offsets(array: h5py.Dataset) -> list[int] | None:
    """Where in the file each chunk of an array starts; ``None`` if it must be read by HDF5.

    A minibatch is some hundred short reads, and most of the time that HDF5 takes for one does not
    go into reading. So arrays that are stored as they are, in a file that nobody writes to, are
    read straight from it.
    """
    file, stored = array.file, array.id.get_create_plist()
    plain = (
        hasattr(os, "pread")
        and (file.mode, file.driver, file.userblock_size) == ("r", "sec2", 0)
        and stored.get_nfilters() == 0
        and not (array.is_virtual or array.external)
        and array.dtype.kind in "iuf"
        and array.id.get_type().get_size() == array.dtype.itemsize
    )
    if not plain or not len(array):
        return None
    if array.chunks is None:
        start = array.id.get_offset()
        return None if start is None else [start]
    n_chunks = -(-len(array) // array.chunks[0])
    if array.id.get_num_chunks() != n_chunks or not hasattr(array.id, "chunk_iter"):
        return None
    offsets = [0] * n_chunks

    def note(chunk: Any) -> None:
        offsets[chunk.chunk_offset[0] // array.chunks[0]] = chunk.byte_offset

    array.id.chunk_iter(note)
    return offsets
