"""What tables of differential expression say of the counts themselves, minibatch by minibatch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scvi import REGISTRY_KEYS
from torch import Tensor

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["with_raw_counts"]

_COUNTS_OF_A_CELL = 1e4  # that normalized means are of


def with_raw_counts(
    table: pd.DataFrame,
    adata: AnnData,
    minibatches: Iterable[Mapping[str, Tensor]],
    arguments: Mapping[str, Any],
) -> pd.DataFrame:
    """Add scvi-tools' columns on counts to its table of differential expression.

    scvi-tools takes all counts of the groups into memory for them.

    Parameters
    ----------
    table
        As it is with ``all_stats=False``.
    adata
        The cells.
    minibatches
        Of all cells, in order.
    arguments
        Those of ``differential_expression``, by name.

    Returns
    -------
    The table as it is with ``all_stats=True``.
    """
    comparisons = _comparisons(table, adata.obs, arguments)
    members = np.array([member for _, *pair in comparisons for member in pair], dtype=np.float64)
    n_genes = adata.n_vars
    sums = {name: np.zeros((len(members), n_genes)) for name in ("raw", "nonzero", "normalized")}
    start = 0
    for tensors in minibatches:
        counts = tensors[REGISTRY_KEYS.X_KEY].numpy().astype(np.float64)
        of_groups = members[:, start : start + len(counts)]
        start += len(counts)
        sums["raw"] += of_groups @ counts
        sums["nonzero"] += of_groups @ (counts != 0)
        scale = _COUNTS_OF_A_CELL / counts.sum(axis=1, keepdims=True)
        sums["normalized"] += of_groups @ (counts * scale)
    means = {name: total / members.sum(axis=1, keepdims=True) for name, total in sums.items()}

    parts = []
    for i, (rows, *_) in enumerate(comparisons):
        part = table[rows]
        genes = adata.var_names.get_indexer(part.index)
        columns = {
            f"{column}{which + 1}": means[name][2 * i + which][genes]
            for column, name in (
                ("raw_mean", "raw"),
                ("non_zeros_proportion", "nonzero"),
                ("raw_normalized_mean", "normalized"),
            )
            for which in (0, 1)
        }
        parts.append(pd.concat([part, pd.DataFrame(columns, index=part.index)], axis=1))
    complete = pd.concat(parts)
    last = [
        c for c in table if c.startswith("is_de_fdr_") or c in ("comparison", "group1", "group2")
    ]
    return complete[[c for c in complete if c not in last] + last]


def _comparisons(
    table: pd.DataFrame, obs: pd.DataFrame, arguments: Mapping[str, Any]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each comparison: its rows of the table, and which cells are of its two groups."""
    subset = arguments.get("kwargs", {}).get("subset_idx")
    inside = np.ones(len(obs), dtype=bool) if subset is None else _mask(subset, obs)
    if arguments.get("idx1") is not None:
        first = _mask(arguments["idx1"], obs) & inside
        if arguments.get("idx2") is None:
            return [(np.ones(len(table), dtype=bool), first, ~first)]
        second = _mask(arguments["idx2"], obs) & inside
        return [(np.ones(len(table), dtype=bool), first & ~second, second)]
    groups = obs[arguments["groupby"]]
    if subset is not None:
        groups = groups.astype(str).where(inside, "other")
    comparisons = []
    for group1 in table["group1"].unique():
        first = (groups == group1).to_numpy()
        group2 = arguments.get("group2")
        second = ~first if group2 is None else (groups == group2).to_numpy()
        comparisons.append(((table["group1"] == group1).to_numpy(), first, second))
    return comparisons


def _mask(cells: Any, obs: pd.DataFrame) -> np.ndarray:
    """Which cells are meant by positions, a mask, or a query of their annotation."""
    if isinstance(cells, str):
        return obs.index.isin(obs.query(cells).index)
    mask = np.zeros(len(obs), dtype=bool)
    mask[np.asarray(cells).ravel()] = True
    return mask
