"""What all figures share: axes, colors, showing and saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLORS", "axes_or_new", "finish", "labels_of"]

# Okabe & Ito, "Color universal design" (2008), black left out: it is for text and lines.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")

AxesOrPair = TypeVar("AxesOrPair", bound="Axes | tuple[Axes, ...]")


def axes_or_new(axes: Axes | None, *, size: tuple[float, float] = (5, 3.6)) -> Axes:
    """The axes, or new ones in a figure of this size in inches."""
    if axes is not None:
        return axes
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def finish(axes: AxesOrPair, *, show: bool, save: str | Path | None) -> AxesOrPair | None:
    """Save and show a figure as asked; return its axes unless it was shown."""
    figure = (axes[0] if isinstance(axes, tuple) else axes).get_figure(root=True)
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
    if len(groups) != len(table):
        raise ValueError(f"groups must name {len(table)} cells, got {len(groups)}")
    name = getattr(groups, "name", None) or "group"
    return pd.Series(np.asarray(groups, dtype=str), index=table.index, name=name)
