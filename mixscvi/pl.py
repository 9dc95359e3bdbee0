"""Figures of mixture posteriors and their diagnostics; drawn on given axes, or new ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from mixscvi.model import MixSCVI

__all__ = ["component_means", "divergence", "reliability", "training"]


def _axes(axes: Axes | None) -> Axes:
    if axes is not None:
        return axes
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def component_means(
    model: MixSCVI,
    *,
    groups: np.ndarray | pd.Series | None = None,
    indices: np.ndarray | None = None,
    axes: Axes | None = None,
) -> Axes:
    """UMAP of all component means, `n * A` points in one space.

    Where the components of a cell agree its points coincide; where they differ they spread.

    Parameters
    ----------
    model
        A trained model.
    groups
        Labels of the cells, to color by; by default the points are colored by component.
    indices
        Cells to show; all by default.
    axes
        Where to draw.

    Returns
    -------
    The axes.

    Examples
    --------
    >>> import mixscvi
    >>> adata = mixscvi.datasets.pbmc68k()
    >>> mixscvi.MixSCVI.setup_anndata(adata)
    >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> axes = mixscvi.pl.component_means(model, groups=adata.obs["cell_type"])
    """
    import anndata
    import pandas as pd
    import scanpy as sc

    loc = model.get_latent_mixture(indices=indices).loc
    n_cells, n_components, _ = loc.shape
    if groups is None:
        color, title = np.tile(np.arange(1, n_components + 1), n_cells), "component"
    else:
        chosen = np.asarray(groups) if indices is None else np.asarray(groups)[indices]
        if len(chosen) != n_cells:
            raise ValueError(f"groups must name {n_cells} cells, got {len(chosen)}")
        color, title = np.repeat(chosen, n_components), getattr(groups, "name", None) or "group"
    points = anndata.AnnData(
        obs=pd.DataFrame(
            {title: pd.Categorical(color)},
            index=[str(point) for point in range(n_cells * n_components)],
        ),
        obsm={"X_mean": loc.reshape(n_cells * n_components, -1)},
    )
    sc.pp.neighbors(points, use_rep="X_mean")
    sc.tl.umap(points)
    axes = _axes(axes)
    sc.pl.umap(
        points, color=title, title=f"means of {n_components} components", ax=axes, show=False
    )
    return axes


def divergence(
    diagnostics: pd.DataFrame,
    groups: np.ndarray | pd.Series,
    *,
    n_components: int | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Divergence between the components, cell type by cell type, ordered by its median.

    Parameters
    ----------
    diagnostics
        What :meth:`mixscvi.MixSCVI.get_posterior_diagnostics` returns.
    groups
        Label of each of its cells, in the same order.
    n_components
        If given, log A is marked: the divergence of components that do not overlap.
    axes
        Where to draw.

    Returns
    -------
    The axes.

    Examples
    --------
    >>> import pandas as pd, mixscvi
    >>> diagnostics = pd.DataFrame({"jensen_shannon_divergence": [0.1, 0.4, 0.9, 0.5]})
    >>> axes = mixscvi.pl.divergence(diagnostics, ["B", "B", "NK", "NK"], n_components=4)
    """
    import pandas as pd

    values = pd.Series(diagnostics["jensen_shannon_divergence"].to_numpy())
    by_group = values.groupby(np.asarray(groups, dtype=str))
    order = by_group.median().sort_values().index
    axes = _axes(axes)
    axes.boxplot([by_group.get_group(name) for name in order], orientation="horizontal", sym=".")
    axes.set_yticks(range(1, len(order) + 1), order)
    axes.set_xlabel("Jensen-Shannon divergence of the components (nats)")
    if n_components is not None:
        axes.axvline(np.log(n_components), linestyle=":", color="gray")
    return axes


def reliability(
    diagnostics: Mapping[str, pd.DataFrame], *, axes: tuple[Axes, Axes] | None = None
) -> tuple[Axes, Axes]:
    """Pareto k-hat and effective sample size over cells, model beside model.

    Parameters
    ----------
    diagnostics
        Tables of :meth:`mixscvi.MixSCVI.get_posterior_diagnostics` with the same number of draws,
        by the name of the model, such as ``"A = 1"`` and ``"A = 4"``.
    axes
        Where to draw: k-hat, and effective sample size.

    Returns
    -------
    Both axes.

    Examples
    --------
    >>> import pandas as pd, mixscvi
    >>> table = pd.DataFrame({"pareto_k": [0.3, 0.9], "effective_sample_size": [90.0, 12.0]})
    >>> k_axes, size_axes = mixscvi.pl.reliability({"A = 1": table, "A = 4": table})
    """
    if axes is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, table in diagnostics.items():
        k = table["pareto_k"]
        axes[0].ecdf(k, label=f"{name}: {(k < 0.7).mean():.0%} under 0.7")
        axes[1].ecdf(table["effective_sample_size"], label=name)
    axes[0].axvline(0.7, linestyle=":", color="gray")
    axes[0].set_xlabel("Pareto k-hat")
    axes[0].set_ylabel("share of cells")
    axes[1].set_xlabel("effective sample size (draws)")
    axes[1].set_xscale("log")
    for one in axes:
        one.legend()
    return axes


def training(
    histories: Mapping[str, Mapping[str, pd.DataFrame]],
    *,
    metric: str = "elbo",
    axes: Axes | None = None,
) -> Axes:
    """Training curves: dashed on the training cells, solid on the validation cells.

    Parameters
    ----------
    histories
        ``model.history`` by the name of the model.
    metric
        ``"elbo"``, ``"reconstruction_loss"`` or ``"kl_local"``; lower is better, as scvi-tools
        records it.
    axes
        Where to draw.

    Returns
    -------
    The axes.

    Raises
    ------
    ValueError
        If a history holds no such metric.

    Examples
    --------
    >>> import pandas as pd, mixscvi
    >>> history = {"elbo_train": pd.DataFrame({"elbo_train": [3.0, 2.0]})}
    >>> axes = mixscvi.pl.training({"A = 4": history})
    """
    axes = _axes(axes)
    for place, (name, history) in enumerate(histories.items()):
        known = [key for key in (f"{metric}_train", f"{metric}_validation") if key in history]
        if not known:
            raise ValueError(f"metric={metric!r} is not in the history of {name!r}")
        for key in known:
            validation = key.endswith("validation")
            curve = history[key].astype(float)
            axes.plot(
                curve.index,
                curve.iloc[:, 0],
                color=f"C{place}",
                linestyle="-" if validation else "--",
                label=f"{name}, {'validation' if validation else 'training'}",
            )
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{metric} (nats per cell, lower is better)")
    axes.legend()
    return axes
