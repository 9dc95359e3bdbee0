"""Held-out likelihood and proposal quality of scVI (A = 1) and MixSCVI on real counts.

Every model sees the same training cells in the same number of epochs, and is scored on the
held-out fifth with the same number of decoder evaluations per cell.

    python benchmarks/held_out.py --data cortex   # resumes results/held_out_cortex.csv
    python benchmarks/held_out.py --data pbmc3k
    python benchmarks/held_out.py --summary       # prints the paired comparison from the CSVs
"""

from __future__ import annotations

import argparse
import logging
import warnings

import pandas as pd
from common import RESULTS, machine, read_counts

from mixscvi.tables import mean_and_spread, run_missing

DATA = {"cortex": 1200, "pbmc3k": 2000}
MODELS = {
    "A=1": {"n_components": 1},
    "A=4": {"n_components": 4},
}
METRICS = ["log_likelihood", "miselbo", "pareto_k_below_0.7", "effective_sample_size", "ari", "nmi"]


def run(adata, kwargs: dict, seed: int, epochs: int, draws: int, device: str) -> dict[str, float]:
    """Train one model and score it."""
    import scanpy as sc
    import scvi
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    from mixscvi import MixSCVI

    scvi.settings.seed = seed
    MixSCVI.setup_anndata(adata)
    model = MixSCVI(adata, **kwargs)
    model.train(
        max_epochs=epochs,
        accelerator=device,
        train_size=0.8,
        validation_size=0.2,
        batch_size=128,
        plan_kwargs={"n_epochs_kl_warmup": epochs // 2},
        check_val_every_n_epoch=epochs,
        enable_progress_bar=False,
    )
    held_out = model.validation_indices
    cells = model.get_posterior_diagnostics(indices=held_out, n_mc_samples=draws)
    adata.obsm["X_latent"] = model.get_latent_representation()
    sc.pp.neighbors(adata, use_rep="X_latent")
    sc.tl.leiden(adata, flavor="igraph", n_iterations=2, directed=False)
    labels, clusters = adata.obs["cell_type"], adata.obs["leiden"]
    return {
        "log_likelihood": cells["log_likelihood"].mean(),
        "miselbo": cells["miselbo"].mean(),
        "pareto_k_below_0.7": (cells["pareto_k"] < 0.7).mean(),
        "pareto_k_median": cells["pareto_k"].median(),
        "effective_sample_size": cells["effective_sample_size"].mean(),
        "jensen_shannon_divergence": cells["jensen_shannon_divergence"].mean(),
        "ari": adjusted_rand_score(labels, clusters),
        "nmi": normalized_mutual_info_score(labels, clusters),
    }


def summary() -> str:
    """Mean of each metric, and the paired difference from A = 1 with its spread over seeds."""
    runs = pd.concat(pd.read_csv(path) for path in sorted(RESULTS.glob("held_out_*.csv")))
    lines = []
    for data, rows in runs.groupby("data"):
        table = rows.pivot(index="seed", columns="model", values=METRICS)
        for metric in METRICS:
            for model in [name for name in MODELS if name in table[metric]]:
                values = table[metric][model].dropna()
                line = f"{data:8} {metric:24} {model:14} {values.mean():10.3f}"
                if model != "A=1":
                    gain = (table[metric][model] - table[metric]["A=1"]).dropna()
                    better = int((gain > 0).sum())
                    line += f"  {mean_and_spread(gain, 3, signed=True)}"
                    line += f"  above A=1 in {better} of {len(gain)} seeds"
                lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Run what the table lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="auto", help="accelerator, as Lightning names it")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", choices=DATA)
    what.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        print(summary())
        return
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    adata = read_counts(args.data, DATA[args.data])
    runs = {
        f"{name}, seed {seed}": {
            "model": name,
            "seed": seed,
            "epochs": args.epochs,
            "draws": args.draws,
        }
        for seed in range(args.seeds)
        for name in MODELS
    }

    def row(name: str, key: dict, device: str) -> dict:
        scores = run(adata, MODELS[key["model"]], key["seed"], args.epochs, args.draws, device)
        scores = {name: float(f"{score:.6g}") for name, score in scores.items()}
        return {"data": args.data, **key, "n_genes": adata.n_vars, **scores, **machine()}

    def report(name: str, rows: list[dict]) -> None:
        print(name, {metric: rows[-1][metric] for metric in METRICS}, flush=True)

    path = RESULTS / f"held_out_{args.data}.csv"
    run_missing(runs, row, path, device=args.device, identity=dict, report=report)


if __name__ == "__main__":
    main()
