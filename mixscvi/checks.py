"""Checks of user input."""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

__all__ = [
    "check_categories",
    "check_choice",
    "check_column",
    "check_counts",
    "check_finite",
    "check_genes",
    "check_indices",
    "check_numbers",
    "check_positive",
    "check_positive_int",
    "check_unique",
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
        first = ": convert it, as with adata.X.astype('float32')"
    raise TypeError(f"{source} must hold numbers, but is of type {x.dtype}{first}")


def check_column(obs: pd.DataFrame, key: Any, *, argument: str, numeric: bool = False) -> None:
    """Raise if a column of ``obs`` cannot be a covariate.

    Parameters
    ----------
    obs
        Annotation of the cells.
    key
        Name of the column.
    argument
        The argument that names it.
    numeric
        Whether its values must be numbers; otherwise they are categories.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If a category is missing.
    TypeError
        If numbers are expected, and it has others; or if categories are of types that have no
        common order.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> obs = pd.DataFrame({"batch": ["CTRL", np.nan]}, index=["AAC", "AAG"])
    >>> check_column(obs, "batch", argument="batch_key")
    Traceback (most recent call last):
    ...
    ValueError: batch_key: adata.obs['batch'] is missing (NaN) in 1 of 2 cells, first: 'AAG'
    """
    if key not in obs:
        raise KeyError(f"{argument}={key!r} is no column of adata.obs, which has {[*obs.columns]}")
    column = obs[key]
    if not numeric:
        missing = np.flatnonzero(column.isna())
        if len(missing):
            raise ValueError(
                f"{argument}: adata.obs[{key!r}] is missing (NaN) in "
                f"{_name_cells(obs.index, missing)}"
            )
        try:
            np.unique(column.to_numpy(dtype=object))
        except TypeError as error:  # what has no order cannot be coded
            types = column.map(type).astype(object)
            other = np.flatnonzero([kind is not types.iloc[0] for kind in types])
            raise TypeError(
                f"{argument}: adata.obs[{key!r}] mixes {types.iloc[0].__name__} with other types "
                f"in {_name_cells(obs.index, other)}: convert it, as with .astype(str)"
            ) from error
        return
    if pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return
    wrong = np.flatnonzero([not isinstance(value, numbers.Real) for value in column])
    cells = _name_cells(obs.index, wrong) if len(wrong) else f"all {len(obs)} cells"
    raise TypeError(
        f"{argument}: adata.obs[{key!r}] must hold numbers, but is of type {column.dtype} in "
        f"{cells}"
    )


def check_categories(column: pd.Series, known: Sequence[Any], *, source: str) -> None:
    """Raise if cells are of categories that a model was not trained on.

    Raises
    ------
    ValueError
        Naming the categories and the first offending cells.

    Examples
    --------
    >>> import pandas as pd
    >>> check_categories(pd.Series(["CTRL"]), ["CTRL", "STIM"], source="adata.obs['batch']")
    """
    unknown = ~column.isin(list(known)).to_numpy()
    if unknown.any():
        named = ", ".join(repr(value) for value in column[unknown].unique()[:_NAMES_SHOWN])
        shown = ", ".join(repr(value) for value in list(known)[:_NAMES_SHOWN])
        more = ", ..." if len(known) > _NAMES_SHOWN else ""
        raise ValueError(
            f"{source} is {named} in {_name_cells(column.index, np.flatnonzero(unknown))}, but the "
            f"model was trained on {shown}{more}: map new ones with MixSCVI.load_query_data"
        )


def check_indices(indices: Any, n_obs: int) -> None:
    """Raise if `indices` do not choose cells by position, or by a mask.

    Raises
    ------
    TypeError
        If they are names or other values than integers and booleans.
    ValueError
        If there are none.
    IndexError
        If one is out of range, or a mask is of another length.

    Examples
    --------
    >>> check_indices([0, 5], n_obs=6)
    >>> check_indices(["AAC"], n_obs=6)
    Traceback (most recent call last):
    ...
    TypeError: indices must be positions of cells or a mask, got 'AAC' first: take
    adata.obs_names.get_indexer(names)
    """
    given = np.asarray(indices)
    if given.size == 0 or (given.dtype.kind == "b" and not given.any()):
        raise ValueError("indices must choose at least one cell, got none")
    if given.dtype.kind not in "biu":
        raise TypeError(
            f"indices must be positions of cells or a mask, got {given.ravel().tolist()[0]!r} "
            "first: take adata.obs_names.get_indexer(names)"
        )
    if given.dtype.kind == "b":
        if given.shape != (n_obs,):
            raise IndexError(f"indices as a mask must be of the {n_obs} cells, got {given.shape}")
        return
    outside = given[(given < -n_obs) | (given >= n_obs)]
    if outside.size:
        raise IndexError(f"indices must be below the {n_obs} cells, got {outside.ravel()[0]}")


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
    if sparse.issparse(x) and x.format not in ("csr", "csc"):
        x = x.tocsr()  # others have no rows to slice
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


def check_unique(names: pd.Index, *, source: str) -> None:
    """Raise if names occur more than once.

    Raises
    ------
    ValueError
        Naming the first of them.

    Examples
    --------
    >>> import pandas as pd
    >>> check_unique(pd.Index(["CD4", "CD8A"]), source="adata.var_names")
    """
    repeated = names[names.duplicated()].unique()
    if len(repeated):
        shown = ", ".join(repr(str(name)) for name in repeated[:_NAMES_SHOWN])
        raise ValueError(
            f"{source} must be unique to be matched, but {len(repeated)} occur more than once, "
            f"first: {shown}"
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
