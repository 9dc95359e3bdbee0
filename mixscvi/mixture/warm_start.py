"""The first proposal of an adaptation: from the start's draws, from scores, and from ascents."""

from __future__ import annotations

import torch
from torch import Tensor

from mixscvi.mixture.population import Memory
from mixscvi.mixture.posterior import MixturePosterior
from mixscvi.mixture.score_matching import (
    cholesky,
    match_scores,
    squared_distance,
    weighted_moments,
)
from mixscvi.mixture.student_mixture import StudentMixture
from mixscvi.mixture.targets import Target, working

__all__ = ["warm_start"]

# Chosen by measurement on trained models of gene counts, D = 10 and 30.
_N_START = 100
_START_INFLATION = 1.2  # of the starting components' standard deviations
_ASCENT_WEIGHT = 0.2  # of the modes found by ascents together, beside the fitted Gaussian
_LEAST_ASCENTS = 4  # one finds a second mode much less often
_SCORE_RATES = (1000.0, 100.0, 30.0, 10.0, 4.0)  # one per step; the lower, the longer the memory
_MOST_RATE = 1e5  # of the first step, which is as large as the target's squared distance in widths
_N_ASCENT_STEPS = 4
_FIT_INFLATION = 1.1  # of the fitted Gaussian's variances
_ASCENT_INFLATION = 2.5  # of the same about the modes that the starting components found


def warm_start(target: Target, start: MixturePosterior, dof: int) -> tuple[StudentMixture, Memory]:
    """A proposal of ``1 + max(A, 4)`` components, and the draws that were made for it.

    Parameters
    ----------
    target
        The density.
    start
        Where to begin, batch shape `(B,)`.
    dof
        Degrees of freedom of the proposal.

    Raises
    ------
    ValueError
        If the density is zero at all draws of the start.
    """
    start_loc, scale = working(start.component_loc), working(start.component_scale)
    first = StudentMixture(
        torch.full_like(scale[..., 0], 1 / scale.shape[1]),
        start_loc,
        torch.diag_embed(_START_INFLATION * scale),
        dof,
    )
    draws = target.draw(first, _N_START)
    memory = Memory(first, draws, target.values(draws, _everyone(start_loc)))
    hopeless = memory.log_joint.isneginf().all(0)
    if hopeless.any():
        raise ValueError(
            f"log_joint is minus infinity at all {_N_START} draws from start for the cells "
            f"{hopeless.nonzero().flatten()[:5].tolist()}"
        )
    center, covariance = weighted_moments(draws.to(scale), memory.flattened_weights(_N_START / 3))
    # Some thirty draws do not make a covariance: half of what they say of correlations is kept.
    covariance = 0.5 * (covariance + torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1)))
    center, covariance = _fit_scores(target, memory, center, covariance)

    modes = first.loc
    missing = _LEAST_ASCENTS - modes.shape[1]
    if missing > 0:
        more = first.sample((missing,), target.generator)
        modes = torch.cat((modes, more.transpose(0, 1)), 1)
    modes = _ascend(target, modes, covariance)
    inflation = torch.full_like(modes[:, :, 0], _ASCENT_INFLATION)
    inflation = torch.cat((torch.full_like(inflation[:, :1], _FIT_INFLATION), inflation), 1)
    shares = torch.full_like(inflation, _ASCENT_WEIGHT / modes.shape[1])
    shares[:, 0] = 1 - _ASCENT_WEIGHT
    proposal = StudentMixture(
        shares,
        torch.cat((center.unsqueeze(1), modes), 1),
        cholesky(inflation[..., None, None] * covariance.unsqueeze(1)),
        dof,
    )
    return proposal, memory


def _everyone(of_cells: Tensor) -> Tensor:
    return torch.arange(len(of_cells), device=of_cells.device)


def _fit_scores(
    target: Target, memory: Memory, loc: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Fit a Gaussian to the target's scores, from a mean `(B, D)` and covariance `(B, D, D)`.

    Every step's draws are added to the memory.
    """
    everyone = _everyone(loc)
    n_draws = max(2 * loc.shape[-1], 8)
    for step, rate in enumerate(_SCORE_RATES):
        gaussian = StudentMixture(
            torch.ones_like(loc[:, :1]),
            loc.unsqueeze(1),
            cholesky(covariance).unsqueeze(1),
            None,
        )
        draws = target.draw(gaussian, n_draws)
        log_joint, scores = target.scores(draws, everyone)
        memory.add(gaussian, draws, log_joint)
        counting: float | Tensor = rate
        if step == 0:  # it is to reach what is far away
            counting = squared_distance(scores).nan_to_num().clamp(rate, _MOST_RATE)
        loc, covariance = match_scores(loc, covariance, draws.to(loc), scores, counting)
    return loc, covariance


def _ascend(target: Target, points: Tensor, covariance: Tensor) -> Tensor:
    """Move points `(B, M, D)` uphill, each to a mode of its own.

    The fitted covariance `(B, D, D)` turns a score into a step: it leads to the mode of a
    Gaussian of that covariance at once. A step that does not climb is taken back and halved.
    """
    everyone = _everyone(points)
    best = points.transpose(0, 1)  # (M, B, D)
    highest = torch.full_like(best[..., 0], -torch.inf)
    proposed, step = best, torch.zeros_like(best)
    for _ in range(_N_ASCENT_STEPS):
        values, scores = target.scores(proposed.to(target.like), everyone)
        climbs = (values > highest).unsqueeze(-1)
        highest = torch.maximum(values, highest)
        best = torch.where(climbs, proposed, best)
        newton = torch.einsum("bde,mbe->mbd", covariance, scores).nan_to_num(0.0, 0.0, 0.0)
        step = torch.where(climbs, newton, 0.5 * step)
        proposed = best + step
    return best.transpose(0, 1)
