"""Held-out log-likelihood of scVI (A = 1) and MixSCVI on real counts.

Models of one data set and seed see the same training cells for as many epochs, and are scored on
the same held-out cells: by draws from each cell's adapted posterior, whose k-hat says whether to
trust them, and by draws from the encoder's, which shows how much of a difference is the proposal's.

    python benchmarks/held_out.py train --models runs/held_out            # every missing model
    python benchmarks/held_out.py score --models runs/held_out --data cortex
    python benchmarks/held_out.py summary                                 # results/held_out.md

Each stage resumes; `score` leaves out models that are not trained yet, and writes the summary too.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from common import RESULTS, agreement, kmeans, machine, paired_difference, read_counts

from mixscvi.system import write_beside
from mixscvi.tables import markdown_table, run_missing

if TYPE_CHECKING:
    from anndata import AnnData

    from mixscvi import MixSCVI


class Data(NamedTuple):
    """How much of a data set is used."""

    n_genes: int
    n_cells: int
    """Held-out cells that are scored, at most. Differences vary most between cells of cortex."""


DATA = {"cortex": Data(1200, 256), "pbmc4k": Data(2000, 160), "pbmc3k": Data(2000, 160)}
BASELINE = "A=1"
MODELS = {
    BASELINE: {"n_components": 1},
    "A=4": {"n_components": 4},
    # As many decoder evaluations a step as four components take.
    "A=1, L=4": {"n_components": 1, "n_samples": 4},
}
PRIORS = ("normal", "vamp")
LARGEST_K = 0.7


class Trained(NamedTuple):
    """What identifies a trained model."""

    data: str
    model: str
    prior: str
    seed: int
    epochs: int

    def folder(self, models: Path) -> Path:
        """Where it is kept."""
        name = f"{self.model}_{self.prior}_seed{self.seed}".replace(", ", "_").replace("=", "")
        return models / self.data / f"epochs{self.epochs}" / name


def of_benchmark(data: Sequence[str], seeds: int, epochs: int) -> Iterator[Trained]:
    """All models, seeds outermost: what an interrupt leaves has every model of the first seeds."""
    for seed in range(seeds):
        for name in data:
            for model in MODELS:
                for prior in PRIORS:
                    yield Trained(name, model, prior, seed, epochs)


def train(adata: AnnData, trained: Trained, folder: Path, device: str) -> None:
    """Train one model and save it."""
    import scvi

    from mixscvi import MixSCVI

    scvi.settings.seed = trained.seed
    MixSCVI.setup_anndata(adata)
    model = MixSCVI(adata, prior=trained.prior, **MODELS[trained.model])
    model.train(
        max_epochs=trained.epochs,
        accelerator=device,
        train_size=0.8,
        validation_size=0.2,
        batch_size=128,
        plan_kwargs={"n_epochs_kl_warmup": trained.epochs // 2},
        check_val_every_n_epoch=trained.epochs,
        enable_progress_bar=False,
    )
    model.save(folder)


def score(model: MixSCVI, seed: int, n_cells: int, draws: int) -> dict[str, float]:
    """Score `n_cells` held-out cells, the same of all models of a data set and seed."""
    import scanpy as sc
    import scvi

    scvi.settings.seed = seed
    held_out = np.sort(model.validation_indices)
    if n_cells < len(held_out):
        held_out = np.random.default_rng(seed).choice(held_out, n_cells, replace=False)
    scores = {}
    for proposal in ("adapted", "encoder"):
        cells = model.get_posterior_diagnostics(
            indices=held_out,
            n_mc_samples=draws,
            batch_size=64,
            proposal=proposal,
            progress=False if proposal == "adapted" else None,
        )
        scores |= {
            f"{proposal}_log_likelihood": cells["log_likelihood"].mean(),
            f"{proposal}_k_below_{LARGEST_K}": (cells["pareto_k"] < LARGEST_K).mean(),
            f"{proposal}_effective_sample_size": cells["effective_sample_size"].mean(),
        }
        if proposal == "adapted":
            error = np.sqrt(np.square(cells["standard_error"]).mean() / len(cells))
            scores["adapted_standard_error"] = error
            scores["adapted_evaluations"] = cells["n_evaluations"].mean()
        else:
            scores["miselbo"] = cells["miselbo"].mean()
            scores["jensen_shannon_divergence"] = cells["jensen_shannon_divergence"].mean()
    adata, types = model.adata, model.adata.obs["cell_type"]
    adata.obsm["X_latent"] = model.get_latent_representation()
    sc.pp.neighbors(adata, use_rep="X_latent")
    sc.tl.leiden(adata, flavor="igraph", n_iterations=2, directed=False)
    for name, clusters in (
        ("kmeans", kmeans(adata.obsm["X_latent"], types.nunique(), seed)),
        ("leiden", adata.obs["leiden"]),
    ):
        scores |= {f"{name}_{key}": value for key, value in agreement(types, clusters).items()}
    rounded = {name: float(f"{value:.6g}") for name, value in scores.items()}
    return {"n_cells": len(held_out)} | rounded


def score_missing(adata: AnnData, data: str, seeds: int, args: argparse.Namespace) -> None:
    """Add a row to the data set's table for each trained model of the first seeds that has none."""
    from mixscvi import MixSCVI

    runs = {
        " ".join(map(str, trained)): trained
        for trained in of_benchmark([data], seeds, args.epochs)
        if trained.folder(args.models).exists()
    }
    n_cells = DATA[data].n_cells if args.cells is None else args.cells

    def identity(trained: Trained) -> dict[str, Any]:
        return trained._asdict() | {"most_cells": n_cells, "draws": args.draws}

    def row(name: str, trained: Trained, device: str) -> dict[str, Any]:
        folder = trained.folder(args.models)
        model = MixSCVI.load(folder, adata=adata.copy(), accelerator=device)
        scores = score(model, trained.seed, n_cells, args.draws)
        return identity(trained) | {"n_genes": adata.n_vars} | scores | machine()

    def report(name: str, rows: list[dict]) -> None:
        print(name, {column.metric: rows[-1][column.metric] for column in LIKELIHOODS}, flush=True)

    path = RESULTS / f"held_out_{data}.csv"
    run_missing(runs, row, path, device=args.device, identity=identity, report=report)


class Column(NamedTuple):
    """A column of the summary."""

    heading: str
    metric: str
    digits: int
    compared: bool = True


LIKELIHOODS = (
    Column("adapted", "adapted_log_likelihood", 2),
    Column(f"k-hat < {LARGEST_K}", f"adapted_k_below_{LARGEST_K}", 3, compared=False),
    Column("ESS", "adapted_effective_sample_size", 0, compared=False),
    Column("evaluations", "adapted_evaluations", 0, compared=False),
    Column("encoder", "encoder_log_likelihood", 2),
    Column(f"its k-hat < {LARGEST_K}", f"encoder_k_below_{LARGEST_K}", 3, compared=False),
    Column("MISELBO", "miselbo", 2),
)
CLUSTERS = tuple(
    Column(f"{method} {measure}", f"{method}_{measure.lower()}", 3)
    for method in ("kmeans", "leiden")
    for measure in ("ARI", "NMI")
)


def of(runs: pd.DataFrame, prior: str, model: str) -> pd.DataFrame:
    """The runs of one prior and model, by seed."""
    return runs[(runs["prior"] == prior) & (runs["model"] == model)].set_index("seed")


def table(runs: pd.DataFrame, columns: Sequence[Column]) -> str:
    """One row per prior and model: mean over seeds, and difference from A = 1 of that prior."""
    rows = []
    for prior in PRIORS:
        baseline = of(runs, prior, BASELINE)
        for model in MODELS:
            own = of(runs, prior, model)
            if own.empty:
                continue
            row = {"prior": prior, "model": model, "seeds": len(own)}
            for heading, metric, digits, compared in columns:
                row[heading] = f"{own[metric].mean():.{digits}f}"
                if compared:
                    row[f"{heading} - {BASELINE}"] = (
                        ""
                        if model == BASELINE
                        else paired_difference(own[metric], baseline[metric], digits)
                    )
            rows.append(row)
    return markdown_table(rows)


def table_of_priors(runs: pd.DataFrame) -> str:
    """Difference of the VampPrior from the standard normal prior, by model."""
    columns = (LIKELIHOODS[0], *CLUSTERS)
    rows = [
        {"model": model}
        | {
            heading: paired_difference(
                *(of(runs, prior, model)[metric] for prior in ("vamp", "normal")), digits
            )
            for heading, metric, digits, _ in columns
        }
        for model in MODELS
    ]
    return markdown_table(rows)


def summary() -> str:
    """All tables, as Markdown."""
    parts = [
        "# Log-likelihood of held-out cells\n\n"
        "Means over seeds, and differences paired by seed with their 95 % t-intervals. "
        "Log-likelihoods are in nats per cell: *adapted* by draws from each cell's adapted "
        "posterior, *encoder* by draws from the encoder's, which is a lower bound in effect "
        f"where few cells have k-hat below {LARGEST_K}. ESS: effective sample size of the adapted "
        "draws; evaluations: of the decoder, per cell, for them; L: importance samples in "
        "training.\n"
    ]
    for data in DATA:
        path = RESULTS / f"held_out_{data}.csv"
        if not path.exists():
            continue
        runs = pd.read_csv(path)
        if runs.duplicated(["prior", "model", "seed"]).any():
            raise SystemExit(f"{path} has several rows of one model: keep those of one setting")
        cells, genes, draws = (runs[name].max() for name in ("n_cells", "n_genes", "draws"))
        parts += [
            f"\n## {data}: {cells} held-out cells, {genes} genes, {draws} draws\n\n",
            table(runs, LIKELIHOODS),
            "\nClusters of all cells' latent means against their annotated types:\n\n",
            table(runs, CLUSTERS),
            "\nVampPrior minus standard normal prior:\n\n",
            table_of_priors(runs),
        ]
    return "".join(parts)


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    trainer, scorer = stages.add_parser("train"), stages.add_parser("score")
    stages.add_parser("summary")
    for stage in (trainer, scorer):
        stage.add_argument("--models", type=Path, required=True, help="folder of trained models")
        stage.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
        stage.add_argument("--seeds", type=int, default=5)
        stage.add_argument("--epochs", type=int, default=50)
        stage.add_argument("--device", default="auto", help="accelerator, as Lightning names it")
    scorer.add_argument("--cells", type=int, help="most held-out cells to score")
    scorer.add_argument("--draws", type=int, default=1000, help="draws per cell")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    # The encoder's columns are there to show what this warns of.
    warnings.filterwarnings("ignore", message="the encoder's posterior is no good proposal")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if args.stage != "summary":
        counts = {name: read_counts(name, DATA[name].n_genes) for name in args.data}
    if args.stage == "train":
        for trained in of_benchmark(args.data, args.seeds, args.epochs):
            folder = trained.folder(args.models)
            if not folder.exists():
                train(counts[trained.data], trained, folder, args.device)
                print("trained", *trained, flush=True)
        return
    if args.stage == "score":
        for seeds in range(1, args.seeds + 1):
            for data, adata in counts.items():
                score_missing(adata, data, seeds, args)
            write_beside(RESULTS / "held_out.md", summary())
    else:
        write_beside(RESULTS / "held_out.md", summary())


if __name__ == "__main__":
    main()
