"""Label transfer on ifnb: labels of the control cells known, those of the stimulated ones not.

scvi-tools' SCVI is trained on all cells and then SCANVI from it; MixSCVI and then MixSCANVI
likewise, with the same seeds, the same minibatches and for as many epochs. The labels of the
stimulated cells serve for nothing but the scores. A tenth of the control cells have their labels
held out as well: choices are to be made by those.

    python benchmarks/label_transfer.py            # every missing run, and the summary
    python benchmarks/label_transfer.py --summary  # the summary alone

One row per run, in results/label_transfer.csv. It resumes.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from common import RESULTS, machine, paired_difference, read_counts

from mixscvi.system import write_beside
from mixscvi.tables import markdown_table, run_missing

if TYPE_CHECKING:
    from anndata import AnnData
    from scvi.model import SCANVI

TABLE = RESULTS / "label_transfer.csv"
DATA, N_GENES = "ifnb", 2000
KNOWN, UNKNOWN = "CTRL", "STIM"
UNLABELED = "unlabeled"
BASELINE = "SCANVI"
MODELS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "MixSCANVI, A=4": {"n_components": 4},
}


class Run(NamedTuple):
    """What identifies a run."""

    model: str
    seed: int
    pretraining_epochs: int
    epochs: int


def train(adata: AnnData, run: Run, device: str) -> tuple[SCANVI, dict[str, float]]:
    """Pretrain and train one model; the seconds of both."""
    import scvi

    from mixscvi import MixSCANVI, MixSCVI

    options = MODELS[run.model]
    of_scvi, of_scanvi = (MixSCVI, MixSCANVI) if options else (scvi.model.SCVI, scvi.model.SCANVI)
    common = {
        "accelerator": device,
        "train_size": 0.9,
        "batch_size": 128,
        "enable_progress_bar": False,
    }
    scvi.settings.seed = run.seed
    of_scvi.setup_anndata(adata, batch_key="batch", labels_key="label")
    pretrained = of_scvi(adata, **options)
    start = time.perf_counter()
    pretrained.train(
        max_epochs=run.pretraining_epochs,
        plan_kwargs={"n_epochs_kl_warmup": run.pretraining_epochs // 2},
        **common,
    )
    between = time.perf_counter()
    scvi.settings.seed = run.seed
    model = of_scanvi.from_scvi_model(pretrained, unlabeled_category=UNLABELED)
    model.train(max_epochs=run.epochs, **common)
    seconds = {
        "pretraining_seconds": between - start,
        "training_seconds": time.perf_counter() - between,
    }
    return model, seconds


def score(model: SCANVI, types: np.ndarray, cells: Sequence[int], where: str) -> dict[str, float]:
    """Scores of predicted labels against the types of some cells."""
    from sklearn.metrics import accuracy_score, f1_score

    probabilities = model.predict(indices=np.asarray(cells), soft=True)
    predicted = probabilities.columns.to_numpy()[probabilities.to_numpy().argmax(1)]
    true = types[cells]
    column = probabilities.columns.get_indexer(true)
    of_true = probabilities.to_numpy()[np.arange(len(true)), column]
    confidence = probabilities.to_numpy().max(1)
    return {
        f"{where}_accuracy": accuracy_score(true, predicted),
        f"{where}_macro_f1": f1_score(true, predicted, average="macro", zero_division=0),
        f"{where}_cross_entropy": -np.log(np.clip(of_true, 1e-12, None)).mean(),
        f"{where}_confidence": confidence.mean(),
    }


def row(adata: AnnData, run: Run, device: str) -> dict[str, Any]:
    """Train one model and score it."""
    from mixscvi import MixSCANVI

    model, seconds = train(adata, run, device)
    types = adata.obs["cell_type"].astype(str).to_numpy()
    is_known = (adata.obs["batch"] == KNOWN).to_numpy()
    held_out = np.sort(model.validation_indices)
    scores = score(model, types, np.flatnonzero(~is_known), UNKNOWN)
    scores |= score(model, types, held_out[is_known[held_out]], f"held_out_{KNOWN}")
    dead = model.dead_components_ if isinstance(model, MixSCANVI) else {}
    rounded = {name: float(f"{value:.6g}") for name, value in (scores | seconds).items()}
    return run._asdict() | {"n_genes": adata.n_vars} | rounded | {"dead": len(dead)} | machine()


class Column(NamedTuple):
    """A column of the summary."""

    heading: str
    metric: str
    digits: int


COLUMNS = tuple(
    Column(f"{where} {measure}", f"{prefix}_{metric}", 4)
    for where, prefix in ((UNKNOWN, UNKNOWN), (f"held-out {KNOWN}", f"held_out_{KNOWN}"))
    for measure, metric in (
        ("accuracy", "accuracy"),
        ("macro F1", "macro_f1"),
        ("cross-entropy", "cross_entropy"),
    )
)


def summary() -> str:
    """The table, as Markdown."""
    runs = pd.read_csv(TABLE)
    baseline = runs[runs["model"] == BASELINE].set_index("seed")
    rows = []
    for heading, metric, digits in COLUMNS:
        row: dict[str, Any] = {"": heading}
        for model, own in ((model, runs[runs["model"] == model]) for model in MODELS):
            if own.empty:
                continue
            own = own.set_index("seed")
            row[model] = f"{own[metric].mean():.{digits}f}"
            if model != BASELINE:
                difference = paired_difference(own[metric], baseline[metric], digits)
                row[f"{model} less {BASELINE}"] = difference
        rows.append(row)
    epochs = ", ".join(f"{runs[name].max()} {name}" for name in ("pretraining_epochs", "epochs"))
    return (
        f"# Label transfer on {DATA}\n\n"
        f"Labels of {KNOWN} known, those of {UNKNOWN} not; {runs['n_genes'].max()} genes, "
        f"{epochs.replace('_', ' ')}. Means over {runs['seed'].nunique()} seeds, and the "
        "difference paired by seed, with its 95 % t-interval. Cross-entropy in nats.\n\n"
    ) + markdown_table(rows)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pretraining-epochs", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--device", default="auto", help="accelerator, as Lightning names it")
    parser.add_argument("--summary", action="store_true", help="write the summary alone")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if not args.summary:
        adata = read_counts(DATA, N_GENES)
        adata.obs["label"] = (
            adata.obs["cell_type"].astype(str).where(adata.obs["batch"] == KNOWN, UNLABELED)
        )
        runs = {
            f"{model}, seed {seed}": Run(model, seed, args.pretraining_epochs, args.epochs)
            for seed in range(args.seeds)
            for model in MODELS
        }

        def report(name: str, rows: list[dict]) -> None:
            shown = {metric: rows[-1][metric] for _, metric, _ in COLUMNS}
            print(name, shown, flush=True)

        run_missing(
            runs,
            lambda name, run, device: row(adata.copy(), run, device),
            TABLE,
            device=args.device,
            identity=Run._asdict,
            report=report,
        )
    write_beside(TABLE.with_suffix(".md"), summary())


if __name__ == "__main__":
    main()
