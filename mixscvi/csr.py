"""Some rows of compressed sparse matrices in memory."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from mixscvi import compiled

__all__ = ["compiles", "dense_rows", "sparse_rows"]

_KERNELS = "mixscvi.csr_kernels"
_MOST_BYTES = 8  # of a real number that numba knows


def compiles() -> bool:
    """Whether rows can be taken by compiled functions, as far as is known.

    Examples
    --------
    >>> compiles()
    True
    """
    return compiled.load(_KERNELS) is not None


def _kernels_for(rows: np.ndarray, indptr: np.ndarray, data: np.ndarray) -> ModuleType | None:
    """What takes these rows, if they are rows; ``None`` if nothing can that is compiled."""
    kernels = compiled.load(_KERNELS)
    if kernels is None or data.dtype.itemsize > _MOST_BYTES:
        return None
    if rows.size and not (0 <= rows.min() and rows.max() < len(indptr) - 1):
        raise IndexError(f"rows must lie in [0, {len(indptr) - 1})")
    return kernels


def _check_columns(inside: bool, n_columns: int) -> None:
    if not inside:
        raise IndexError(f"the matrix of {n_columns} columns has entries in others")


def dense_rows(
    rows: np.ndarray,
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    n_columns: int,
    dtype: type,
) -> np.ndarray | None:
    """Some rows of a CSR matrix, `(len(rows), n_columns)`.

    There are none, but ``None``, if it cannot be compiled, or the data are of a type that numba
    does not know.

    Parameters
    ----------
    rows
        Which rows, in which order.
    indptr, indices, data
        The matrix, its indices of any integer type; entries of one place are added up.
    n_columns
        Of the matrix.
    dtype
        Of the result.

    Raises
    ------
    IndexError
        If a row or a column is not one of the matrix.

    Examples
    --------
    >>> indptr, indices, data = np.array([0, 1, 3]), np.array([1, 0, 2]), np.array([3, 1, 2])
    >>> dense_rows(np.array([1, 1]), indptr, indices, data, 3, np.float32)
    array([[1., 0., 2.],
           [1., 0., 2.]], dtype=float32)
    """
    kernels = _kernels_for(rows, indptr, data)
    if kernels is None:
        return None
    out: np.ndarray = np.zeros((len(rows), n_columns), dtype)
    inside = compiled.attempt(kernels.add_rows, rows, indptr, indices, data, out)
    if inside is None:
        return None
    _check_columns(inside, n_columns)
    return out


def sparse_rows(
    rows: np.ndarray,
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    n_columns: int,
    dtype: type,
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The same rows by their entries, or ``None`` if they are not in order.

    Columns must rise in each row, none twice. Nor are there rows if it cannot be compiled, or the
    data are of a type that numba does not know.

    Parameters
    ----------
    rows, indptr, indices, data, n_columns, dtype
        As in :func:`dense_rows`.

    Returns
    -------
    starts
        Where the entries of each row start, and where the last one's end, `(len(rows) + 1,)`.
    columns, values
        Of the entries, `(n,)`, in the order of the matrix.

    Raises
    ------
    IndexError
        If a row or a column is not one of the matrix.

    Examples
    --------
    >>> indptr, indices, data = np.array([0, 1, 3]), np.array([1, 0, 2]), np.array([3, 1, 2])
    >>> sparse_rows(np.array([1]), indptr, indices, data, 3, np.float32)
    (array([0, 2]), array([0, 2]), array([1., 2.], dtype=float32))
    """
    kernels = _kernels_for(rows, indptr, data)
    if kernels is None:
        return None
    n = int((indptr[rows + 1] - indptr[rows]).sum())
    starts, columns = np.empty(len(rows) + 1, np.int64), np.empty(n, np.int64)
    values: np.ndarray = np.empty(n, dtype)
    arrays = (indptr, indices, data, n_columns, starts, columns, values)
    rising, inside = compiled.attempt(kernels.copy_rows, rows, *arrays) or (False, True)
    _check_columns(inside, n_columns)
    return (starts, columns, values) if rising else None
