"""Held-out bound of two processes against that of one, at the same global batch.

    python benchmarks/distributed.py --seeds 5   # writes results/distributed.csv

Both train on the same cells of pbmc3k. Lightning starts the second process: this program again.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import warnings

import numpy as np
from common import RESULTS, machine, read_counts

from mixscvi.system import write_beside
from mixscvi.tables import csv_text, mean_and_spread

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--components", type=int, default=4)
    options = parser.parse_args()
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
        write_beside(RESULTS / "distributed.csv", csv_text(rows))
        for processes in (1, 2):
            bounds = [r["held_out_bound"] for r in rows if r["processes"] == processes]
            print(f"{processes} processes: {mean_and_spread(bounds)}")
            print(f"from {min(bounds)} to {max(bounds)}, mean {statistics.fmean(bounds)}")


if __name__ == "__main__":
    main()
