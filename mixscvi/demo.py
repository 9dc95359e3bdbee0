"""Train scVI and MixSCVI on real counts and compare them: ``python -m mixscvi.demo``."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import tyro
from tqdm import tqdm

from mixscvi.system import keep_freed_memory, write_beside
from mixscvi.tables import mean_and_spread

if TYPE_CHECKING:
    from anndata import AnnData
    from scvi.model import SCVI

    from mixscvi.model import AdaptedPosterior, LatentMixture, MixSCVI

__all__ = ["Demo", "HeldOut", "compare", "main"]

_BATCH_SIZE = 128
_HELD_OUT = 0.2
_WARM_UP = 256  # cells
# How long they take, about, in epochs of the cells that come with the package.
_EPOCHS_TO_SCORE, _EPOCHS_TO_CLUSTER = 30, 20
_COLUMNS = {
    "log_likelihood": "held-out log-likelihood per cell",
    "trusted": "cells with k-hat < 0.7",
    "ari": "ARI",
    "nmi": "NMI",
    "seconds": "training (s)",
}


@dataclass
class Demo:
    """Train scVI and MixSCVI on the same cells and print how they compare.

    Both see the same training cells in the same number of epochs. The held-out fifth of the cells
    is scored by adaptive importance sampling. Leiden clusters of the latents are compared with the
    labels (ARI, NMI) over all cells.
    """

    components: int = 4
    """Components of MixSCVI's posterior."""
    seeds: int = 2
    """Runs of each model, with seeds 0, 1, ..."""
    epochs: int = 100
    """Passes over the training cells; the KL term warms up over the first half."""
    draws: int = 400
    """Importance samples per held-out cell from its adapted posterior, for each model."""
    adata: Path | None = None
    """An .h5ad file with raw counts; by default, the PBMC counts that scanpy ships."""
    layer: str | None = None
    """Layer of the file with the counts; X by default."""
    label_key: str | None = None
    """Column of obs with the cell types; without one, ARI and NMI are left out."""
    batch_key: str | None = None
    """Column of obs with the batches to integrate over."""
    output: Path = Path("mixscvi-demo")
    """Folder for the .h5ad with latents and diagnostics, the figures and the table."""


def _load(demo: Demo) -> tuple[AnnData, str | None]:
    """Read the cells, and name the column of their labels."""
    if demo.adata is None:
        from mixscvi import datasets

        for option, value in (("--batch-key", demo.batch_key), ("--layer", demo.layer)):
            if value is not None:
                raise SystemExit(f"{option} needs --adata: the built-in data have none")
        adata = datasets.pbmc68k()
        _check_columns(adata, demo)
        return adata, demo.label_key or "cell_type"
    import anndata

    if not demo.adata.is_file():
        raise SystemExit(f"--adata: no such file: {demo.adata}")
    adata = anndata.read_h5ad(demo.adata)
    _check_columns(adata, demo)
    if demo.layer is not None and demo.layer not in adata.layers:
        raise SystemExit(f"--layer {demo.layer!r} is not one of: {', '.join(adata.layers)}")
    return adata, demo.label_key


def _check_columns(adata: AnnData, demo: Demo) -> None:
    """Leave, naming the option, if a column is not there."""
    for option, key in (("--label-key", demo.label_key), ("--batch-key", demo.batch_key)):
        if key is not None and key not in adata.obs:
            raise SystemExit(
                f"{option} {key!r} is not a column of obs, which has: "
                f"{', '.join(map(str, adata.obs.columns)) or 'none'}"
            )


def _train(
    model_cls: type[SCVI], adata: AnnData, demo: Demo, seed: int, bar: tqdm, **model_kwargs: Any
) -> tuple[SCVI, float]:
    """Train one model; return it with the seconds that training took."""
    import scvi
    from lightning.pytorch.callbacks import LambdaCallback

    scvi.settings.seed = seed
    model_cls.setup_anndata(adata, layer=demo.layer, batch_key=demo.batch_key)
    model = model_cls(adata, **model_kwargs)
    start = time.perf_counter()
    model.train(
        max_epochs=demo.epochs,
        train_size=1 - _HELD_OUT,
        validation_size=_HELD_OUT,
        batch_size=_BATCH_SIZE,
        plan_kwargs={"n_epochs_kl_warmup": max(1, demo.epochs // 2)},
        check_val_every_n_epoch=max(1, demo.epochs // 10),
        enable_progress_bar=False,
        callbacks=[LambdaCallback(on_train_epoch_end=lambda *_: bar.update())],
    )
    return model, time.perf_counter() - start


def _warm_up(
    adata: AnnData, demo: Demo, models: Iterable[tuple[type[SCVI], dict[str, Any]]]
) -> None:
    """Train and cluster once with some cells, so that no time below has that of compiling in it."""
    some = adata[:_WARM_UP].copy()
    with warnings.catch_warnings():  # these models are not kept
        warnings.simplefilter("ignore")
        for model_cls, kwargs in models:
            _train(model_cls, some, replace(demo, epochs=1), 0, tqdm(disable=True), **kwargs)
        some.obsm["X_noise"] = np.random.default_rng(0).normal(size=(some.n_obs, 2))
        _cluster(some, "X_noise", umap=True)


def _cluster(adata: AnnData, latent: str, *, umap: bool) -> np.ndarray:
    """Leiden clusters of a latent space; on request with a UMAP of it, left in ``obsm``."""
    import scanpy as sc
    import torch

    n_threads = torch.get_num_threads()
    key = latent.removeprefix("X_")
    sc.pp.neighbors(adata, use_rep=latent, key_added=key)
    if umap:
        sc.tl.umap(adata, neighbors_key=key, key_added=f"X_umap_{key}")
    sc.tl.leiden(
        adata,
        neighbors_key=key,
        key_added=f"leiden_{key}",
        flavor="igraph",
        n_iterations=2,
        directed=False,
    )
    torch.set_num_threads(n_threads)  # scanpy's compiled functions have set it to all cores
    return adata.obs[f"leiden_{key}"].to_numpy()


@dataclass
class HeldOut:
    """Cells that a model has not seen."""

    before: pd.DataFrame
    """By the encoder's posterior, a row per cell."""
    after: pd.DataFrame
    """By the exact posterior."""
    cell: tuple[AdaptedPosterior, LatentMixture]
    """One cell that is ordinary by its k-hat: draws from its exact posterior, and its encoder's."""


def _with_a_cell(scored: MixSCVI, before: pd.DataFrame, after: pd.DataFrame) -> HeldOut:
    by_k = before["pareto_k"].to_numpy().argsort()
    cell = scored.validation_indices[by_k[[len(by_k) // 2]]]
    drawn = scored.get_adapted_posterior(
        indices=cell, n_mc_samples=4000, n_draws=1500, progress=False
    )
    return HeldOut(before, after, (drawn, scored.get_latent_mixture(indices=cell)))


def _diagnose(scored: MixSCVI, demo: Demo) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The held-out cells, by the encoder's posterior and by the exact one."""
    cells = scored.validation_indices
    draws = {"indices": cells, "n_mc_samples": demo.draws}
    return (
        scored.get_posterior_diagnostics(**draws),
        scored.get_posterior_diagnostics(**draws, proposal="adapted", progress=False),
    )


def compare(
    demo: Demo, adata: AnnData, label_key: str | None
) -> tuple[pd.DataFrame, dict[str, HeldOut]]:
    """Train both models for every seed.

    Parameters
    ----------
    demo
        How to train them.
    adata
        The cells; the latents, UMAPs and diagnostics of seed 0 are added to them.
    label_key
        Column of ``obs`` with the cell types, if there is one.

    Returns
    -------
    One row per model and seed; and by model, what seed 0 says of the held-out cells.

    Examples
    --------
    >>> import mixscvi
    >>> adata = mixscvi.datasets.pbmc68k()
    >>> runs, held_out = compare(
    ...     Demo(components=2, seeds=1, epochs=1, draws=25), adata, "cell_type"
    ... )
    >>> runs.shape, [*held_out]
    ((2, 7), ['scVI', 'MixSCVI, A = 2'])
    """
    from scvi.model import SCVI
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    from mixscvi import MixSCVI

    mixture = f"MixSCVI, A = {demo.components}"
    models: dict[str, tuple[str, type[SCVI], dict[str, Any]]] = {
        "scVI": ("X_scvi", SCVI, {}),
        mixture: ("X_mixscvi", MixSCVI, {"n_components": demo.components}),
    }
    _say("compiling (the first time takes a while)")
    _warm_up(adata, demo, ((model_cls, kwargs) for _, model_cls, kwargs in models.values()))
    records, held_out = [], {}
    # In units of an epoch, which is what tells how long the rest will take.
    per_model = demo.epochs + _EPOCHS_TO_SCORE + _EPOCHS_TO_CLUSTER
    with (
        warnings.catch_warnings(),
        tqdm(
            total=2 * demo.seeds * per_model,
            bar_format="{desc:<34} {percentage:3.0f} %|{bar}| {elapsed} < {remaining}",
            smoothing=0,  # by the average speed: steps of one kind come in blocks
            file=sys.stderr,
        ) as bar,
    ):
        # The table and the picture say which proposals can be trusted.
        warnings.filterwarnings("ignore", message=".* no good (proposal|one)")
        for seed in reversed(range(demo.seeds)):  # seed 0 last: its latents are to be kept
            for name, (latent, model_cls, kwargs) in models.items():
                bar.set_description(f"seed {seed}: training {name}")
                model, seconds = _train(model_cls, adata, demo, seed, bar, **kwargs)
                bar.set_description(f"seed {seed}: exact posteriors")
                # The same estimator for both: scVI is MixSCVI with one component.
                scored = model if model_cls is MixSCVI else MixSCVI.from_scvi_model(model)
                adata.obsm[latent] = model.get_latent_representation()
                before, after = _diagnose(scored, demo)
                record = {"model": name, "seed": seed, "seconds": seconds}
                record["log_likelihood"] = after["log_likelihood"].mean()
                record["trusted"] = (after["pareto_k"] < 0.7).mean()
                bar.update(_EPOCHS_TO_SCORE)
                bar.set_description(f"seed {seed}: clusters")
                clusters = _cluster(adata, latent, umap=seed == 0)
                if label_key is not None:
                    labels = adata.obs[label_key].astype(str).to_numpy()
                    record["ari"] = adjusted_rand_score(labels, clusters)
                    record["nmi"] = normalized_mutual_info_score(labels, clusters)
                records.append(record)
                if seed == 0:
                    diagnostics = scored.get_posterior_diagnostics(n_mc_samples=demo.draws)
                    for column in diagnostics:
                        adata.obs[f"{latent.removeprefix('X_')}_{column}"] = diagnostics[column]
                    held_out[name] = _with_a_cell(scored, before, after)
                bar.update(_EPOCHS_TO_CLUSTER)
        bar.set_description("done")
    return pd.DataFrame(records), held_out


def _format(runs: pd.DataFrame) -> str:
    """The table: a row per model and one for the paired difference, as mean and spread."""
    columns = [column for column in _COLUMNS if column in runs]
    by_model = {name: rows.set_index("seed")[columns] for name, rows in runs.groupby("model")}
    first, second = runs["model"].unique()
    rows = {
        first: by_model[first],
        second: by_model[second],
        "difference": by_model[second] - by_model[first],
    }
    cells = [["", *(_COLUMNS[column] for column in columns)]]
    for name, values in rows.items():
        line = [name]
        for column in columns:
            digits = 3 if column in ("ari", "nmi") else 2
            line.append(mean_and_spread(values[column], digits, signed=name == "difference"))
        cells.append(line)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def _draw_umaps(adata: AnnData, label_key: str | None, path: Path) -> None:
    """Both UMAPs by cell type, and MixSCVI's by the divergence of each cell's components."""
    import matplotlib.pyplot as plt
    import scanpy as sc

    color = label_key or "leiden_mixscvi"
    fig, axes = plt.subplots(1, 3, figsize=(17, 4.6), layout="constrained")
    for ax, basis, column, title, legend in (
        (axes[0], "umap_scvi", color, "scVI", "none"),
        (axes[1], "umap_mixscvi", color, "MixSCVI", "right margin"),
        (
            axes[2],
            "umap_mixscvi",
            "mixscvi_jensen_shannon_divergence",
            "MixSCVI: divergence of the components (nats)",
            "none",
        ),
    ):
        sc.pl.embedding(
            adata,
            basis=f"X_{basis}",
            color=column,
            title=title,
            legend_loc=legend,
            frameon=False,
            size=60 if adata.n_obs < 5000 else None,
            ax=ax,
            show=False,
        )
    fig.savefig(path, dpi=120, format="png")
    plt.close(fig)


def _draw_why(held_out: dict[str, HeldOut], path: Path) -> None:
    """A held-out cell's posterior in both models; what exact posteriors say of all, by scVI."""
    import matplotlib.pyplot as plt

    from mixscvi import pl

    fig = plt.figure(figsize=(14, 4.1), layout="constrained")
    widths = (1, 1, 1.25, 1.25)
    axes = fig.subplots(1, 4, width_ratios=widths)
    for ax, (name, cells) in zip(axes, held_out.items(), strict=False):
        pl.posterior(*cells.cell, axes=ax)
        ax.set_title(f"a cell that {name.partition(',')[0]}\nhas not seen", fontsize=11)
    scvi = held_out["scVI"]
    pl.adaptation(scvi.before, scvi.after, axes=(axes[2], axes[3]))
    axes[2].set_title(f"all cells unseen by scVI\n{axes[2].get_title()}", fontsize=11)
    axes[3].set_title("can they be trusted?\nonly left of the dotted line", fontsize=11)
    for ax, width in zip(axes, widths, strict=True):  # of one height
        ax.set_box_aspect(1 / width)
    fig.savefig(path, dpi=110, format="png")
    plt.close(fig)


def _table(held_out: dict[str, HeldOut]) -> pd.DataFrame:
    """What the first figure shows: a row per model and held-out cell."""
    columns = ["log_likelihood", "pareto_k", "effective_sample_size"]
    tables = {
        name: cells.before[columns]
        .add_suffix("_encoder")
        .join(cells.after[columns].add_suffix("_adapted"))
        for name, cells in held_out.items()
    }
    return pd.concat(tables, names=["model", "cell"])


def _spread(seeds: int) -> str:
    """What the table's ± is, of so many seeds."""
    if seeds == 1:
        return "one seed, so without a spread"
    of_two = ", of two 0.71 of how far they are apart" if seeds == 2 else ""
    return f"mean ± sample standard deviation over {seeds} seeds{of_two}"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(args: list[str] | None = None) -> None:
    """Run the demo from the command line."""
    demo = tyro.cli(Demo, args=args, prog="python -m mixscvi.demo")
    for option in ("components", "seeds", "epochs"):
        if getattr(demo, option) < 1:
            raise SystemExit(f"--{option} must be at least 1, got {getattr(demo, option)}")
    if demo.draws < 25:
        raise SystemExit(f"--draws must be at least 25, got {demo.draws}")
    _say("importing (the first time takes a while)")
    import scvi

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    keep_freed_memory()
    adata, label_key = _load(demo)
    demo.output.mkdir(parents=True, exist_ok=True)
    runs, held_out = compare(demo, adata, label_key)

    h5ad, why, umap, csv, cells = (
        demo.output / name
        for name in ("cells.h5ad", "why.png", "umap.png", "runs.csv", "held_out.csv")
    )
    import matplotlib

    matplotlib.use("Agg")
    for path, write in (
        (why, lambda p: _draw_why(held_out, p)),
        (umap, lambda p: _draw_umaps(adata, label_key, p)),
        (h5ad, adata.write_h5ad),
        (csv, lambda p: runs.to_csv(p, index=False)),
        (cells, lambda p: _table(held_out).to_csv(p, float_format="%.5g")),
    ):
        write_beside(path, write)

    n_held_out = int(_HELD_OUT * adata.n_obs)
    print(
        f"\n{adata.n_obs} cells x {adata.n_vars} genes, {n_held_out} cells held out, "
        f"{demo.epochs} epochs\n{_spread(demo.seeds)}\n"
    )
    print(_format(runs))
    print(
        f"\nLog-likelihood in nats, by adaptive importance sampling: {demo.draws} draws per cell "
        "from its adapted posterior.\n"
        f"Wrote {h5ad} (latents, UMAPs, per-cell diagnostics), {why} and what it shows, {cells}, "
        f"{umap} and {csv}."
    )


if __name__ == "__main__":
    main()
