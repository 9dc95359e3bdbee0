"""Checks of sparse matrices, which SciPy believes."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

__all__ = ["check_compressed", "check_places"]

_AT_ONCE = 2**22  # indices that are read from a file


def check_compressed(x: Any, source: str) -> None:
    """Raise if the rows of a sparse matrix, in memory or in a file, do not lie one after the other.

    SciPy looks at none of it, and reads and writes what lies elsewhere. Of rows in a file, the
    places of values are looked at where they are read; see :func:`check_places`.

    Parameters
    ----------
    x
        Any matrix; all but compressed ones pass, and so does what stands for several of them.
    source
        Its name for the message.

    Raises
    ------
    ValueError
        If it is damaged.

    Examples
    --------
    >>> x = sparse.csr_matrix([[1.0, 0.0], [0.0, 2.0]])
    >>> check_compressed(x, "adata.X")
    >>> x.indptr = x.indptr[::-1].astype("uint32")
    >>> check_compressed(x, "adata.X")
    Traceback (most recent call last):
    ...
    ValueError: adata.X is damaged: its rows do not lie one after the other, first at 0 of 2
    """
    parts = _parts(x)
    if parts is None:
        return
    data, indices, indptr = parts
    for name, part in (("data", data), ("indices", indices), ("indptr", indptr)):
        if part.ndim != 1 or (part is not data and part.dtype.kind not in "iu"):
            raise ValueError(
                f"{source} is damaged: its {name} are of the type {part.dtype} and the shape "
                f"{part.shape}"
            )
    what = "rows" if x.format == "csr" else "columns"
    n = x.shape[0] if x.format == "csr" else x.shape[1]
    # Not by their differences: those of unsigned numbers are never negative.
    (wrong,) = np.nonzero(indptr[1:] < indptr[:-1])
    if len(indptr) != n + 1 or indptr[0] != 0 or len(wrong):
        at = wrong[0] if len(wrong) else 0
        raise ValueError(
            f"{source} is damaged: its {what} do not lie one after the other, first at {at} of {n}"
        )
    for name, part in (("values", data), ("indices", indices)):
        if indptr[-1] > len(part):
            raise ValueError(
                f"{source} is damaged: its {what} have {indptr[-1]} {name}, and {len(part)} are "
                "there"
            )
    if sparse.issparse(x):
        check_places(x, source)
    elif x.format == "csc":  # whose rows SciPy gathers before anything can be looked at
        for start in range(0, int(indptr[-1]), _AT_ONCE):
            _check_within(indices[start : min(start + _AT_ONCE, indptr[-1])], x, source)


def check_places(x: Any, source: str) -> None:
    """Raise if values of a compressed matrix in memory are outside of its shape.

    Parameters
    ----------
    x
        A matrix in memory; all but compressed ones pass.
    source
        Its name for the message.

    Raises
    ------
    ValueError
        If it is damaged.

    Examples
    --------
    >>> x = sparse.csr_matrix([[1.0, 0.0], [0.0, 2.0]])
    >>> x.indices[0] = 7
    >>> check_places(x, "adata.X")
    Traceback (most recent call last):
    ...
    ValueError: adata.X is damaged: it has values outside its shape (2, 2)
    """
    parts = _parts(x)
    if parts is None or not sparse.issparse(x):
        return
    _, indices, indptr = parts
    _check_within(indices[: indptr[-1]], x, source)


def _check_within(indices: np.ndarray, x: Any, source: str) -> None:
    """Raise if some of a matrix's indices are outside of its shape."""
    n_across = x.shape[1] if x.format == "csr" else x.shape[0]
    if len(indices) and not (0 <= indices.min() and indices.max() < n_across):
        raise ValueError(f"{source} is damaged: it has values outside its shape {x.shape}")


def _parts(x: Any) -> tuple[Any, Any, np.ndarray] | None:
    """Data, indices and pointers of a compressed matrix, the first two perhaps in a file."""
    if getattr(x, "format", None) not in ("csr", "csc"):
        return None
    if sparse.issparse(x):
        # A collection of files makes something that passes for a matrix, and has no pointers.
        return (x.data, x.indices, x.indptr) if hasattr(x, "indptr") else None
    group = getattr(x, "group", None)  # of a file that anndata reads
    if group is None:
        return None
    return group["data"], group["indices"], group["indptr"][:]
