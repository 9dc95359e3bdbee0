"""The posterior of one cell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mixscvi.pl.drawing import COLORS, axes_or_new, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mixscvi.model import AdaptedPosterior, LatentMixture

__all__ = ["posterior"]


def posterior(
    adapted: AdaptedPosterior,
    encoder: LatentMixture,
    cell: int = 0,
    *,
    axes: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes | None:
    """Exact posterior of one cell, and the Gaussians that the encoder gives it.

    Draws from the exact posterior are points. They are shown in the plane of their two largest
    principal axes, in units of their standard deviation along the first one. The encoder's
    components are ellipses of two standard deviations.

    Parameters
    ----------
    adapted
        What :meth:`mixscvi.MixSCVI.get_adapted_posterior` returns when it is asked for draws.
    encoder
        What :meth:`mixscvi.MixSCVI.get_latent_mixture` returns of the same cells.
    cell
        Which of these cells.
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
    IndexError
        If there is no such cell.
    TypeError
        If it is not named by its position, or `adapted` or `encoder` is something else.
    ValueError
        If there are fewer than two draws or latents, or other latents than the encoder's: draws
        lie behind a flow, its components ahead of it.

    Examples
    --------
    >>> import numpy as np, mixscvi
    >>> from mixscvi.model import AdaptedPosterior, LatentMixture
    >>> draws = np.random.default_rng(0).normal(size=(200, 1, 3))  # (n_draws, n, D)
    >>> adapted = AdaptedPosterior(*[None] * 8, draws)
    >>> encoder = LatentMixture(np.zeros((1, 4, 3)), 0.5 * np.ones((1, 4, 3)))  # (n, A, D)
    >>> axes = mixscvi.pl.posterior(adapted, encoder, cell=0)
    """
    from matplotlib.patches import Ellipse

    for argument, value, name in (("adapted", adapted, "draws"), ("encoder", encoder, "loc")):
        if not hasattr(value, name):
            made_by = {"draws": "get_adapted_posterior", "loc": "get_latent_mixture"}[name]
            raise TypeError(f"{argument} must be what {made_by}() returns, got {value!r:.60}")
    if adapted.draws is None or len(adapted.draws) < 2:
        raise ValueError("adapted has no draws: ask get_adapted_posterior for some by n_draws")
    n_cells, n_components, n_latent = encoder.loc.shape
    if adapted.draws.shape[1:] != (n_cells, n_latent) or n_latent < 2:
        raise ValueError(
            "adapted and encoder must be of the same cells and at least two latents, got draws of "
            f"shape {adapted.draws.shape} and means of shape {encoder.loc.shape}"
        )
    if isinstance(cell, bool) or not isinstance(cell, (int, np.integer)):
        raise TypeError(f"cell must be the position of one of the {n_cells} cells, got {cell!r}")
    if not -n_cells <= cell < n_cells:
        raise IndexError(f"cell={cell}, but there are {n_cells} cells")
    draws = adapted.draws[:, cell].astype(float)
    center = draws.mean(0)
    _, lengths, directions = np.linalg.svd(draws - center, full_matrices=False)
    unit = lengths[0] / np.sqrt(len(draws) - 1)
    plane = directions[:2].T / unit  # (D, 2)
    axes = axes_or_new(axes, size=(4.2, 4))
    points = (draws - center) @ plane
    axes.scatter(
        points[:, 0],
        points[:, 1],
        s=6,
        color="0.55",
        alpha=0.5,
        linewidth=0,
        label="exact posterior",
    )
    for a in range(n_components):
        middle = (encoder.loc[cell, a] - center) @ plane
        covariance = plane.T @ (encoder.scale[cell, a, :, None] ** 2 * plane)
        variances, sides = np.linalg.eigh(covariance)
        width, height = 4 * np.sqrt(variances)
        axes.add_patch(
            Ellipse(
                middle,
                width,
                height,
                angle=np.degrees(np.arctan2(sides[1, 0], sides[0, 0])),
                fill=False,
                edgecolor=COLORS[a % len(COLORS)],
                linewidth=2,
                label=None if a else "encoder, 2 sd",
            )
        )
    axes.autoscale_view()
    # Square whatever the draws, so that cells side by side are level.
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(
        box_aspect=1,
        xlabel="first principal axis (sd)",
        ylabel="second principal axis (sd)",
        title="posterior of a cell",
    )
    axes.legend(
        frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, markerscale=2.5
    )
    return finish(axes, show=show, save=save)
