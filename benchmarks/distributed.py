"""Held-out bound of two processes against that of one, at the same global batch.

    python benchmarks/distributed.py --seeds 5   # writes results/distributed.csv
    python benchmarks/distributed.py --summary   # that table alone, in short

Both train on the same cells of pbmc3k. Lightning starts the second process: this program again.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings

import numpy as np
import pandas as pd
from common import RESULTS, machine, paired_difference, read_counts

from mixscvi.system import write_beside
from mixscvi.tables import csv_text, markdown_table, mean_and_spread, read_rows

TABLE = RESULTS / "distributed.csv"
BATCH = 128


def held_out_bound(adata, seed: int, processes: int, options: argparse.Namespace) -> float:
    import scvi
    import torch

    import mixscvi

    cells = np.random.default_rng(0).permutation(adata.n_obs)
    n_held_out = adata.n_obs // 5
    mixscvi.MixSCVI.setup_anndata(adata)
    scvi.settings.seed = seed
    model = mixscvi.MixSCVI(adata, n_components=options.components)
    several = {"strategy": "ddp", "devices": processes} if processes > 1 else {"devices": 1}
    model.train(
        max_epochs=options.epochs,
        batch_size=BATCH // processes,
        datasplitter_kwargs={
            "external_indexing": [cells[n_held_out:], cells[:n_held_out], np.array([], dtype=int)]
        },
        plan_kwargs={"n_epochs_kl_warmup": options.epochs // 2},
        accelerator="cpu",
        enable_progress_bar=False,
        **several,
    )
    torch.manual_seed(seed)
    return float(model.get_elbo(indices=cells[:n_held_out]))


def summary() -> str:
    """Bounds by number of processes, against the spread over seeds of one process."""
    bounds: dict[tuple[str, str], dict[str, float]] = {}
    for row in read_rows(TABLE):
        key = row["processes"], row["batch_size_of_each"]
        bounds.setdefault(key, {})[row["seed"]] = float(row["held_out_bound"])
    alone = pd.Series(next(of for (processes, _), of in bounds.items() if processes == "1"))
    lines = []
    for (processes, batch_size), of in bounds.items():
        values = pd.Series(of)
        furthest = (values - alone.mean()).abs().max() / alone.std()
        lines.append(
            {
                "processes": processes,
                "minibatch of each": batch_size,
                "seeds": len(values),
                "held-out bound (nats per cell)": mean_and_spread([*values]),
                "least and most": f"{values.min():.2f}, {values.max():.2f}",
                "furthest from the mean of one process (its standard deviations)": (
                    f"{furthest:.1f}"
                ),
                "difference from one process, seed by seed": (
                    "" if processes == "1" else paired_difference(values, alone, 2)
                ),
            }
        )
    return markdown_table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--components", type=int, default=4)
    parser.add_argument("--summary", action="store_true", help="of what has been measured")
    options = parser.parse_args()
    if options.summary:
        print(summary())
        return
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    adata = read_counts("pbmc3k", options.genes)
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    rows = []
    for processes in (1, 2):
        if processes == 1 and not is_first:
            continue
        for seed in range(options.seeds):
            bound = held_out_bound(adata, seed, processes, options)
            rows.append(
                {
                    "data": "pbmc3k",
                    "genes": options.genes,
                    "components": options.components,
                    "epochs": options.epochs,
                    "processes": processes,
                    "batch_size_of_each": BATCH // processes,
                    "seed": seed,
                    "held_out_bound": round(bound, 4),
                }
                | machine()
            )
            if is_first:
                print(rows[-1], flush=True)
    if is_first:
        write_beside(TABLE, csv_text(rows))
        print(summary())


if __name__ == "__main__":
    main()
