"""Mixtures fitted to black-box densities in the plane, jointly and one component at a time.

No encoder and no data: the core alone. Trained jointly (MISELBO), components share the target out
among themselves; trained independently, each on its own ELBO, they crowd together.

    python docs/figures/toy_targets.py    # writes toy_targets.png and toy_targets.csv beside itself
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mixscvi.mixture import MixturePosterior, miselbo, mixture_log_prob

COMPONENTS = (1, 2, 4, 8)
N_STEPS, N_DRAWS, LEARNING_RATE = 1500, 16, 0.02
SPAN, GRID = 6.0, 400


def ring(z: Tensor) -> Tensor:
    """Unnormalized log-density of a ring of radius 3 and width 0.4."""
    return -0.5 * ((z.norm(dim=-1) - 3.0) / 0.4).square()


def two_modes(z: Tensor) -> Tensor:
    """Unnormalized log-density of two bent modes at (-2, 0) and (2, 0)."""
    bend = z[..., 1] - 0.25 * (z[..., 0].square() - 4.0)
    width = 0.5 * ((z[..., 0].abs() - 2.0) / 0.6).square()
    return -width - 0.5 * (bend / 0.5).square()


TARGETS: dict[str, Callable[[Tensor], Tensor]] = {"ring": ring, "two modes": two_modes}


def grid() -> Tensor:
    """Points of a square grid, `(GRID**2, 2)`."""
    axis = torch.linspace(-SPAN, SPAN, GRID, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


def log_normalizer(target: Callable[[Tensor], Tensor]) -> float:
    """log Z of a target, by summing over the grid."""
    cell = (2 * SPAN / (GRID - 1)) ** 2
    return target(grid()).logsumexp(0).item() + math.log(cell)


def fit(
    target: Callable[[Tensor], Tensor],
    n_components: int,
    *,
    joint: bool,
    seed: int,
    n_steps: int = N_STEPS,
) -> MixturePosterior:
    """Fit `A` Gaussians to a target by stochastic gradient ascent.

    Parameters
    ----------
    target
        Unnormalized log-density of points `(..., 2)`.
    n_components
        Number of components, `A`.
    joint
        Whether the components maximize MISELBO together, or each its own ELBO.
    seed
        Seeds the start (the same for both ways) and the draws.
    n_steps
        Gradient steps.

    Returns
    -------
    The mixture, with batch shape `(1,)`.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (1, n_components, 2)
    loc = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    log_scale = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([loc, log_scale], lr=LEARNING_RATE)
    for _ in range(n_steps):
        q = MixturePosterior(loc, log_scale.exp())
        z = q.rsample_stratified(N_DRAWS, generator=generator)
        cross = q.cross_log_prob(z)
        log_q = mixture_log_prob(cross) if joint else cross.diagonal(dim1=-2, dim2=-1)
        loss = -miselbo(target(z) - log_q).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return MixturePosterior(loc.detach(), log_scale.detach().exp())


def score(
    q: MixturePosterior, target: Callable[[Tensor], Tensor], n_draws: int = 4000
) -> tuple[float, float]:
    """KL divergence from the mixture to the target, and the components' divergence, in nats."""
    generator = torch.Generator().manual_seed(0)
    z = q.rsample_stratified(n_draws, generator=generator)
    log_q = mixture_log_prob(q.cross_log_prob(z))
    kl = log_normalizer(target) - miselbo(target(z) - log_q).item()
    return kl, q.jensen_shannon_divergence(n_draws, generator).item()


class Shown(NamedTuple):
    """A fitted mixture, and how good it is."""

    kl: float
    divergence: float
    q: MixturePosterior


def draw(shown: Mapping[tuple[str, bool, int], Shown], path: Path) -> None:
    """Draw mixtures by target, whether they were trained together, and number of components."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Ellipse

    rows = [(name, joint) for name in TARGETS for joint in (True, False)]
    figure = Figure(figsize=(2 * len(COMPONENTS), 2.35 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(COMPONENTS))
    for row, (name, joint) in zip(axes, rows, strict=True):
        density = TARGETS[name](grid()).exp().reshape(GRID, GRID).T
        row[0].set_ylabel(f"{name}, trained {'together' if joint else 'apart'}")
        for ax, n_components in zip(row, COMPONENTS, strict=True):
            one = shown[name, joint, n_components]
            ax.imshow(density, origin="lower", extent=[-SPAN, SPAN, -SPAN, SPAN], cmap="Greys")
            for a in range(n_components):
                width, height = (4 * one.q.component_scale[0, a]).tolist()
                ax.add_patch(
                    Ellipse(
                        one.q.component_loc[0, a].tolist(),
                        width,
                        height,
                        facecolor="none",
                        edgecolor=f"C{a}",
                        linewidth=1.6,
                    )
                )
            ax.set_title(
                f"A = {n_components}\nKL {one.kl:.2f}, JSD {one.divergence:.2f}", fontsize=10
            )
            ax.set_xticks([])
            ax.set_yticks([])
    figure.savefig(path, dpi=110)


def main() -> None:
    """Fit all, and write the table and the figure of the median fits."""
    import pandas as pd

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    n_seeds = parser.parse_args().seeds
    here = Path(__file__).parent
    rows, shown = [], {}
    for name, target in TARGETS.items():
        for joint in (True, False):
            for n_components in COMPONENTS:
                fits = []
                for seed in range(n_seeds):
                    q = fit(target, n_components, joint=joint, seed=seed)
                    fits.append(Shown(*score(q, target), q))
                    rows.append(
                        {
                            "target": name,
                            "training": "joint" if joint else "independent",
                            "n_components": n_components,
                            "seed": seed,
                            "kl_to_target": fits[-1].kl,
                            "jensen_shannon_divergence": fits[-1].divergence,
                        }
                    )
                median = sorted(fits, key=lambda one: one.kl)[n_seeds // 2]
                shown[name, joint, n_components] = median
    draw(shown, here / "toy_targets.png")
    table = pd.DataFrame(rows)
    table.to_csv(here / "toy_targets.csv", index=False, float_format="%.5g")
    means = table.groupby(["target", "n_components", "training"])[
        ["kl_to_target", "jensen_shannon_divergence"]
    ].mean()
    print(means.unstack().round(3).to_string())


if __name__ == "__main__":
    main()
