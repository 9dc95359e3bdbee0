"""What adaptive importance sampling reaches on real counts: trust, agreement and cost by model.

Each model is trained on four fifths of the cells; held-out cells are adapted twice, with
independent random numbers. The share of time beside the decoder is of the processor's seconds: take
one thread (OMP_NUM_THREADS=1), as threads that wait count as well.

    python benchmarks/adaptation.py               # resumes results/adaptation.csv
    python benchmarks/adaptation.py --data ifnb --n-latent 30 --seeds 1
    python benchmarks/adaptation.py --data pbmc4k --n-latent 10 --draws 3000
    python benchmarks/adaptation.py --n-latent 10 --standard-error 0.025 --seeds 20
    python benchmarks/adaptation.py --summary     # means over the seeds, from the CSV
"""

from __future__ import annotations

import argparse
import itertools
import logging
import time
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from common import RESULTS, machine, read_counts
from torch import Tensor

from mixscvi.tables import markdown_table, run_missing

N_GENES = {"cortex": 1200, "pbmc3k": 2000, "pbmc4k": 2000, "ifnb": 2000}
N_LATENT = (10, 30)
N_COMPONENTS = (1, 4)
METRICS = (
    "encoder_k_below_0.7",
    "k_below_0.7",
    "agree_within_0.15_nats",
    "agree_within_3_errors",
    "evaluations",
    "effective_sample_size",
    "share_beside_decoder",
    "seconds_per_cell",
)


class Stopwatch:
    """Processor seconds of this process spent in a log-joint, gradients included."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timing(self, log_joint: Callable[[Tensor, Tensor], Tensor]):
        """The same log-joint, with its time taken."""

        def timed(draws: Tensor, cells: Tensor) -> Tensor:
            start = time.process_time()
            values = log_joint(draws, cells)
            if draws.requires_grad:  # take the gradient here, where it is timed, and hand it on
                (score,) = torch.autograd.grad(values.sum(), draws)
                values = values.detach() + ((draws - draws.detach()) * score).sum(-1)
            self.seconds += time.process_time() - start
            return values

        return timed


def train(adata, n_components: int, n_latent: int, seed: int, epochs: int):
    """A model of four fifths of the cells."""
    import scvi

    from mixscvi import MixSCVI

    scvi.settings.seed = seed
    MixSCVI.setup_anndata(adata)
    model = MixSCVI(adata, n_components=n_components, n_latent=n_latent)
    model.train(
        max_epochs=epochs,
        train_size=0.8,
        validation_size=0.2,
        batch_size=128,
        plan_kwargs={"n_epochs_kl_warmup": epochs // 2},
        check_val_every_n_epoch=epochs,
        enable_progress_bar=False,
    )
    return model


def score(model, n_cells: int, n_draws: int, asked: float | None) -> dict[str, float]:
    """Adapt held-out cells twice, with `n_draws` fresh draws at the end, or more where asked."""
    cells = model.validation_indices[:n_cells]
    encoder = model.get_posterior_diagnostics(indices=cells)
    watch, make = Stopwatch(), model.module._log_joint
    model.module._log_joint = lambda *args: watch.timing(make(*args))
    start, processor = time.perf_counter(), time.process_time()
    one, other = (
        model.get_adapted_posterior(
            indices=cells,
            n_mc_samples=n_draws,
            batch_size=128,
            adapt_kwargs={"standard_error": asked},
            progress=False,
        )
        for _ in range(2)
    )
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    del model.module._log_joint  # the class has its own
    difference = abs(one.log_likelihood - other.log_likelihood)
    errors = np.hypot(one.standard_error, other.standard_error)
    both = [np.concatenate(pair) for pair in zip(one[4:8], other[4:8], strict=True)]
    pareto_k, log_likelihood, standard_error, n_evaluations = both
    # The standard error of log p(x) is that of the weights' mean: 1 / ESS - 1 / N is its square.
    # Where more than N were drawn, this is a little less than the ESS of all.
    ess = 1 / (standard_error**2 + 1 / n_draws)
    return {
        "encoder_k_below_0.7": (encoder["pareto_k"] < 0.7).mean(),
        "k_below_0.7": (pareto_k < 0.7).mean(),
        "agree_within_0.15_nats": (difference < 0.15).mean(),
        "agree_within_3_errors": (difference < 3 * errors).mean(),
        "largest_difference": difference.max(),
        "evaluations": n_evaluations.mean(),
        "effective_sample_size": ess.mean(),
        "log_likelihood": log_likelihood.mean(),
        "encoder_log_likelihood": encoder["log_likelihood"].mean(),
        "share_beside_decoder": 1 - watch.seconds / processor,
        "seconds_per_cell": seconds / len(pareto_k),
    }


def summary() -> str:
    """Means over the seeds as a table."""
    runs = pd.read_csv(RESULTS / "adaptation.csv")
    runs["standard_error"] = runs["standard_error"].astype(object).fillna("")
    groups = runs.groupby(["data", "D", "A", "draws", "standard_error"])
    means = groups[list(METRICS)].mean().round(3)
    means.insert(0, "seeds", groups.size())
    return markdown_table(means.reset_index().astype(object).to_dict("records"))


def main() -> None:
    """Run what the table lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=N_GENES, default=list(N_GENES))
    parser.add_argument("--n-latent", nargs="+", type=int, default=N_LATENT)
    parser.add_argument("--n-components", nargs="+", type=int, default=N_COMPONENTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(10, 11))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--cells", type=int, default=128)
    parser.add_argument("--draws", type=int, default=1000, help="fresh draws at the end")
    parser.add_argument("--standard-error", type=float, help="of log p(x), asked of each cell")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        print(summary())
        return
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    runs = {}
    for seed, n_latent, data, a in itertools.product(
        args.seeds, args.n_latent, args.data, args.n_components
    ):
        asked = "" if args.standard_error is None else args.standard_error
        runs[f"{data}, D={n_latent}, A={a}, seed {seed}, {args.draws} draws {asked}"] = {
            "data": data,
            "D": n_latent,
            "A": a,
            "seed": seed,
            "epochs": args.epochs,
            "cells": args.cells,
            "draws": args.draws,
            "standard_error": asked,
        }
    read: dict[str, object] = {}

    def row(name: str, key: dict, device: None) -> dict:
        data = key["data"]
        if data not in read:
            read.clear()
            read[data] = read_counts(data, N_GENES[data])
        model = train(read[data], key["A"], key["D"], key["seed"], key["epochs"])
        scores = score(model, key["cells"], key["draws"], key["standard_error"] or None)
        scores = {name: float(f"{value:.6g}") for name, value in scores.items()}
        return {**key, **scores, **machine()}

    def report(name: str, rows: list[dict]) -> None:
        print(name, {metric: rows[-1][metric] for metric in METRICS}, flush=True)

    run_missing(runs, row, RESULTS / "adaptation.csv", identity=dict, report=report)


if __name__ == "__main__":
    main()
