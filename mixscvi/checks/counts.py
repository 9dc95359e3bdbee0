"""Checks of counts."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from mixscvi.checks.annotation import FINITE, is_finite, name_cells
from mixscvi.checks.compressed import check_compressed, check_places

__all__ = ["check_counts", "check_numbers", "has_fractions", "is_in_memory"]

# Entries, were the counts dense.
_AT_ONCE = 2**22
_LOOKED_AT = 1_000
_IN_MEMORY = (
    np.ndarray, sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix, sparse.csc_array
)  # fmt: skip


def check_numbers(x: Any, obs_names: pd.Index, var_names: pd.Index, *, source: str) -> None:
    """Raise if a matrix does not hold numbers.

    Parameters
    ----------
    x
        `(n, G)`, of any kind that has a ``dtype``.
    obs_names, var_names
        Names of the cells and genes.
    source
        Name of the matrix for the message.

    Raises
    ------
    TypeError
        If its type is not that of real numbers, with the first cell and gene that is none.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> check_numbers(np.array([["3"]]), pd.Index(["AAC"]), pd.Index(["CD4"]), source="adata.X")
    Traceback (most recent call last):
    ...
    TypeError: adata.X must hold numbers, but is of type <U1: first '3' of cell 'AAC', gene 'CD4'
    """
    if x.dtype.kind in "biuf":
        return
    first = ""
    for i in range(len(obs_names) if isinstance(x, np.ndarray) else 0):
        wrong = [j for j, value in enumerate(x[i]) if not isinstance(value, numbers.Real)]
        if wrong:
            value = x[i, wrong[0]]
            value = value.item() if isinstance(value, np.generic) else value
            gene = str(var_names[wrong[0]])
            first = f": first {value!r} of cell {str(obs_names[i])!r}, gene {gene!r}"
            break
    else:
        first = f": convert it, as with {source}.astype('float32')"
    raise TypeError(f"{source} must hold numbers, but is of type {x.dtype}{first}")


def check_counts(
    x: Any,
    obs_names: pd.Index,
    *,
    source: str,
    above: float | None = None,
    allow_empty: bool = False,
) -> None:
    """Raise if a model of counts cannot be trained on these values.

    Parameters
    ----------
    x
        Counts, `(n, G)`: dense, sparse, or backed by a file; read some at a time.
    obs_names
        Names of the cells.
    source
        Name of the counts for the message: ``"adata.X"`` or ``"adata.layers['counts']"``.
    above
        What values must exceed where negative ones are meaningful (the normal likelihood); by
        default none may be negative.
    allow_empty
        Whether the values of a cell may sum to zero or less (no library size is taken from them).

    Raises
    ------
    ValueError
        If there are negative values, ones that are NaN or infinite in single precision, or cells
        with no counts; or if they are sparse, and damaged.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> check_counts(np.array([[1.0, -2.0]]), pd.Index(["AAC"]), source="adata.X")
    Traceback (most recent call last):
    ...
    ValueError: adata.X has negative values in 1 of 1 cells, first: 'AAC': expected raw counts
    """
    check_compressed(x, source)
    if is_in_memory(x) and _are_counts(x, above=above, allow_empty=allow_empty):
        return
    n_cells = len(obs_names)
    not_finite = np.zeros(n_cells, dtype=bool)
    negative = np.zeros(n_cells, dtype=bool)
    total = np.zeros(n_cells)
    for cell, value in _entries(x, n_cells, source):
        finite = is_finite(value)
        if not finite.all():
            not_finite[cell[~finite]] = True
            cell, value = cell[finite], value[finite]
        negative[cell[value < 0 if above is None else value <= above]] = True
        if len(cell):
            first = cell.min()
            of_cell = np.bincount(cell - first, value)
            total[first : first + len(of_cell)] += of_cell
    not_finite |= ~is_finite(total)
    empty = total <= 0
    for offending, what, expected in (
        (not_finite, "NaN or infinite values", f"finite counts, {FINITE}"),
        (
            negative,
            "negative values" if above is None else f"values of {above:g} or less",
            "raw counts" if above is None else f"values above {above:g}",
        ),
        (
            empty & (not allow_empty),
            "no counts at all" if above is None else "a sum of zero or less",
            "at least one count in each cell, for its library size; remove such cells with "
            "scanpy.pp.filter_cells(adata, min_counts=1)",
        ),
    ):
        if offending.any():
            raise ValueError(
                f"{source} has {what} in {name_cells(obs_names, np.flatnonzero(offending))}: "
                f"expected {expected}"
            )


def is_in_memory(x: Any) -> bool:
    """Whether a matrix is one of NumPy's or a compressed one of SciPy's, which a look can go over.

    Collections of files make subclasses of these, which have few of their methods.

    Examples
    --------
    >>> is_in_memory(np.ones((2, 3))), is_in_memory([[1.0]])
    (True, False)
    """
    return type(x) in _IN_MEMORY


def has_fractions(x: np.ndarray | sparse.spmatrix | sparse.sparray) -> bool:
    """Whether some of the values of a matrix in memory are no whole numbers, at a look.

    Parameters
    ----------
    x
        Counts, `(n, G)`, of which a thousand are looked at, evenly spaced.

    Examples
    --------
    >>> has_fractions(np.array([[0.0, 3.0]])), has_fractions(np.array([[0.0, 0.5]]))
    (False, True)
    """
    values = _values(x)
    some = np.linspace(0, values.size - 1, min(values.size, _LOOKED_AT), dtype=int)
    return bool(np.any(values.flat[some] % 1 != 0))


def _values(x: np.ndarray | sparse.spmatrix | sparse.sparray) -> np.ndarray:
    """Values of a matrix in memory, those that are stored."""
    return np.asarray(x.data) if sparse.issparse(x) else x


def _are_counts(x: Any, *, above: float | None, allow_empty: bool) -> bool:
    """Whether a matrix in memory has nothing wrong; if not, its entries have to be looked at."""
    values = _values(x)
    if not values.dtype.isnative or values.dtype.char in "eg" or values.dtype.kind not in "iuf":
        return False  # half and extended precision among them
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.asarray(x.sum(axis=1))
    if not is_finite(total).all() or (not allow_empty and np.any(total <= 0)):
        return False
    if values.size == 0:
        return True
    least = values.min()
    if not is_finite(np.array([least, values.max()])).all():
        return False
    return bool(least >= 0 if above is None else least > above)


def _entries(x: Any, n_cells: int, source: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cells and values of the entries that are not zero, or are stored; some at a time."""
    if getattr(x, "format", "csr") not in ("csr", "csc"):
        x = x.tocsr()  # others have no rows to slice
    by_gene = getattr(x, "format", None) == "csc"  # each of its rows would take all of them
    # Collections of files have no shape, but their rows have.
    n, n_across = x.shape[::-1] if by_gene else (n_cells, x[:1].shape[1])
    step = max(1, _AT_ONCE // n_across)
    for start in range(0, n, step):
        some = slice(start, min(start + step, n))
        block = x[:, some] if by_gene else x[some]
        check_places(block, source)
        if block.dtype.kind == "f" and block.dtype.itemsize not in (4, 8):
            block = block.astype(np.float64)  # which SciPy and NumPy can count
        elif not block.dtype.isnative:  # of another byte order, of which SciPy has no matrices
            block = block.astype(block.dtype.newbyteorder("="))
        if not sparse.issparse(block):
            block = sparse.csr_matrix(np.asarray(block))
        block = block.tocoo()
        yield block.row + (0 if by_gene else start), block.data
