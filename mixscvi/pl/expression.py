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
    from matplotlib.text import Annotation

__all__ = ["volcano"]

_LEAST_PROBABILITY = 1e-4  # that draws tell from zero
_LINE = 11  # points between two names of size 8
_EDGE, _GAP = 0.015, 0.05  # of the frame: beside names, and between them and the genes


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
    axes.axvline(0, color="0.6", linewidth=1)
    axes.margins(y=0.05)
    axes.set_ylim(bottom=0)
    axes.set(
        xlabel="log2 fold change (posterior mean)",
        ylabel="-log10 probability of no change",
        title=f"{called.sum()} of {len(table)} genes at an expected FDR of {100 * fdr:g} %",
    )
    axes.legend(
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=3,
        columnspacing=1,
        handletextpad=0.2,
    )
    named = np.flatnonzero(called)
    named = named[np.argsort(-np.abs(change[named]), kind="stable")][:n_labels]
    if len(named):
        _write_names(axes, table.index[named], change[named], height[named])
    return finish(axes, show=show, save=save)


def _write_names(axes: Axes, names: pd.Index, change: np.ndarray, height: np.ndarray) -> None:
    """Write genes' names along both sides of the frame, in strips that no gene is in."""
    from matplotlib.text import Text

    figure = axes.get_figure(root=True)
    if figure is None:
        return
    figure.draw_without_rendering()  # only then is the size of the axes known
    frame = axes.get_window_extent()
    least = _LINE * figure.dpi / 72 / frame.height
    strips = []
    for side, rows in (("left", change <= 0), ("right", change > 0)):
        texts = _write_side(axes, side, names[rows], change[rows], height[rows], least)
        widths = [Text.get_window_extent(text).width for text in texts]  # without their lines
        strips.append(max(widths) / frame.width + _EDGE if texts else 0)
        for text in texts:  # flush with the inner edge, where the lines begin
            inner = strips[-1] if side == "left" else 1 - strips[-1]
            text.xyann = (inner, text.xyann[1])
    low, high = axes.dataLim.intervalx
    room = max(1 - sum(strips) - 2 * _GAP, 0.3)
    scale = (high - low) / room
    axes.set_xlim(low - scale * (strips[0] + _GAP), high + scale * (strips[1] + _GAP))


def _write_side(
    axes: Axes, side: str, names: pd.Index, change: np.ndarray, height: np.ndarray, least: float
) -> list[Annotation]:
    """Write names one below the other, `least` of the frame apart, with lines to the genes."""
    if not len(names):
        return []
    line = min(least, 1 / len(names))
    # Of genes at one height the outermost is named on top: no line passes through a gene named.
    order = np.lexsort((-np.abs(change), -height))
    levels = height[order] / axes.get_ylim()[1]
    # Down from the top, each at its gene or under the name above; then up from the bottom.
    levels[0] = min(levels[0], 1 - line / 2)
    for place in range(1, len(levels)):
        levels[place] = min(levels[place], levels[place - 1] - line)
    levels = np.maximum(levels, line * (len(levels) - np.arange(len(levels)) - 0.5))
    return [
        axes.annotate(
            str(names[row]),
            (change[row], height[row]),
            xytext=(0.5, level),
            textcoords="axes fraction",
            fontsize=8,
            ha="left" if side == "right" else "right",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": "0.6",
                "linewidth": 0.6,
                "relpos": (0.0 if side == "right" else 1.0, 0.5),
                "shrinkB": 2,
            },
        )
        for row, level in zip(order, levels, strict=True)
    ]
