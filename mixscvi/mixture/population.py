"""Mixture population Monte Carlo with a memory: weights of all draws so far, and the update."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixscvi.mixture.diagnostics import effective_sample_size, pareto_k
from mixscvi.mixture.score_matching import cholesky
from mixscvi.mixture.student_mixture import StudentMixture

__all__ = ["Memory", "maximization_step", "tail_index"]

_LEAST_WEIGHT = 0.02  # of a component, so that none is lost
_LEAST_POWER = 2.0**-30
_ELEMENTS_AT_ONCE = 2**21


class Memory:
    """All draws of the cells that still adapt, weighted against all proposals they came from.

    Parameters
    ----------
    start
        The first proposal, of `n` cells.
    draws
        Draws of it, `(N, n, D)`.
    log_joint
        Their log p(x, z), `(N, n)`.

    Examples
    --------
    >>> import torch
    >>> q = StudentMixture(torch.ones(1, 1), torch.zeros(1, 1, 1), torch.ones(1, 1, 1, 1), None)
    >>> draws = q.sample((50,), torch.Generator().manual_seed(0))
    >>> memory = Memory(q, draws, q.log_prob(draws))
    >>> memory.flattened_weights(least_ess=40).sum(0)
    tensor([1.])
    """

    def __init__(self, start: StudentMixture, draws: Tensor, log_joint: Tensor) -> None:
        self.proposals = [(len(draws), start)]
        self.draws, self.log_joint = draws, log_joint
        # log alpha_k q_k(z) of all draws under the newest proposal, (N, n, K)
        self.by_component = start.component_log_prob(draws)
        log_prob = self.by_component.logsumexp(-1)
        # log sum_t N_t q_t(z) of every draw: over all draws' number, the mixture they came from
        self.log_counts = log_prob + math.log(len(draws))
        # log q(z) under the first and newest proposal, of the start's draws and then the newest
        self.by_first = self.by_newest = torch.cat((log_prob, log_prob))

    def add(self, proposal: StudentMixture, draws: Tensor, log_joint: Tensor) -> None:
        """Add a generation: draws of a proposal and their log p(x, z)."""
        self.proposals.append((len(draws), proposal))
        n_start, by_component = self.proposals[0][0], proposal.component_log_prob(self.draws)
        of_newest = proposal.component_log_prob(draws)
        of_all = by_component.logsumexp(-1)
        older = torch.logaddexp(self.log_counts, of_all + math.log(len(draws)))
        of_draws = [past.log_prob(draws) for _, past in self.proposals[:-1]]
        of_draws.append(of_newest.logsumexp(-1))
        newest = torch.full_like(log_joint, -torch.inf)
        for (n, _), log_prob in zip(self.proposals, of_draws, strict=True):
            newest = torch.logaddexp(newest, log_prob + math.log(n))
        self.by_first = torch.cat((self.by_first[:n_start], of_draws[0]))
        self.by_newest = torch.cat((of_all[:n_start], of_draws[-1]))
        self.by_component = torch.cat((by_component, of_newest))
        self.draws = torch.cat((self.draws, draws))
        self.log_joint = torch.cat((self.log_joint, log_joint))
        self.log_counts = torch.cat((older, newest))

    def keep(self, rows: Tensor) -> None:
        """Forget all cells but these."""
        self.draws, self.by_component = self.draws[:, rows], self.by_component[:, rows]
        self.log_joint, self.log_counts = self.log_joint[:, rows], self.log_counts[:, rows]
        self.by_first, self.by_newest = self.by_first[:, rows], self.by_newest[:, rows]
        self.proposals = [(n, proposal.select(rows)) for n, proposal in self.proposals]

    def _log_weights(self) -> Tensor:
        """Log-weights of all draws against the mixture that they came from, `(n, N)`."""
        return (self.log_joint - self.log_counts).mT

    def flattened_weights(self, least_ess: float) -> Tensor:
        """Weights to the largest power <= 1 that makes enough draws count, normalized, `(N, n)`.

        Enough is an effective sample size of `least_ess`, or of half the draws with a density
        above zero where that is less.
        """
        log_weights = self._log_weights()
        n_possible = (~log_weights.isneginf()).sum(-1)
        least = (0.5 * n_possible).clamp_max(least_ess)

        def enough(power: Tensor) -> Tensor:
            return effective_sample_size(power.unsqueeze(-1) * log_weights) >= least

        high = torch.ones_like(log_weights[:, 0])
        low = torch.where(enough(high), high, _LEAST_POWER)
        for _ in range(15):  # of powers on the scale of their logarithms
            middle = (low * high).sqrt()
            above = enough(middle)
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (low.unsqueeze(-1) * log_weights).softmax(-1).mT

    def effective_share(self) -> Tensor:
        """Effective sample size of all draws over their number, `(n,)`."""
        return effective_sample_size(self._log_weights()) / len(self.draws)

    def newest_relative_variance(self) -> Tensor:
        """Variance of the newest generation's own weights over their squared mean, `(n,)`.

        Infinite where all weights are zero.
        """
        n = self.proposals[-1][0]
        log_weights = self.log_joint[-n:] - self.by_newest[-n:]
        variance = n / effective_sample_size(log_weights.mT) - 1
        return variance.nan_to_num(nan=torch.inf, posinf=torch.inf)

    def newest_tail_index(self) -> Tensor:
        """k-hat of the newest generation, alone and together with the start's draws, `(n,)`.

        The start's draws find what the adapted proposal may have left behind.
        """
        n, n_start = self.proposals[-1][0], self.proposals[0][0]
        log_joint = self.log_joint[-n:]
        alone = tail_index(log_joint - self.by_newest[-n:])
        log_joint = torch.cat((self.log_joint[:n_start], log_joint))
        share = n / (n + n_start)
        both = torch.logaddexp(
            self.by_newest + math.log(share), self.by_first + math.log(1 - share)
        )
        return torch.maximum(alone, tail_index(log_joint - both))


def tail_index(log_weights: Tensor) -> Tensor:
    """k-hat of log-weights `(N, n)`, infinite where all weights are zero."""
    rows = log_weights.mT
    empty = rows.isneginf().all(-1)
    return torch.where(empty, torch.inf, pareto_k(torch.where(empty[:, None], 0.0, rows)))


def maximization_step(
    proposal: StudentMixture,
    draws: Tensor,
    weights: Tensor,
    by_component: Tensor | None = None,
) -> StudentMixture:
    r"""One step of weighted expectation-maximization.

    A component's scale matrix is averaged with its last one, which counts as many draws as a
    covariance has parameters, :math:`D (D + 1) / 2`: few effective draws change it little. It is
    set to a covariance, so a component's own is wider by ``dof / (dof - 2)``, as suits a proposal.

    Parameters
    ----------
    proposal
        Mixtures of `n` cells.
    draws
        All draws in memory, `(N, n, D)`.
    weights
        Their normalized weights, `(N, n)`.
    by_component
        Their :meth:`StudentMixture.component_log_prob` under `proposal`, `(N, n, K)`, where it is
        known.
    """
    n_latent = draws.shape[-1]
    if by_component is None:
        by_component = proposal.component_log_prob(draws)
    share = by_component.softmax(-1) * weights.unsqueeze(-1)  # (N, n, K)
    alpha = share.sum(0)
    tiny = torch.finfo(alpha.dtype).tiny
    n_effective = alpha.square() / share.square().sum(0).clamp_min(tiny)
    share = share / alpha.clamp_min(tiny)
    # Passes of cells, as large as a core's cache where there are many draws.
    by_cell = share.transpose(0, 1).mT.contiguous()  # (n, K, N)
    per_pass = max(1, _ELEMENTS_AT_ONCE // (len(draws) * proposal.loc[0].numel()))
    locs, scatters = [], []
    for z, part in zip(draws.transpose(0, 1).split(per_pass), by_cell.split(per_pass), strict=True):
        # About a point that all components share: one difference, and one product, for all.
        z = z.to(part)
        center = z.mean(1, keepdim=True)
        z = z - center
        mean = part @ z
        weighted = part.unsqueeze(2) * z.mT.contiguous().unsqueeze(1)  # (n, K, D, N)
        second = (weighted.flatten(1, 2) @ z).view(*mean.shape, n_latent)
        scatters.append(second - mean.unsqueeze(-1) * mean.unsqueeze(-2))
        locs.append(center + mean)
    loc = torch.where(n_effective.unsqueeze(-1) < 1, proposal.loc, torch.cat(locs))
    scatter = torch.cat(scatters)
    prior = n_latent * (n_latent + 1) / 2
    kept = (prior / (n_effective + prior))[..., None, None]
    last = proposal.scale_tril @ proposal.scale_tril.mT
    alpha = alpha.clamp_min(_LEAST_WEIGHT)
    return StudentMixture(
        alpha / alpha.sum(-1, keepdim=True),
        loc,
        cholesky(kept * last + (1 - kept) * scatter),
        proposal.dof,
    )
