"""Figures of the components: where they are, how they differ, what each weighs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mixscvi.checks import check_indices, check_positive_int
from mixscvi.pl.drawing import COLORS, axes_or_new, check_table, finish, labels_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from mixscvi.model import AdaptedPosterior, MixSCVI

__all__ = ["component_means", "component_weights", "divergence"]


def component_means(
    model: MixSCVI,
    *,
    groups: str | Sequence[str] | np.ndarray | pd.Series | None = None,
    indices: Sequence[int] | None = None,
    axes: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes | None:
    """UMAP of all component means, `n * A` points in one space.

    Where the components of a cell agree its points coincide; where they differ they spread.

    Parameters
    ----------
    model
        A trained model.
    groups
        What to color by: a column of the model's ``adata.obs``, or a label for each of its cells.
        By default the points are colored by component.
    indices
        Cells to show; all by default.
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
    KeyError
        If there is no such column.
    TypeError, ValueError
        If there are more or fewer labels than cells, or `model` holds no data.

    Examples
    --------
    >>> import mixscvi
    >>> adata = mixscvi.datasets.pbmc68k()
    >>> mixscvi.MixSCVI.setup_anndata(adata)
    >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> axes = mixscvi.pl.component_means(model, groups="cell_type")
    """
    import anndata
    import pandas as pd
    import scanpy as sc

    if getattr(model, "adata", None) is None:
        raise ValueError(f"model must be a MixSCVI that holds data, got {type(model).__name__}")
    obs = model.adata.obs
    labels = None if groups is None else labels_of(groups, obs)
    loc = model.get_latent_mixture(indices=indices).loc
    if indices is not None and labels is not None:
        labels = labels.iloc[check_indices(indices, len(obs))]
    n_cells, n_components, _ = loc.shape
    if labels is None:
        color, title = np.tile(np.arange(1, n_components + 1), n_cells), "component"
    else:
        color, title = np.repeat(labels.to_numpy(), n_components), str(labels.name)
    points = anndata.AnnData(
        obs=pd.DataFrame(
            {title: pd.Categorical(color)},
            index=[str(point) for point in range(n_cells * n_components)],
        ),
        obsm={"X_mean": loc.reshape(n_cells * n_components, -1)},
    )
    sc.pp.neighbors(points, use_rep="X_mean")
    sc.tl.umap(points)
    axes = axes_or_new(axes)
    few = points.obs[title].nunique() <= len(COLORS)
    sc.pl.umap(
        points,
        color=title,
        title=f"means of {n_components} components, by {title}",
        palette=[*COLORS] if few else None,
        frameon=False,
        ax=axes,
        show=False,
    )
    return finish(axes, show=show, save=save)


def divergence(
    diagnostics: pd.DataFrame,
    groups: str | Sequence[str] | np.ndarray | pd.Series,
    *,
    n_components: int | None = None,
    axes: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes | None:
    """Divergence between the components, cell type by cell type, ordered by its median.

    Parameters
    ----------
    diagnostics
        What :meth:`mixscvi.MixSCVI.get_posterior_diagnostics` returns; or ``adata.obs`` with these
        columns.
    groups
        Label of each of its cells, in the same order; or the column that has them.
    n_components
        If given, log A is marked: the divergence of components that do not overlap.
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
    KeyError
        If there is no such column.
    TypeError, ValueError
        If `diagnostics` is no such table, or there are more or fewer labels than cells.

    Examples
    --------
    >>> import pandas as pd, mixscvi
    >>> diagnostics = pd.DataFrame({"jensen_shannon_divergence": [0.1, 0.4, 0.9, 0.5]})
    >>> axes = mixscvi.pl.divergence(diagnostics, ["B", "B", "NK", "NK"], n_components=4)
    """
    check_table(diagnostics, ["jensen_shannon_divergence"], argument="diagnostics")
    if n_components is not None:
        check_positive_int("n_components", n_components)
    by_group = diagnostics["jensen_shannon_divergence"].groupby(labels_of(groups, diagnostics))
    order = by_group.median().sort_values().index
    axes = axes_or_new(axes, size=(5.5, 0.8 + 0.3 * len(order)))
    boxes = axes.boxplot(
        [by_group.get_group(name) for name in order],
        orientation="horizontal",
        sym=".",
        widths=0.6,
        patch_artist=True,
        medianprops={"color": "black"},
        flierprops={"markersize": 3, "markerfacecolor": "0.5", "markeredgecolor": "none"},
    )
    for box in boxes["boxes"]:
        box.set(facecolor=COLORS[4], edgecolor="0.3")
    axes.set_yticks(
        range(1, len(order) + 1),
        [f"{name} ({len(by_group.get_group(name))})" for name in order],
    )
    axes.set(xlabel="Jensen-Shannon divergence (nats)", title="divergence of the components")
    if n_components is not None:
        axes.axvline(np.log(n_components), linestyle=":", color="black", label="log A")
        axes.legend(frameon=False, loc="lower right", handlelength=1.8)
    return finish(axes, show=show, save=save)


def component_weights(
    posterior: AdaptedPosterior,
    *,
    axes: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes | None:
    """Weights of the components of adapted posteriors, cell by cell.

    A cell is a column. Cells are ordered by their largest weight: those on the right need one
    component, those on the left several. Components are ordered by weight within each cell.

    Parameters
    ----------
    posterior
        What :meth:`mixscvi.MixSCVI.get_adapted_posterior` returns.
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
        If `posterior` is none.

    Examples
    --------
    >>> import numpy as np, mixscvi
    >>> from mixscvi.model import AdaptedPosterior
    >>> weights = np.random.default_rng(0).dirichlet([1.0, 1.0, 1.0], size=50)
    >>> posterior = AdaptedPosterior(weights, *[None] * 8)
    >>> axes = mixscvi.pl.component_weights(posterior)
    """
    if not hasattr(posterior, "weights"):
        raise TypeError(
            f"posterior must be what get_adapted_posterior() returns, got {posterior!r:.60}"
        )
    weights = -np.sort(-posterior.weights, axis=1)
    weights = weights[np.argsort(weights[:, 0])]
    n_cells, n_components = weights.shape
    axes = axes_or_new(axes)
    bottom = np.zeros(n_cells)
    for place in range(n_components):
        top = bottom + weights[:, place]
        axes.fill_between(
            np.arange(n_cells + 1),
            np.append(bottom, bottom[-1]),
            np.append(top, top[-1]),
            step="post",
            color=COLORS[place % len(COLORS)],
            label=f"{place + 1}",
            linewidth=0,
        )
        bottom = top
    axes.set(
        xlim=(0, n_cells),
        ylim=(0, 1),
        xlabel="cells, by their largest weight",
        ylabel="weight",
        title="components of the adapted posteriors",
    )
    axes.legend(
        title="component,\nby weight", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    return finish(axes, show=show, save=save)
