"""Figures of differential expression."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mixscvi.checks import check_number, check_positive_int
from mixscvi.pl.drawing import COLORS, axes_or_new, check_table, finish

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["volcano"]

_LEAST_PROBABILITY = 1e-4  # that draws tell from zero
_LINE = 11  # points between two names of size 8


def volcano(
    table: pd.DataFrame,
    *,
    fdr: float = 0.05,
    n_labels: int = 8,
    axes: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes | None:
    """Volcano plot of differential expression, with the genes called at a false discovery rate.

    The genes of the highest posterior probability of a change are called, as many as keep the mean
    probability of no change among them, their expected false discovery rate, within `fdr`.

    Parameters
    ----------
    table
        What ``differential_expression(mode="change")`` returns for one comparison, indexed by gene,
        with columns ``lfc_mean`` and ``proba_not_de``.
    fdr
        Expected false discovery rate of the genes called.
    n_labels
        Genes to name: the called ones of the largest fold change, up and down together.
    axes
        Where to draw; new axes by default.
    show
        Whether to show the figure instead of returning the axes.
    save
        File to save the figure to.

    Returns
    -------
    The axes, or nothing if the figure was shown.

    Raises
    ------
    TypeError, ValueError
        If a column is missing, as in ``mode="vanilla"``, or `fdr` is not in [0, 1].

    Examples
    --------
    >>> import pandas as pd, mixscvi
    >>> genes = ["CD19", "CD3D", "ACTB"]
    >>> table = pd.DataFrame(
    ...     {"lfc_mean": [3.0, -4.0, 0.1], "proba_not_de": [0.01, 0.001, 0.9]}, index=genes
    ... )
    >>> axes = mixscvi.pl.volcano(table)
    >>> axes.get_title()
    '2 of 3 genes at an expected FDR of 5 %'
    """
    argument = 'table of differential_expression(mode="change")'
    check_table(table, ["lfc_mean", "proba_not_de"], argument=argument)
    check_number("fdr", fdr, least=0, most=1)
    check_positive_int("n_labels", n_labels, least=0)
    change, null = table["lfc_mean"].to_numpy(), table["proba_not_de"].to_numpy()
    order = np.argsort(null, kind="stable")
    expected = null[order].cumsum() / np.arange(1, len(order) + 1)
    called = np.zeros(len(table), bool)
    called[order[expected <= fdr]] = True
    height = -np.log10(null.clip(_LEAST_PROBABILITY))
    axes = axes_or_new(axes, size=(5.6, 4.2))
    for some, color, label in (
        (~called, "0.75", "not called"),
        (called & (change > 0), COLORS[5], "up"),
        (called & (change <= 0), COLORS[0], "down"),
    ):
        axes.scatter(
            change[some],
            height[some],
            s=14,
            color=color,
            alpha=0.8,
            linewidth=0,
            label=f"{label} ({some.sum()})",
        )
    named = np.flatnonzero(called)
    named = named[np.argsort(-np.abs(change[named]))][:n_labels]
    axes.axvline(0, color="0.6", linewidth=1)
    axes.margins(x=0.3 if len(named) else 0.05, y=0.05)
    axes.set_ylim(bottom=0)
    for side, rows in (("right", named[change[named] > 0]), ("left", named[change[named] <= 0])):
        _write_names(axes, side, table.index[rows], change[rows], height[rows])
    axes.set(
        xlabel="log2 fold change (posterior mean)",
        ylabel="-log10 probability of no change",
        title=f"{called.sum()} of {len(table)} genes at an expected FDR of {100 * fdr:g} %",
    )
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return finish(axes, show=show, save=save)


def _write_names(
    axes: Axes, side: str, names: pd.Index, change: np.ndarray, height: np.ndarray
) -> None:
    """Write genes' names one below the other along a side of the frame, with lines to the genes."""
    if not len(names):
        return
    points = axes.get_window_extent().height * 72 / axes.figure.dpi
    line = min(_LINE / points, 1 / len(names))
    order = np.lexsort((change, -height))
    levels = height[order] / axes.get_ylim()[1]
    # Down from the top, each at its gene or under the name above; then up from the bottom.
    levels[0] = min(levels[0], 1 - line / 2)
    for place in range(1, len(levels)):
        levels[place] = min(levels[place], levels[place - 1] - line)
    levels = np.maximum(levels, line * (len(levels) - np.arange(len(levels)) - 0.5))
    for row, level in zip(order, levels, strict=True):
        axes.annotate(
            str(names[row]),
            (change[row], height[row]),
            xytext=(0.985 if side == "right" else 0.015, level),
            textcoords="axes fraction",
            fontsize=8,
            ha=side,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkB": 2},
        )
