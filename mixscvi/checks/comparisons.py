"""Checks of what is compared with what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from mixscvi.checks.arguments import check_choice, check_indices

__all__ = ["check_comparison"]

_NAMES_SHOWN = 5
# What pandas raises of a query that it cannot read, or that is of columns that are not there.
_NO_QUERY = (AttributeError, KeyError, NameError, SyntaxError, TypeError, ValueError)


def check_comparison(obs: pd.DataFrame, given: Mapping[str, Any]) -> None:
    """Raise if ``differential_expression`` cannot tell which cells to compare.

    Parameters
    ----------
    obs
        Annotation of the cells.
    given
        Arguments of ``differential_expression`` by name, of which `groupby`, `group1`, `group2`,
        `idx1`, `idx2`, `subset_idx` and `mode` are looked at.

    Raises
    ------
    TypeError, ValueError, KeyError, IndexError
        Naming the argument.

    Examples
    --------
    >>> import pandas as pd
    >>> obs = pd.DataFrame({"type": ["B", "NK"]}, index=["AAC", "AAG"])
    >>> check_comparison(obs, {"groupby": "type", "group1": "B"})
    >>> check_comparison(obs, {"groupby": "type", "group1": "T"})
    Traceback (most recent call last):
    ...
    ValueError: group1='T' is no value of adata.obs['type'], which has 'B', 'NK'
    """
    check_choice("mode", given.get("mode", "vanilla"), ("vanilla", "change"))
    for name in ("idx1", "idx2", "subset_idx"):
        if given.get(name) is not None:
            _check_cells(name, given[name], obs)
    if given.get("idx1") is not None:
        return
    key = given.get("groupby")
    if key is None:
        raise ValueError("give groupby, a column of adata.obs, or the cells to compare as idx1")
    if key not in obs:
        raise KeyError(f"groupby={key!r} is no column of adata.obs, which has {[*obs.columns]}")
    first, column = given.get("group1"), obs[key]
    if isinstance(first, str) or not isinstance(first, Iterable):
        first = [first]
    for name, groups in (("group1", first), ("group2", [given.get("group2")])):
        for group in groups:
            if group is not None and not (column == group).any():
                values = column.unique()
                shown = ", ".join(repr(value) for value in values[:_NAMES_SHOWN])
                more = ", ..." if len(values) > _NAMES_SHOWN else ""
                raise ValueError(
                    f"{name}={group!r} is no value of adata.obs[{key!r}], which has {shown}{more}"
                )


def _check_cells(name: str, cells: Any, obs: pd.DataFrame) -> None:
    """Raise if cells are not chosen by position, by a mask or by a query of ``obs``."""
    if not isinstance(cells, str):
        # scvi-tools takes them in any shape, as np.where returns them.
        try:
            flat = np.ravel(cells)
        except ValueError:  # of sequences of several lengths
            flat = cells
        check_indices(flat, len(obs), name=name)
        return
    try:
        chosen = obs.query(cells)
    except _NO_QUERY as error:
        raise ValueError(
            f"{name}={cells!r} is no query of adata.obs, which has {[*obs.columns]}: {error}"
        ) from error
    if not len(chosen):
        raise ValueError(f"{name}={cells!r} chooses no cell")
