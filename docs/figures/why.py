"""The README's picture: what one Gaussian misses, and what adaptation to exact posteriors gains.

Left, the core alone on a density of the plane. Right, cells that a trained ``scvi.model.SCVI`` has
not seen: k-hat and log p(x) by draws from its encoder, and from each cell's adapted posterior.

    python docs/figures/why.py            # draws why.png from why.csv
    python docs/figures/why.py --train    # trains and writes why.csv first
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse
from toy_targets import GRID, SPAN, fit, grid, ring, score

SEED, EPOCHS, DRAWS = 0, 150, 1000
COLUMNS = ["log_likelihood", "pareto_k", "effective_sample_size"]


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
    name = "one Gaussian" if n_components == 1 else f"{n_components}, trained together"
    axes.set_title(f"{name}\nKL divergence {kl:.2f} nats", fontsize=11)
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
    """Fit, train if asked to, and draw."""
    from mixscvi import pl

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true")
    path = Path(__file__).with_name("why.csv")
    if parser.parse_args().train:
        before, after = (table[COLUMNS] for table in diagnose())
        table = before.join(after, lsuffix="_encoder", rsuffix="_adapted")
        table.to_csv(path, float_format="%.5g", index_label="cell")
    table = pd.read_csv(path, index_col="cell")
    before, after = (
        table[[f"{column}_{proposal}" for column in COLUMNS]].set_axis(COLUMNS, axis=1)
        for proposal in ("encoder", "adapted")
    )
    figure = plt.figure(figsize=(12, 3.7), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1.3, 1.3))
    draw_ring(axes[0], 1)
    draw_ring(axes[1], 8)
    pl.adaptation(before, after, axes=(axes[2], axes[3]))
    axes[2].set_title(f"cells unseen by a trained scVI\n{axes[2].get_title()}", fontsize=11)
    axes[3].set_title("can they be trusted?\nonly left of the dotted line", fontsize=11)
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
