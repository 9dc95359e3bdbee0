"""What all figures share: axes, colors, showing and saving."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "COLORS",
    "axes_or_new",
    "check_table",
    "check_tables",
    "finish",
    "labels_of",
    "pair_or_new",
]

# Okabe & Ito, "Color universal design" (2008), black left out: it is for text and lines.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")

AxesOrPair = TypeVar("AxesOrPair", bound="Axes | tuple[Axes, ...]")


def axes_or_new(axes: Axes | None, *, size: tuple[float, float] = (5, 3.6)) -> Axes:
    """The axes, or new ones in a figure of this size in inches.

    Raises
    ------
    TypeError
        If they are none.
    """
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

    if axes is None:
        return plt.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(axes, Axes):
        raise TypeError(f"axes must be axes of matplotlib, got {axes!r:.60}")
    return axes


def pair_or_new(axes: tuple[Axes, Axes] | None) -> tuple[Axes, Axes]:
    """The two axes, or new ones side by side.

    Raises
    ------
    TypeError
        If they are not two.
    """
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

    if axes is None:
        _, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
        return left, right
    pair = tuple(axes) if isinstance(axes, Iterable) else ()
    if len(pair) != 2 or not all(isinstance(one, Axes) for one in pair):
        raise TypeError(f"axes must be two axes of matplotlib, got {axes!r:.60}")
    return pair


def check_table(table: Any, columns: Sequence[str], *, argument: str) -> None:
    """Raise if a figure cannot be drawn of a table.

    Raises
    ------
    TypeError
        If it is none.
    ValueError
        If it has no rows, or lacks a column.

    Examples
    --------
    >>> check_table(pd.DataFrame({"pareto_k": [0.3]}), ["pareto_k"], argument="diagnostics")
    """
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"{argument} must be a table, got {table!r:.60}")
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"{argument} must have columns {missing}, got {[*table]}")
    if not len(table):
        raise ValueError(f"{argument} must have rows, got none")


def check_tables(tables: Any, *, argument: str) -> None:
    """Raise if there are no values by name.

    Raises
    ------
    TypeError
        If they are not named.
    ValueError
        If there are none.

    Examples
    --------
    >>> check_tables({"A = 4": pd.DataFrame()}, argument="diagnostics")
    """
    if not isinstance(tables, Mapping):
        raise TypeError(f"{argument} must be a dictionary by name, got a {type(tables).__name__}")
    if not tables:
        raise ValueError(f"{argument} must name at least one, got none")


def finish(axes: AxesOrPair, *, show: bool, save: str | Path | None) -> AxesOrPair | None:
    """Save and show a figure as asked; return its axes unless it was shown."""
    figure = (axes[0] if isinstance(axes, tuple) else axes).get_figure(root=True)
    if not isinstance(save, str | os.PathLike | None):
        raise TypeError(f"save must be the path of a file, got {save!r}")
    if save is not None and figure is not None:
        figure.savefig(save, dpi=150, bbox_inches="tight")
    if not show:
        return axes
    import matplotlib.pyplot as plt

    plt.show()
    return None


def labels_of(
    groups: str | Sequence[str] | np.ndarray | pd.Series, table: pd.DataFrame
) -> pd.Series:
    """Labels of the rows of a table: one of its columns by name, or as given.

    A series that has the names of all rows gives each row that of its name, whatever their order.

    Raises
    ------
    KeyError
        If the table has no such column.
    TypeError
        If they are no sequence.
    ValueError
        If there are more or fewer labels than rows.

    Examples
    --------
    >>> table = pd.DataFrame({"type": ["B", "NK"]})
    >>> labels_of("type", table).tolist()
    ['B', 'NK']
    """
    if isinstance(groups, str):
        if groups not in table:
            raise KeyError(f"groups={groups!r} is not a column, of which there are: {[*table]}")
        groups = table[groups]
    elif isinstance(groups, pd.Series) and groups.index.is_unique:
        if table.index.isin(groups.index).all():
            groups = groups.loc[table.index]
    if not isinstance(groups, pd.Series) and np.ndim(groups) != 1:
        raise TypeError(f"groups must be a column, or one label for each cell, got {groups!r:.60}")
    if len(groups) != len(table):
        raise ValueError(f"groups must name {len(table)} cells, got {len(groups)}")
    name = getattr(groups, "name", None) or "group"
    return pd.Series(np.asarray(groups, dtype=str), index=table.index, name=name)
