"""Adapted posteriors of held-out cells against long runs of Hamiltonian Monte Carlo.

The chains know nothing of the adaptation but a change of coordinates, which leaves what they
converge to alone: Pyro's no-U-turn sampler, started at draws of the encoder, on scvi-tools' own
likelihood. Means and standard deviations are compared in Monte-Carlo standard errors of both.

    python benchmarks/mcmc.py            # writes results/mcmc.csv
    python benchmarks/mcmc.py --summary
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from adaptation import N_GENES, train
from common import RESULTS, machine, read_counts
from torch import Tensor
from torch.distributions import Normal

from mixscvi.system import write_beside
from mixscvi.tables import csv_text


class Moments(NamedTuple):
    """Means and standard deviations of cells, `(n, D)`, and their Monte-Carlo standard errors."""

    mean: Tensor
    error_of_mean: Tensor
    sd: Tensor
    error_of_sd: Tensor


def by_adaptation(model, cells, n_repeats: int) -> Moments:
    """From independent adaptations, whose spread is the error."""
    draws = [
        model.get_adapted_posterior(
            indices=cells, n_mc_samples=4000, n_draws=2000, progress=False
        ).draws
        for _ in range(n_repeats)
    ]
    of_each = torch.from_numpy(np.stack(draws)).double()  # (R, N, n, D)
    means, sds = of_each.mean(1), of_each.std(1)
    root = n_repeats**0.5
    return Moments(means.mean(0), means.std(0) / root, sds.mean(0), sds.std(0) / root)


def by_chains(model, cells, n_chains: int, n_steps: int, n_warmup: int) -> tuple[Moments, Tensor]:
    """From chains that run over all cells at once; and the split R-hat of each cell, `(n,)`."""
    from pyro.infer.mcmc import MCMC, NUTS
    from pyro.ops.stats import effective_sample_size, split_gelman_rubin

    x = torch.from_numpy(model.adata[cells].X.toarray()).float()
    library, batch = x.sum(1, keepdim=True).log(), torch.zeros(len(x), 1)
    adapted = model.get_adapted_posterior(indices=cells, progress=False)
    largest = adapted.weights.argmax(1)
    rows = np.arange(len(x))
    loc = torch.from_numpy(adapted.loc[rows, largest]).double()
    tril = torch.from_numpy(adapted.scale_tril[rows, largest]).double()
    encoder = model.get_latent_mixture(indices=cells)
    module = model.module.eval().requires_grad_(False)

    def latents(whitened: Tensor) -> Tensor:
        return loc + torch.einsum("nde,...ne->...nd", tril, whitened)

    def potential(parameters: dict[str, Tensor]) -> Tensor:
        z = latents(parameters["whitened"]).float()
        px = module.generative(z, library, batch)["px"]
        log_joint = px.log_prob(x).double().sum() + Normal(0.0, 1.0).log_prob(z).double().sum()
        return -log_joint

    chains = []
    for _ in range(n_chains):
        component = np.random.randint(encoder.loc.shape[1])
        start = torch.from_numpy(encoder.loc[:, component]).double()
        start = start + torch.from_numpy(encoder.scale[:, component]) * torch.randn_like(start)
        whitened = torch.linalg.solve_triangular(tril, (start - loc).unsqueeze(-1), upper=False)
        sampler = MCMC(
            NUTS(potential_fn=potential, max_tree_depth=6),
            num_samples=n_steps,
            warmup_steps=n_warmup,
            initial_params={"whitened": whitened.squeeze(-1)},
            disable_progbar=True,
        )
        sampler.run()
        chains.append(latents(sampler.get_samples()["whitened"]))
    z = torch.stack(chains)  # (C, N, n, D)
    mean, sd = z.mean((0, 1)), z.flatten(0, 1).std(0)
    squares = (z - mean).square()
    error_of_mean = sd / effective_sample_size(z).sqrt()
    error_of_variance = squares.flatten(0, 1).std(0) / effective_sample_size(squares).sqrt()
    moments = Moments(mean, error_of_mean, sd, error_of_variance / (2 * sd))
    return moments, split_gelman_rubin(z).amax(-1)


def compare(model, cells, args: argparse.Namespace) -> list[dict]:
    """One row per cell."""
    ours = by_adaptation(model, cells, args.repeats)
    theirs, r_hat = by_chains(model, cells, args.chains, args.steps, args.warmup)
    of_mean = (ours.mean - theirs.mean) / ours.error_of_mean.hypot(theirs.error_of_mean)
    of_sd = (ours.sd - theirs.sd) / ours.error_of_sd.hypot(theirs.error_of_sd)
    in_sds = (ours.mean - theirs.mean).abs() / theirs.sd
    columns = {
        "r_hat": r_hat,
        "mean_rms_errors": of_mean.square().mean(-1).sqrt(),
        "mean_most_errors": of_mean.abs().amax(-1),
        "sd_rms_errors": of_sd.square().mean(-1).sqrt(),
        "sd_most_errors": of_sd.abs().amax(-1),
        "mean_most_sds": in_sds.amax(-1),
        "sd_ratio_least": (ours.sd / theirs.sd).amin(-1),
        "sd_ratio_most": (ours.sd / theirs.sd).amax(-1),
    }
    return [
        {name: float(f"{values[row]:.4g}") for name, values in columns.items()}
        for row in range(len(cells))
    ]


def main() -> None:
    """Compare, and write one row per cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=N_GENES, default="pbmc3k")
    parser.add_argument("--n-latent", type=int, default=10)
    parser.add_argument("--n-components", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=16)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    path = RESULTS / "mcmc.csv"
    if args.summary:
        print(pd.read_csv(path).describe().loc[["mean", "min", "max"]].T.round(3).to_string())
        return
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    adata = read_counts(args.data, N_GENES[args.data])
    model = train(adata, args.n_components, args.n_latent, args.seed, args.epochs)
    cells = model.validation_indices[: args.cells]
    key = {"data": args.data, "D": args.n_latent, "A": args.n_components, "seed": args.seed}
    rows = compare(model, cells, args)
    named = zip(adata.obs_names[cells], rows, strict=True)
    write_beside(path, csv_text({**key, "cell": name, **row, **machine()} for name, row in named))


if __name__ == "__main__":
    main()
