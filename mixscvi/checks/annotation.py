"""Checks of what annotates cells and genes."""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mixscvi.warning import warn_user

__all__ = [
    "check_categories",
    "check_column",
    "check_finite",
    "check_gene_list",
    "check_genes",
    "check_positive",
    "check_unique",
    "is_finite",
    "name_cells",
    "name_first",
    "warn_of_repeated",
]

_NAMES_SHOWN = 5
_SINGLE = np.finfo(np.float32)
FINITE = f"below {_SINGLE.max:.1g}"  # as messages say it


def is_finite(values: np.ndarray) -> np.ndarray:
    """Which values are finite in single precision, in which models compute.

    Examples
    --------
    >>> is_finite(np.array([1.0, 1e300, np.nan]))
    array([ True, False, False])
    """
    return np.abs(values) <= _SINGLE.max


def name_first(values: Sequence[Any]) -> str:
    """The first of some values, as messages list them.

    Examples
    --------
    >>> name_first(["a", "b"])
    "'a', 'b'"
    """
    more = ", ..." if len(values) > _NAMES_SHOWN else ""
    return ", ".join(repr(value) for value in values[:_NAMES_SHOWN]) + more


def name_cells(obs_names: pd.Index, offending: np.ndarray) -> str:
    """How many cells there are at some positions, and the names of the first.

    Examples
    --------
    >>> name_cells(pd.Index(["AAC", "AAG", "AAT"]), np.array([1]))
    "1 of 3 cells, first: 'AAG'"
    """
    names = ", ".join(repr(str(name)) for name in obs_names[offending[:_NAMES_SHOWN]])
    more = f" and {len(offending) - _NAMES_SHOWN} more" if len(offending) > _NAMES_SHOWN else ""
    return f"{len(offending)} of {len(obs_names)} cells, first: {names}{more}"


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
        If a category is missing, or there are several such columns.
    TypeError
        If `key` is no name; if numbers are expected, and it has others; or if categories are of
        types that have no common order.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> obs = pd.DataFrame({"batch": ["CTRL", np.nan]}, index=["AAC", "AAG"])
    >>> check_column(obs, "batch", argument="batch_key")
    Traceback (most recent call last):
    ...
    ValueError: batch_key: adata.obs['batch'] is missing (NaN) in 1 of 2 cells, first: 'AAG'
    """
    # scvi-tools takes what is false for none.
    if not isinstance(key, Hashable) or not key:
        raise TypeError(f"{argument} must be the name of a column of adata.obs, got {key!r}")
    if key not in obs:
        raise KeyError(f"{argument}={key!r} is no column of adata.obs, which has {[*obs.columns]}")
    column = obs[key]
    if isinstance(column, pd.DataFrame):
        raise ValueError(f"{argument}={key!r} is of {column.shape[1]} columns of adata.obs")
    if not numeric:
        missing = np.flatnonzero(column.isna())
        if len(missing):
            raise ValueError(
                f"{argument}: adata.obs[{key!r}] is missing (NaN) in "
                f"{name_cells(obs.index, missing)}"
            )
        try:
            np.unique(column.to_numpy(dtype=object))
        except TypeError as error:  # what has no order cannot be coded
            types = column.map(type).astype(object)
            other = np.flatnonzero([kind is not types.iloc[0] for kind in types])
            raise TypeError(
                f"{argument}: adata.obs[{key!r}] mixes {types.iloc[0].__name__} with other types "
                f"in {name_cells(obs.index, other)}: convert it, as with .astype(str)"
            ) from error
        return
    is_category = isinstance(column.dtype, pd.CategoricalDtype)
    values = column.cat.categories if is_category else column
    if values.dtype.kind != "c" and (
        pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values)
    ):
        return
    wrong = np.flatnonzero([not isinstance(value, numbers.Real) for value in column])
    cells = name_cells(obs.index, wrong) if len(wrong) else f"all {len(obs)} cells"
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
        raise ValueError(
            f"{source} is {named} in {name_cells(column.index, np.flatnonzero(unknown))}, but the "
            f"model was trained on {name_first([*known])}: map new ones with load_query_data"
        )


def check_finite(table: pd.DataFrame, *, source: str) -> None:
    """Raise if covariates are NaN, or infinite in single precision.

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
        offending = np.flatnonzero(~is_finite(table[column].to_numpy(dtype=float)))
        if len(offending):
            raise ValueError(
                f"{source}[{column!r}] is NaN or infinite in {name_cells(table.index, offending)}: "
                f"expected finite numbers, {FINITE}"
            )


def check_positive(values: np.ndarray, obs_names: pd.Index, *, source: str) -> None:
    """Raise if per-cell factors are not positive and finite in single precision.

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
    offending = np.flatnonzero(~(is_finite(values) & (values >= _SINGLE.tiny)))
    if len(offending):
        raise ValueError(
            f"{source} must be positive and finite, but is not in "
            f"{name_cells(obs_names, offending)}"
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


def warn_of_repeated(names: pd.Index, *, source: str) -> None:
    """Warn if names occur more than once: training does not need them, but selection does.

    Warns
    -----
    UserWarning
        Naming the first of them.

    Examples
    --------
    >>> import pandas as pd
    >>> warn_of_repeated(pd.Index(["CD4", "CD8A"]), source="adata.var_names")
    """
    repeated = names[names.duplicated()].unique()
    if len(repeated):
        shown = ", ".join(repr(str(name)) for name in repeated[:_NAMES_SHOWN])
        warn_user(
            f"{len(repeated)} of {source} occur more than once, first: {shown}. Models train, but "
            f"nothing can be chosen by these names: call adata.{source.rpartition('.')[2]}"
            "_make_unique()"
        )


def check_gene_list(gene_list: Any, var_names: pd.Index) -> None:
    """Raise if genes cannot be chosen by these names.

    Names that are unknown are left out, as scvi-tools does, if some are known.

    Raises
    ------
    TypeError
        If `gene_list` is one text.
    ValueError
        If no gene is of these names, or several are of one of them.

    Examples
    --------
    >>> import pandas as pd
    >>> check_gene_list(["CD4"], pd.Index(["CD4", "CD8A"]))
    >>> check_gene_list(["CD4"], pd.Index(["CD4", "CD8A", "CD4"]))
    Traceback (most recent call last):
    ...
    ValueError: gene_list: 1 of its names are of several genes, first: 'CD4'
    """
    if isinstance(gene_list, str) or not isinstance(gene_list, Iterable):
        raise TypeError(f"gene_list must be a list of genes, got {gene_list!r}")
    given = pd.Index(list(gene_list), dtype=object)
    if not given.isin(var_names).any():
        shown = ", ".join(repr(str(name)) for name in given[:_NAMES_SHOWN]) or "none"
        raise ValueError(f"gene_list has no gene of the model's {len(var_names)}, got {shown}")
    repeated = pd.Index(var_names[var_names.duplicated()]).unique()
    several = given[given.isin(repeated)].unique()
    if len(several):
        shown = ", ".join(repr(str(name)) for name in several[:_NAMES_SHOWN])
        raise ValueError(
            f"gene_list: {len(several)} of its names are of several genes, first: {shown}"
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
