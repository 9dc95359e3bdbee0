"""Figures of how far results can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mixscvi.checks import check_positive_int
from mixscvi.pl.drawing import (
    COLORS,
    axes_or_new,
    check_table,
    check_tables,
    finish,
    pair_or_new,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

__all__ = ["adaptation", "calibration", "reliability"]

_LARGEST_K = 0.7


def _k_hats(axes: Axes, by_name: Mapping[str, pd.Series]) -> None:
    """Distribution functions of k-hat, with the threshold; what is infinite is at the right."""
    largest = max((k[np.isfinite(k)].max() for k in by_name.values()), default=1.0)
    for place, (name, k) in enumerate(by_name.items()):
        share = (k < _LARGEST_K).mean()
        axes.ecdf(
            np.clip(k, -0.5, largest),
            color=COLORS[place % len(COLORS)],
            label=f"{name}: {share:.0%} under {_LARGEST_K}",
        )
    axes.axvline(_LARGEST_K, linestyle=":", color="black")
    axes.set(xlabel="Pareto k-hat", ylabel="share of cells", title="can the cell be trusted?")
    # Below the axes: the curves may be anywhere in them.
    axes.legend(frameon=False, handlelength=1.8, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def reliability(
    diagnostics: Mapping[str, pd.DataFrame],
    *,
    axes: tuple[Axes, Axes] | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> tuple[Axes, Axes] | None:
    """Pareto k-hat and effective sample size over cells, model beside model.

    Parameters
    ----------
    diagnostics
        Tables of :meth:`mixscvi.MixSCVI.get_posterior_diagnostics` with the same number of draws,
        by the name of the model, such as ``"A = 1"`` and ``"A = 4"``.
    axes
        Where to draw: k-hat, and effective sample size; new axes by default.
    show
        Whether to show the figure instead of returning the axes.
    save
        File to save the figure to.

    Returns
    -------
    Both axes, or nothing if the figure was shown.

    Raises
    ------
    TypeError, ValueError
        If there are no tables by name, or one lacks a column.

    Examples
    --------
    >>> import pandas as pd, mixscvi
    >>> table = pd.DataFrame({"pareto_k": [0.3, 0.9], "effective_sample_size": [90.0, 12.0]})
    >>> k_axes, size_axes = mixscvi.pl.reliability({"A = 1": table, "A = 4": table})
    """
    check_tables(diagnostics, argument="diagnostics")
    for name, table in diagnostics.items():
        argument = f"diagnostics[{name!r}]"
        check_table(table, ["pareto_k", "effective_sample_size"], argument=argument)
    of_k, of_size = pair_or_new(axes)
    _k_hats(of_k, {name: table["pareto_k"] for name, table in diagnostics.items()})
    for place, (name, table) in enumerate(diagnostics.items()):
        color = COLORS[place % len(COLORS)]
        of_size.ecdf(table["effective_sample_size"], color=color, label=name)
    of_size.set(
        xlabel="effective sample size (draws)",
        ylabel="share of cells",
        xscale="log",
        title="how many draws count?",
    )
    of_size.legend(frameon=False, handlelength=1.8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return finish((of_k, of_size), show=show, save=save)


def adaptation(
    before: pd.DataFrame,
    after: pd.DataFrame,
    *,
    axes: tuple[Axes, Axes] | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> tuple[Axes, Axes] | None:
    """What adaptation to the exact posteriors changes: log p(x) and k-hat, cell by cell.

    Parameters
    ----------
    before, after
        Tables of :meth:`mixscvi.MixSCVI.get_posterior_diagnostics` of the same cells, with
        ``proposal="encoder"`` and ``proposal="adapted"``.
    axes
        Where to draw: the gain in log p(x) against the encoder's k-hat, and k-hat before and
        after; new axes by default.
    show
        Whether to show the figure instead of returning the axes.
    save
        File to save the figure to.

    Returns
    -------
    Both axes, or nothing if the figure was shown.

    Raises
    ------
    TypeError, ValueError
        If one is no table with these columns, or they are not of the same cells.

    Examples
    --------
    >>> import pandas as pd, mixscvi
    >>> before = pd.DataFrame({"log_likelihood": [-100.0, -90.0], "pareto_k": [1.2, 0.6]})
    >>> after = pd.DataFrame({"log_likelihood": [-97.0, -90.1], "pareto_k": [0.3, 0.1]})
    >>> gain_axes, k_axes = mixscvi.pl.adaptation(before, after)
    """
    for argument, table in (("before", before), ("after", after)):
        check_table(table, ["log_likelihood", "pareto_k"], argument=argument)
    if not before.index.equals(after.index):
        raise ValueError("before and after must be tables of the same cells, in the same order")
    of_gain, of_k = pair_or_new(axes)
    gain = after["log_likelihood"] - before["log_likelihood"]
    k = before["pareto_k"]
    shown = np.isfinite(k)
    of_gain.axhline(0, color="0.6", linewidth=1)
    of_gain.axvline(_LARGEST_K, linestyle=":", color="black")
    of_gain.scatter(k[shown], gain[shown], s=12, color=COLORS[0], alpha=0.6, linewidth=0)
    of_gain.set(
        xlabel="Pareto k-hat of the encoder's proposal",
        ylabel="gain in log p(x) (nats)",
        title=f"log p(x), adapted: {gain.mean():+.2f} nats per cell",
    )
    _k_hats(of_k, {"encoder": k, "adapted": after["pareto_k"]})
    return finish((of_gain, of_k), show=show, save=save)


def calibration(
    predictions: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    n_bins: int = 10,
    axes: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes | None:
    """How often what was predicted with some probability is so.

    Predictions are put into bins of equally many. A calibrated predictor lies on the diagonal;
    bars are two standard errors of the observed share. The legend has the expected calibration
    error: the mean distance from the diagonal, weighted by the size of the bins.

    Parameters
    ----------
    predictions
        Probabilities, `(n,)`, and whether each came true, `(n,)`, by the name of the predictor.
    n_bins
        Most bins.
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
        If a probability is not in [0, 1], or there is not one outcome, 0 or 1, for each.

    Examples
    --------
    >>> import numpy as np, mixscvi
    >>> generator = np.random.default_rng(0)
    >>> probability = generator.random(500)
    >>> came_true = generator.random(500) < probability
    >>> axes = mixscvi.pl.calibration({"ideal": (probability, came_true)})
    """
    check_tables(predictions, argument="predictions")
    check_positive_int("n_bins", n_bins)
    axes = axes_or_new(axes, size=(4.4, 4))
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for place, (name, pair) in enumerate(predictions.items()):
        try:
            probability, outcome = (np.asarray(values, float) for values in pair)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"predictions[{name!r}] must be two arrays of numbers, got {pair!r:.60}"
            ) from error
        if not probability.size:
            raise ValueError(f"predictions[{name!r}] must hold at least one, got none")
        if probability.shape != outcome.shape:
            raise ValueError(
                f"predictions[{name!r}] must hold one outcome for each probability, got shapes "
                f"{probability.shape} and {outcome.shape}"
            )
        if not ((probability >= 0) & (probability <= 1)).all():
            raise ValueError(f"predictions[{name!r}] must hold probabilities in [0, 1]")
        if not ((outcome == 0) | (outcome == 1)).all():
            raise ValueError(f"predictions[{name!r}] must say of each whether it came true, 0 or 1")
        bins = np.array_split(np.argsort(probability, kind="stable"), n_bins)
        bins = [rows for rows in bins if len(rows)]
        predicted = np.array([probability[rows].mean() for rows in bins])
        observed = np.array([outcome[rows].mean() for rows in bins])
        sizes = np.array([len(rows) for rows in bins])
        off = np.average(np.abs(predicted - observed), weights=sizes)
        axes.errorbar(
            predicted,
            observed,
            yerr=2 * np.sqrt(observed * (1 - observed) / sizes),
            fmt="o-",
            markersize=4,
            color=COLORS[place % len(COLORS)],
            label=f"{name} (error {off:.3f})",
        )
    axes.set(
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        xlabel="predicted probability",
        ylabel="observed share",
        title="calibration",
    )
    axes.legend(frameon=False, loc="lower right")
    return finish(axes, show=show, save=save)
