"""Checks of user input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

__all__ = [
    "check_choice",
    "check_counts",
    "check_finite",
    "check_genes",
    "check_positive",
    "check_positive_int",
]

_ROWS_AT_ONCE = 8192
_NAMES_SHOWN = 5


def check_positive_int(name: str, value: Any, *, least: int = 1) -> int:
    """Return `value` as an int.

    Raises
    ------
    TypeError
        If it is not an integer.
    ValueError
        If it is less than `least`.

    Examples
    --------
    >>> check_positive_int("n_components", 4)
    4
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return `value`, which must be one of `choices`.

    Raises
    ------
    ValueError
        If it is not.

    Examples
    --------
    >>> check_choice("prior", "mog", ("normal", "mog"))
    'mog'
    """
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {expected}, got {value!r}")
    return value


def _name_cells(obs_names: pd.Index, offending: np.ndarray) -> str:
    names = ", ".join(repr(str(name)) for name in obs_names[offending[:_NAMES_SHOWN]])
    more = f" and {len(offending) - _NAMES_SHOWN} more" if len(offending) > _NAMES_SHOWN else ""
    return f"{len(offending)} of {len(obs_names)} cells, first: {names}{more}"


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
        Counts, `(n, G)`: dense, sparse, or backed by a file; read in slices of rows.
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
        If there are NaN, infinite or negative values, or cells with no counts.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> check_counts(np.array([[1.0, -2.0]]), pd.Index(["AAC"]), source="adata.X")
    Traceback (most recent call last):
    ...
    ValueError: adata.X has negative values in 1 of 1 cells, first: 'AAC': expected raw counts
    """
    n_cells = len(obs_names)
    not_finite = np.zeros(n_cells, dtype=bool)
    negative = np.zeros(n_cells, dtype=bool)
    empty = np.zeros(n_cells, dtype=bool)
    for start in range(0, n_cells, _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, n_cells))
        block = x[rows]
        block = block.tocsr() if sparse.issparse(block) else sparse.csr_matrix(np.asarray(block))
        row_of = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
        not_finite[rows][row_of[~np.isfinite(block.data)]] = True
        too_small = block.data < 0 if above is None else block.data <= above
        negative[rows][row_of[too_small]] = True
        empty[rows] = np.asarray(block.sum(axis=1)).ravel() <= 0
    for offending, what, expected in (
        (not_finite, "NaN or infinite values", "finite counts"),
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
                f"{source} has {what} in {_name_cells(obs_names, np.flatnonzero(offending))}: "
                f"expected {expected}"
            )


def check_finite(table: pd.DataFrame, *, source: str) -> None:
    """Raise if covariates are NaN or infinite.

    Raises
    ------
    ValueError
        Naming the column and the first offending cells.

    Examples
    --------
    >>> import pandas as pd
    >>> check_finite(pd.DataFrame({"age": [1.0, 2.0]}), source="adata.obs")
    """
    for column in table:
        offending = np.flatnonzero(~np.isfinite(table[column].to_numpy(dtype=float)))
        if len(offending):
            raise ValueError(
                f"{source}[{column!r}] is NaN or infinite in {_name_cells(table.index, offending)}"
            )


def check_positive(values: np.ndarray, obs_names: pd.Index, *, source: str) -> None:
    """Raise if per-cell factors are not positive and finite.

    Raises
    ------
    ValueError
        Naming the first offending cells.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> check_positive(np.array([1.0, 0.5]), pd.Index(["AAC", "AAG"]), source="obs['size']")
    """
    values = np.asarray(values, dtype=float).ravel()
    offending = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(offending):
        raise ValueError(
            f"{source} must be positive and finite, but is not in "
            f"{_name_cells(obs_names, offending)}"
        )


def check_genes(var_names: Sequence[str], trained_on: Sequence[str]) -> None:
    """Raise if the genes are not those the model was trained on, in the same order.

    Raises
    ------
    ValueError
        Naming what is missing, or the first gene out of place.

    Examples
    --------
    >>> check_genes(["CD4", "CD8A"], ["CD4", "CD8A"])
    """
    given, expected = [str(g) for g in var_names], [str(g) for g in trained_on]
    if given == expected:
        return
    missing = list((Counter(expected) - Counter(given)).elements())
    surplus = list((Counter(given) - Counter(expected)).elements())
    if missing:
        detail = f"{len(missing)} genes are missing, first: {', '.join(missing[:_NAMES_SHOWN])}"
    elif surplus:
        detail = f"it has {len(surplus)} other genes, first: {', '.join(surplus[:_NAMES_SHOWN])}"
    else:
        place = next(i for i, (a, b) in enumerate(zip(given, expected, strict=True)) if a != b)
        detail = f"they are in another order, first at {place}: {given[place]}, expected "
        detail += expected[place]
    raise ValueError(
        f"adata has {len(given)} genes that are not the {len(expected)} the model was trained on: "
        f"{detail}. Subset and reorder with adata[:, model.get_var_names()]"
    )
