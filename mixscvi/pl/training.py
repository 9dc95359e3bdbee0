"""Training curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mixscvi.pl.drawing import COLORS, axes_or_new, check_tables, finish

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["training"]


def training(
    histories: Mapping[str, Mapping[str, pd.DataFrame]],
    *,
    metric: str = "elbo",
    axes: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes | None:
    """Training curves: dashed on the training cells, solid on the validation cells.

    Parameters
    ----------
    histories
        ``model.history`` by the name of the model.
    metric
        ``"elbo"``, ``"reconstruction_loss"`` or ``"kl_local"``; lower is better, as scvi-tools
        records them: what it calls `elbo` is the negative one.
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
    TypeError
        If `histories` are none by name.
    ValueError
        If a history holds no such metric.

    Examples
    --------
    >>> import pandas as pd, mixscvi
    >>> history = {"elbo_train": pd.DataFrame({"elbo_train": [3.0, 2.0]})}
    >>> axes = mixscvi.pl.training({"A = 4": history})
    """
    check_tables(histories, argument="histories")
    axes = axes_or_new(axes)
    for place, (name, history) in enumerate(histories.items()):
        if not isinstance(history, Mapping):
            raise TypeError(f"histories[{name!r}] must be model.history, got {history!r:.60}")
        known = [key for key in (f"{metric}_train", f"{metric}_validation") if key in history]
        if not known:
            raise ValueError(f"metric={metric!r} is not in the history of {name!r}")
        for key in known:
            validation = key.endswith("validation")
            curve = history[key].astype(float)
            axes.plot(
                curve.index,
                curve.iloc[:, 0],
                color=COLORS[place % len(COLORS)],
                linestyle="-" if validation else "--",
                label=f"{name}, {'validation' if validation else 'training'}",
            )
    what = "negative ELBO" if metric == "elbo" else metric
    axes.set(xlabel="epoch", ylabel=f"{what} (nats per cell, lower is better)", title="training")
    axes.legend(frameon=False, handlelength=1.8)
    return finish(axes, show=show, save=save)
