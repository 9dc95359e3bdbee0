"""The README's picture: what one Gaussian misses, and what adaptation to the exact posteriors gains.

Left, the core alone on a density of the plane. Right, cells that a trained ``scvi.model.SCVI`` has
not seen: k-hat and log p(x) by draws from its encoder, and from each cell's adapted posterior.

    python docs/figures/why.py    # writes why.png and why.csv beside itself
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse
from toy_targets import GRID, SPAN, fit, grid, ring, score

SEED, EPOCHS, DRAWS = 0, 150, 1000


def draw_ring(axes: Axes, n_components: int) -> None:
    """A ring, and the mixture fitted to it."""
    q = fit(ring, n_components, joint=True, seed=SEED)
    kl, _ = score(q, ring)
    density = ring(grid()).exp().reshape(GRID, GRID).T
    axes.imshow(density, origin="lower", extent=[-SPAN, SPAN, -SPAN, SPAN], cmap="Greys")
    for a in range(n_components):
        width, height = (4 * q.component_scale[0, a]).tolist()
        center = q.component_loc[0, a].tolist()
        axes.add_patch(Ellipse(center, width, height, fill=False, edgecolor=f"C{a}", linewidth=2))
    axes.set_title(f"A = {n_components}: {kl:.2f} nats\nfrom the posterior")
    axes.set(xticks=[], yticks=[])


def diagnose() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Unseen cells of a trained scVI, by its encoder's posterior and by the exact one."""
    import scvi

    import mixscvi

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    scvi.settings.seed = SEED
    adata = mixscvi.datasets.pbmc68k()
    scvi.model.SCVI.setup_anndata(adata)
    trained = scvi.model.SCVI(adata)
    trained.train(
        max_epochs=EPOCHS,
        train_size=0.8,
        validation_size=0.2,
        plan_kwargs={"n_epochs_kl_warmup": EPOCHS // 2},
        enable_progress_bar=False,
    )
    model = mixscvi.MixSCVI.from_scvi_model(trained)
    cells = {"indices": model.validation_indices, "n_mc_samples": DRAWS}
    before = model.get_posterior_diagnostics(**cells)
    after = model.get_posterior_diagnostics(**cells, proposal="adapted", progress=False)
    return before, after


def main() -> None:
    """Fit, train and draw."""
    from mixscvi import pl

    here = Path(__file__).parent
    before, after = diagnose()
    columns = ["log_likelihood", "pareto_k", "effective_sample_size"]
    table = before[columns].join(after[columns], lsuffix="_encoder", rsuffix="_adapted")
    table.to_csv(here / "why.csv", float_format="%.5g", index_label="cell")
    figure = plt.figure(figsize=(13, 3.5), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1.35, 1.35))
    draw_ring(axes[0], 1)
    draw_ring(axes[1], 8)
    pl.adaptation(before, after, axes=(axes[2], axes[3]))
    figure.savefig(here / "why.png", dpi=110)


if __name__ == "__main__":
    main()
