"""Checks of what is compared with what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mixscvi.checks.annotation import name_first
from mixscvi.checks.arguments import (
    check_batches,
    check_choice,
    check_indices,
    check_number,
    check_positive_int,
)
from mixscvi.warning import warn_user

__all__ = ["check_comparison", "groups_to_compare"]

_NAMES_SHOWN = 5
# What pandas raises of a query that it cannot read, or that is of columns that are not there.
_NO_QUERY = (AttributeError, KeyError, NameError, SyntaxError, TypeError, ValueError)


def check_comparison(
    obs: pd.DataFrame, given: Mapping[str, Any], batches: Sequence[Any] = ()
) -> None:
    """Raise if ``differential_expression`` cannot tell which cells to compare, or how.

    Parameters
    ----------
    obs
        Annotation of the cells.
    given
        Arguments of ``differential_expression`` by name.
    batches
        Of the model.

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
    _check_test(given)
    _check_batches(given, batches)
    for name in ("idx1", "idx2", "subset_idx"):
        if given.get(name) is not None:
            _check_cells(name, given[name], obs)
    if given.get("idx1") is not None:
        _check_chosen(obs, given)
        return
    key = given.get("groupby")
    if key is None:
        raise ValueError("give groupby, a column of adata.obs, or the cells to compare as idx1")
    if key not in obs:
        raise KeyError(f"groupby={key!r} is no column of adata.obs, which has {[*obs.columns]}")
    subset = given.get("subset_idx")
    # Compared with a group, such columns alone give neither true nor false.
    if subset is None and getattr(obs[key].dtype, "na_value", None) is pd.NA and obs[key].hasnans:
        raise ValueError(
            f"groupby={key!r} has missing values, pd.NA, which are equal to no group and not "
            f"unequal: convert it, as with adata.obs[{key!r}].astype('category')"
        )
    first, column = _as_groups(given.get("group1")), _compared(obs, given)
    if given.get("group1") is not None and not first:
        raise ValueError(f"group1 must name at least one value of adata.obs[{key!r}], got none")
    named = _naming(obs, given)
    second = given.get("group2")
    if isinstance(second, (list, set, np.ndarray, pd.Series, pd.Index)):
        raise TypeError(f"group2 must be one value of adata.obs[{key!r}], got {second!r:.60}")
    for name, groups in (("group1", first), ("group2", [] if second is None else [second])):
        for group in groups:
            if (column == named(group)).any():
                continue
            if subset is not None and (obs[key].astype(str) == named(group)).any():
                raise ValueError(f"{name}={group!r} has no cells in subset_idx")
            shown = name_first(obs[key].unique().tolist())
            raise ValueError(
                f"{name}={group!r} is no value of adata.obs[{key!r}], which has {shown}"
            )
    if subset is None and second is None:
        for group in first or column.dropna().unique()[:1]:
            of = f"group1={group!r}" if first else f"groupby={key!r}"
            _check_rest(of, (column == group).to_numpy())


def _check_chosen(obs: pd.DataFrame, given: Mapping[str, Any]) -> None:
    """Raise if ``idx1``, ``idx2`` and ``subset_idx`` leave a group without cells."""
    one, subset = _mask(given["idx1"], obs), given.get("subset_idx")
    inside = np.ones(len(obs), dtype=bool) if subset is None else _mask(subset, obs)
    if not (one & inside).any():
        raise ValueError("idx1 must have cells in subset_idx, and has none there")
    if given.get("idx2") is None:
        _check_rest("idx1", one & inside)
        return
    two = _mask(given["idx2"], obs)
    if not (two & inside).any():
        raise ValueError("idx2 must have cells in subset_idx, and has none there")
    if not (one & inside & ~two).any():
        raise ValueError("idx2 must not hold all cells of idx1, which leaves none to compare")


def groups_to_compare(obs: pd.DataFrame, given: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of ``differential_expression`` by the names that scvi-tools finds their cells by.

    It goes over all levels of a column, also over those without cells, and with a subset compares
    with the text of each.

    Parameters
    ----------
    obs, given
        As in :func:`check_comparison`, which has passed.

    Returns
    -------
    What is to be given as ``group1`` and ``group2``; nothing where that stays as it is.

    Raises
    ------
    ValueError
        If nothing is left to compare.

    Warns
    -----
    UserWarning
        Of levels that are left out, since they have no cells.

    Examples
    --------
    >>> import pandas as pd
    >>> obs = pd.DataFrame({"type": [1, 2, 3]}, index=["AAC", "AAG", "AAT"])
    >>> groups_to_compare(obs, {"groupby": "type", "group1": 2, "subset_idx": [1, 2]})
    {'group1': ['2'], 'group2': None}
    """
    if given.get("idx1") is not None:
        return {}
    subset, column, named = given.get("subset_idx"), _compared(obs, given), _naming(obs, given)
    where = "" if subset is None else " in subset_idx"
    first, second = _as_groups(given.get("group1")), given.get("group2")
    if not first:
        levels = obs[given["groupby"]].astype("category").cat.categories
        without = [group for group in levels if not (column == named(group)).any()]
        first = [group for group in levels if group not in without]
        of = f"groupby={given['groupby']!r}"
        if not first:
            raise ValueError(f"{of} has no group with cells{where}")
        if without:
            shown = f"{[str(group) for group in without[:_NAMES_SHOWN]]}"
            warn_user(f"{of} has groups without cells{where}, which are left out: {shown}")
        elif subset is None:
            return {}
    if second is None:
        for group in first:
            _check_rest(f"group1={group!r}", (column == named(group)).to_numpy())
    return {
        "group1": [named(group) for group in first],
        "group2": None if second is None else named(second),
    }


def _as_groups(value: Any) -> list[Any]:
    """What ``group1`` names, which may be one group or several."""
    if value is None:
        return []
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, str) or not isinstance(value, Iterable):
        return [value]
    groups = [*value]
    if len(groups) > 1 and any(group is None for group in groups):
        raise ValueError(f"group1 must name groups, got None among {groups!r:.60}")
    return [group for group in groups if group is not None]


def _compared(obs: pd.DataFrame, given: Mapping[str, Any]) -> pd.Series:
    """The column that scvi-tools compares with groups.

    With a subset it is text, and "other" stands for cells outside of the subset.
    """
    column, subset = obs[given["groupby"]], given.get("subset_idx")
    return column if subset is None else column.astype(str).where(_mask(subset, obs), "other")


def _naming(obs: pd.DataFrame, given: Mapping[str, Any]) -> Callable[[Any], Any]:
    """What makes a group one of that column: with a subset, the text of the values equal to it."""
    if given.get("subset_idx") is None:
        return lambda group: group
    column = obs[given["groupby"]]
    text = column.astype(str)

    def named(group: Any) -> str:
        equal = (column == group).fillna(False).to_numpy(dtype=bool)
        return text[equal].iloc[0] if equal.any() else str(group)

    return named


def _check_test(given: Mapping[str, Any]) -> None:
    """Raise if it is not clear what makes a gene differ."""
    check_choice("mode", given.get("mode", "vanilla"), ("vanilla", "change"))
    check_choice("test_mode", given.get("test_mode", "three"), ("two", "three"))
    for name, most in (("delta", np.inf), ("pseudocounts", np.inf), ("fdr_target", 1)):
        if given.get(name) is not None:
            check_number(name, given[name], least=0, most=most)
    for name in ("n_samples_overall", "m_permutation"):
        if given.get(name) is not None:
            check_positive_int(name, given[name])
    for name in ("change_fn", "m1_domain_fn"):
        value = given.get(name)
        if not (value is None or callable(value) or (name, value) == ("change_fn", "log-fold")):
            raise TypeError(f"{name} must be a function of arrays, got {value!r}")
    levels = given.get("cred_interval_lvls")
    if levels is not None:
        if isinstance(levels, str) or not isinstance(levels, Iterable):
            raise TypeError(f"cred_interval_lvls must be a list of levels, got {levels!r}")
        for level in levels:
            check_number("cred_interval_lvls", level, least=0, most=1)


def _check_batches(given: Mapping[str, Any], batches: Sequence[Any]) -> None:
    """Raise if groups cannot be decoded as of the batches that are given for them."""
    for name in ("batchid1", "batchid2"):
        value = given.get(name)
        if value is None:
            continue
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise TypeError(f"{name} must be a list of batches, got {value!r}")
        if not given.get("batch_correction"):
            raise ValueError(f"{name}={value!r} needs batch_correction=True")
        check_batches(value, batches, name=name)


def _mask(cells: Any, obs: pd.DataFrame) -> np.ndarray:
    """Which cells are chosen, `(n,)`."""
    if isinstance(cells, str):
        return obs.index.isin(obs.query(cells).index)
    mask = np.zeros(len(obs), dtype=bool)
    mask[np.ravel(cells)] = True
    return mask


def _check_rest(name: str, mask: np.ndarray) -> None:
    """Raise if a group is to be compared with the other cells, and there are none."""
    if mask.all():
        raise ValueError(f"{name} chooses all {len(mask)} cells, which leaves none to compare with")


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
