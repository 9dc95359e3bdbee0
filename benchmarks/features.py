"""The mixture papers' feature protocol, on the cortex models that held_out.py trained.

A linear support vector machine classifies the annotated types of the cells, on splits of them
that are the same for all models of a seed; k-means clusters the same features. The features of
four components are their means and variances; those of one component are as many numbers, made of
posterior samples. Beside them: one component's means and variances, and every model's latent mean.

    python benchmarks/features.py --models runs/held_out   # resumes results/features_cortex.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from common import RESULTS, agreement, kmeans, machine, paired_difference, read_counts
from held_out import BASELINE, DATA, MODELS, PRIORS, Trained, of_benchmark

from mixscvi.system import write_beside
from mixscvi.tables import markdown_table, mean_and_spread, run_missing

if TYPE_CHECKING:
    from mixscvi import MixSCVI

CORTEX = "cortex"
MOST_COMPONENTS = max(options["n_components"] for options in MODELS.values())
# C of the support vector machine: the papers', and one that lets few numbers say as much as many.
PENALTIES = (0.025, 1.0)
TABLE = RESULTS / "features_cortex.csv"


def samples(model: MixSCVI) -> np.ndarray:
    """As many posterior samples as make the numbers of the largest model's parameters."""
    draws = [model.get_latent_representation(give_mean=False) for _ in range(2 * MOST_COMPONENTS)]
    return np.concatenate(draws, axis=1)


def parameters(model: MixSCVI) -> np.ndarray:
    """Means and variances of all components."""
    return model.get_latent_representation(representation="parameters")


def mean(model: MixSCVI) -> np.ndarray:
    """Mean of the posterior."""
    return model.get_latent_representation()


FEATURES: dict[str, Callable[[MixSCVI], np.ndarray]] = {
    "samples": samples,
    "parameters": parameters,
    "mean": mean,
}


def score(features: np.ndarray, types: pd.Series, seed: int, splits: int) -> dict[str, float]:
    """Accuracy on a fifth of the cells over the splits, and agreement of clusters with types."""
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    scores = {}
    for penalty in PENALTIES:
        accuracy = cross_val_score(
            make_pipeline(StandardScaler(), SVC(kernel="linear", C=penalty)),
            features,
            types,
            cv=StratifiedShuffleSplit(splits, test_size=0.2, random_state=seed),
        )
        scores[f"accuracy_C{penalty}"] = accuracy.mean()
        scores[f"accuracy_C{penalty}_sd_over_splits"] = accuracy.std(ddof=1)
    clusters = agreement(types, kmeans(features, types.nunique(), seed))
    scores |= {f"kmeans_{name}": value for name, value in clusters.items()}
    rounded = {name: float(f"{value:.6g}") for name, value in scores.items()}
    return {"n_features": features.shape[1]} | rounded


def score_missing(args: argparse.Namespace) -> None:
    """Add a row to the table for each trained model and its features that has none."""
    import scvi

    from mixscvi import MixSCVI

    adata = read_counts(CORTEX, DATA[CORTEX].n_genes)
    runs = {
        " ".join(map(str, (*trained, features))): (trained, features)
        for trained in of_benchmark([CORTEX], args.seeds, args.epochs)
        if trained.folder(args.models).exists()
        for features in FEATURES
        # The components' posterior samples are not a feature of the papers.
        if features != "samples" or MODELS[trained.model]["n_components"] == 1
    }

    def identity(run: tuple[Trained, str]) -> dict[str, Any]:
        trained, features = run
        return trained._asdict() | {"features": features, "splits": args.splits}

    def row(name: str, run: tuple[Trained, str], device: str) -> dict[str, Any]:
        trained, features = run
        folder = trained.folder(args.models)
        model = MixSCVI.load(folder, adata=adata.copy(), accelerator=device)
        scvi.settings.seed = trained.seed
        values = FEATURES[features](model)
        scores = score(values, adata.obs["cell_type"], trained.seed, args.splits)
        return identity(run) | scores | machine()

    def report(name: str, rows: list[dict]) -> None:
        print(name, rows[-1][f"accuracy_C{PENALTIES[0]}"], flush=True)

    run_missing(runs, row, TABLE, device=args.device, identity=identity, report=report)


def summary() -> str:
    """Means over seeds, and paired differences from the samples of A = 1, as Markdown."""
    runs = pd.read_csv(TABLE)
    if runs.duplicated(["prior", "model", "features", "seed"]).any():
        raise SystemExit(f"{TABLE} has several rows of one model: keep those of one setting")
    metrics = {f"accuracy, C = {penalty}": (f"accuracy_C{penalty}", 4) for penalty in PENALTIES}
    metrics |= {"k-means ARI": ("kmeans_ari", 3), "k-means NMI": ("kmeans_nmi", 3)}
    by_kind = {
        kind: own.set_index("seed") for kind, own in runs.groupby(["prior", "model", "features"])
    }
    rows = []
    for prior in PRIORS:
        baseline = (prior, BASELINE, "samples")
        for model in MODELS:
            for features in FEATURES:
                kind = (prior, model, features)
                if kind not in by_kind:
                    continue
                own = by_kind[kind]
                row = {
                    "prior": prior,
                    "model": model,
                    "features": f"{own['n_features'].iloc[0]} {features}",
                }
                for heading, (metric, digits) in metrics.items():
                    row[heading] = mean_and_spread(own[metric], digits)
                    row[f"{heading}: difference"] = (
                        ""
                        if kind == baseline
                        else paired_difference(own[metric], by_kind[baseline][metric], digits)
                    )
                rows.append(row)
    return (
        "# Cell types of cortex from posterior features\n\n"
        "Accuracy of a linear support vector machine on standardized features, over "
        f"{runs['splits'].max()} stratified splits with a fifth of the cells for the test; and "
        "k-means on the features as they are; against `cell_type`. Mean ± standard deviation over "
        f"{runs['seed'].nunique()} seeds; differences are from the samples of {BASELINE} with the "
        "same prior, paired by seed, with their 95 % t-intervals. L: importance samples in "
        "training.\n\n" + markdown_table(rows)
    )


def main() -> None:
    """Score what the table lacks, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of trained models")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--device", default="auto", help="accelerator, as Lightning names it")
    args = parser.parse_args()
    score_missing(args)
    write_beside(TABLE.with_suffix(".md"), summary())


if __name__ == "__main__":
    main()
