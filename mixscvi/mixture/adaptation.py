r"""Adaptive importance sampling: from a starting mixture to the exact posterior, cell by cell.

For each cell or image the target is p(x, z), known up to log p(x). Four stages:

1. **Start.** A few draws of the starting mixture say where the posterior is: their moments, under
   weights flattened so that many draws count (Koblents & Míguez 2015).
2. **Scores.** A Gaussian is fitted to the gradients of log p(x, z) at its own draws by batch and
   match (Cai et al., ICML 2024). Every draw gives `D` equations, so `2 D` draws do what importance
   weights need thousands for, and what lies far from the start is reached in a few steps.
3. **Ascents.** The starting means, and draws if these are few, climb to modes of their own. The
   first proposal has a Student's t at the Gaussian and a wider one at each of these modes.
4. **Mixture population Monte Carlo with a memory.** The draws of all proposals so far are weighted
   against their mixture (Cornuet et al. 2012; Owen & Zhou 2000), and one step of
   expectation-maximization under these weights lowers KL(posterior || proposal) (Cappé et al.
   2008): once with the draws of the start and of the scores, then after each generation. A cell
   leaves once the tail index of a generation's weights is low and enough of all draws count.

The proposal is then frozen and drawn from afresh. Nothing before depends on these last draws, so
the estimate of p(x) is unbiased; log p(x) is consistent. A mode that neither the start's draws nor
the ascents come near is missed, and no diagnostic of the weights can tell.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mixscvi.mixture.population import Memory, maximization_step, tail_index
from mixscvi.mixture.posterior import MixturePosterior
from mixscvi.mixture.student_mixture import StudentMixture
from mixscvi.mixture.targets import LogJoint, Target
from mixscvi.mixture.warm_start import warm_start

__all__ = ["Adapted", "LogJoint", "adapt"]

# Chosen by measurement on trained models of gene counts, D = 10 and 30.
_GROWTH = 1.25  # of the draws from one generation to the next
_MARGIN_OF_K = 0.1  # k-hat of few draws is uncertain
_MARGIN_AT_FIRST = 0.4  # before any generation has confirmed the fit
# Of all draws, in effect, at which a cell may leave: it foretells k-hat of fresh draws as well as
# k-hat of other fresh draws does. With many latents, no proposal comes as close.
_LEAST_SHARE, _LEAST_SHARE_TIMES_D = 0.2, 2.0
_FALL = 0.95  # of that share with each generation: what draws do not mend, more will not
_MOST_FINAL = 8  # times n_final, for a cell whose standard error asks for more draws
_ROUNDS = 4  # in which as many as n_final come


class Adapted(NamedTuple):
    """Adapted proposals of `B` cells or images, and what fresh draws from them say.

    Examples
    --------
    The posterior mean of each cell, from the draws and their weights:

    >>> import torch
    >>> from torch.distributions import Normal
    >>> x = torch.tensor([[1.0], [-3.0]])
    >>> def log_joint(z, cells):
    ...     return (Normal(0.0, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(x[cells])).sum(-1)
    >>> start = MixturePosterior(torch.zeros(2, 1, 1), torch.ones(2, 1, 1))
    >>> adapted = adapt(log_joint, start, generator=torch.Generator().manual_seed(0))
    >>> weights = adapted.log_weights.softmax(0)  # (N, B)
    >>> mean = (weights.unsqueeze(-1) * adapted.draws).sum(0)  # (B, D), exactly x / 2
    >>> bool(((mean - x / 2).abs() < 0.1).all())
    True
    """

    proposal: StudentMixture
    """The frozen proposals, batch shape `(B,)`."""
    draws: Tensor
    """Fresh draws, `(N, B, D)`."""
    log_weights: Tensor
    """Their log importance weights log p(x, z) - log q(z), `(N, B)`."""
    pareto_k: Tensor
    """Tail index of these weights, `(B,)`."""
    log_likelihood: Tensor
    """log p(x) in nats, `(B,)`; its exponential is unbiased."""
    standard_error: Tensor
    """Monte-Carlo standard error of ``log_likelihood`` in nats, `(B,)`, as of independent draws:
    too large, as a rule, with few latents, where even draws do better."""
    converged: Tensor
    """Whether ``pareto_k`` is below the threshold, `(B,)`."""
    n_evaluations: Tensor
    """Evaluations of the log-joint in all, `(B,)`; one with its gradient counts as three."""


@torch.no_grad()
def adapt(
    log_joint: LogJoint,
    start: MixturePosterior,
    *,
    generator: torch.Generator | None = None,
    n_draws: int | None = None,
    max_generations: int = 8,
    n_final: int = 1000,
    standard_error: float | None = None,
    k_threshold: float = 0.7,
    dof: int | None = None,
    rows_per_call: int = 2**16,
) -> Adapted:
    r"""Adapt a mixture to the posterior of each cell, and estimate log p(x) from fresh draws.

    Parameters
    ----------
    log_joint
        Log-density of data and latents, differentiable in the draws: called with draws
        `(N, n, D)` of `n` cells and the indices `(n,)` of these among the `B`; returns `(N, n)`.
        Minus infinity is a density of zero.
    start
        Where to begin, batch shape `(B,)`: usually the encoder's posterior.
    generator
        Source of randomness, on the device of `start`; torch's default generator when ``None``.
    n_draws
        Draws per cell of the first generation; ``250 + D**2`` when ``None``, since a covariance
        has about half as many parameters as `D` squared. Later generations, which only the cells
        that need them see, are each a quarter larger.
    max_generations
        Most generations of a cell; it leaves after the first whose draws have a low tail index,
        once enough of all its draws count.
    n_final
        Fresh draws per cell from the adapted proposal.
    standard_error
        Of log p(x), in nats, that each cell is to have. Where the weights of its last generation
        say that `n_final` draws are too few, up to eight times as many are drawn;
        ``log_likelihood`` and ``standard_error`` are of all of them. ``None`` for `n_final` draws
        of every cell.
    k_threshold
        Tail index of the importance weights below which a proposal is trusted (Vehtari et al.
        2024).
    dof
        Degrees of freedom of the proposals, an integer above 2; ``4 + D // 4`` when ``None``.
    rows_per_call
        Most draws, counted over all cells, that `log_joint` is given at once (a single draw of
        every cell is the least).

    Returns
    -------
    Named results of all `B` cells; those that were not ``converged`` are flagged, not dropped. The
    proposals have ``1 + max(A, 4)`` components.

    Raises
    ------
    ValueError
        If a number is out of range, if `log_joint` returns another shape, NaN or plus infinity, or
        is not differentiable in the draws, or if it is minus infinity at every draw of the start.
    RuntimeError
        In torch's inference mode, which forbids gradients.

    Notes
    -----
    Sources: Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei & Saul (ICML 2024), "Batch and
    match"; Cappé, Douc, Guillin, Marin & Robert (Statistics and Computing 2008), mixture population
    Monte Carlo; Cornuet, Marin, Mira & Robert (Scandinavian Journal of Statistics 2012), its
    memory; Owen & Zhou (JASA 2000), deterministic mixture weights; Koblents & Míguez (Statistics
    and Computing 2015), flattened weights. Draws are even: see
    :meth:`StudentMixture.sample_stratified`.

    How many draws a cell gets for its `standard_error` is settled before the first of them is made,
    so that the estimate of p(x) stays unbiased.

    Every cell has draws of its own. Which cells share the batch changes which random numbers a
    cell gets, and nothing else.

    Examples
    --------
    Two cells with a standard normal prior and x = z + noise of variance 1, from starts that are
    too narrow:

    >>> import torch
    >>> from torch.distributions import Normal
    >>> x = torch.tensor([[1.0], [-3.0]])
    >>> def log_joint(z, cells):
    ...     return (Normal(0.0, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(x[cells])).sum(-1)
    >>> start = MixturePosterior(torch.zeros(2, 1, 1), torch.full((2, 1, 1), 0.1))
    >>> adapted = adapt(log_joint, start, generator=torch.Generator().manual_seed(0))
    >>> exact = Normal(0.0, 2**0.5).log_prob(x).squeeze(-1)
    >>> bool(((adapted.log_likelihood - exact).abs() < 0.05).all()), adapted.converged
    (True, tensor([True, True]))
    """
    if start.component_loc.dim() != 3:
        raise ValueError(
            "start must have component parameters of shape (B, A, D), got "
            f"{tuple(start.component_loc.shape)}"
        )
    n_latent = start.component_loc.shape[-1]
    n_draws = 250 + n_latent**2 if n_draws is None else n_draws
    for name, value, least in (
        ("n_draws", n_draws, 25),
        ("max_generations", max_generations, 1),
        ("n_final", n_final, 25),
        ("rows_per_call", rows_per_call, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if standard_error is not None and not standard_error > 0:
        raise ValueError(f"standard_error must be above zero or None, got {standard_error}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("adapt needs gradients: call it outside torch.inference_mode")
    dof = 4 + n_latent // 4 if dof is None else dof
    target = Target(log_joint, start.component_loc, rows_per_call, generator)
    proposal, memory = warm_start(target, start, dof)
    proposal, n_evaluations, n_needed = _population(
        target, proposal, memory, n_draws, max_generations, standard_error, k_threshold
    )
    draws = target.draw(proposal, n_final)
    everyone = torch.arange(len(n_evaluations), device=draws.device)
    log_weights = target.values(draws, everyone) - proposal.log_prob(draws)
    estimate, error, n_drawn = _estimate(target, proposal, log_weights, n_needed)
    k = tail_index(log_weights)
    return Adapted(
        proposal=proposal,
        draws=draws,
        log_weights=log_weights,
        pareto_k=k,
        log_likelihood=estimate,
        standard_error=error,
        converged=k < k_threshold,
        n_evaluations=n_evaluations + n_drawn,
    )


def _population(
    target: Target,
    proposal: StudentMixture,
    memory: Memory,
    n_draws: int,
    max_generations: int,
    standard_error: float | None,
    k_threshold: float,
) -> tuple[StudentMixture, Tensor, Tensor]:
    """Generations until each cell may leave.

    Returns the proposals, evaluations so far, and how many fresh draws the standard error needs
    (zero if none is asked for), each by cell.
    """
    n_latent = memory.draws.shape[-1]
    least_ess = max(40, 3 * n_latent)
    least_share = min(_LEAST_SHARE, _LEAST_SHARE_TIMES_D / n_latent)
    proposal = maximization_step(proposal, memory.draws, memory.flattened_weights(least_ess))
    weights, loc, scale_tril = (
        tensor.clone() for tensor in (proposal.weights, proposal.loc, proposal.scale_tril)
    )
    active = torch.arange(len(loc), device=loc.device)
    n_evaluations = torch.full_like(active, target.n_evaluations)
    n_needed = torch.zeros_like(weights[:, 0])
    for generation in range(max_generations):
        n = int(n_draws * _GROWTH**generation)
        draws = target.draw(proposal, n)
        memory.add(proposal, draws, target.values(draws, active))
        n_evaluations[active] += n
        k = memory.newest_tail_index()
        flattened = memory.flattened_weights(least_ess)
        proposal = maximization_step(proposal, memory.draws, flattened, memory.by_component)
        weights[active], loc[active] = proposal.weights, proposal.loc
        scale_tril[active] = proposal.scale_tril
        if standard_error is not None:
            n_needed[active] = memory.newest_relative_variance() / standard_error**2
        margin = _MARGIN_AT_FIRST if generation == 0 else _MARGIN_OF_K
        enough = memory.effective_share() > least_share * _FALL**generation
        # The negation keeps a cell whose k-hat is NaN.
        (going_on,) = torch.where(~((k < k_threshold - margin) & enough))
        if len(going_on) == 0:
            break
        if len(going_on) < len(active):
            active, proposal = active[going_on], proposal.select(going_on)
            memory.keep(going_on)
    return StudentMixture(weights, loc, scale_tril, proposal.dof), n_evaluations, n_needed


def _estimate(
    target: Target, proposal: StudentMixture, log_weights: Tensor, n_needed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x), its standard error, and the draws that both are from, each `(B,)`.

    To the draws whose log-weights `(N, B)` are given, cells that need more get more.
    """
    n_final = len(log_weights)
    n_drawn = torch.full_like(n_needed, n_final, dtype=torch.long)
    first, second = log_weights.logsumexp(0), (2 * log_weights).logsumexp(0)
    per_round = math.ceil(n_final / _ROUNDS)
    n_needed = n_needed.clamp_max(_MOST_FINAL * n_final)
    while True:
        (cells,) = torch.where(n_drawn < n_needed)
        if len(cells) == 0:
            break
        some = proposal.select(cells)
        draws = target.draw(some, per_round)
        more = target.values(draws, cells) - some.log_prob(draws)
        first[cells] = torch.logaddexp(first[cells], more.logsumexp(0))
        second[cells] = torch.logaddexp(second[cells], (2 * more).logsumexp(0))
        n_drawn[cells] += per_round
    variance = ((second - 2 * first).exp() * n_drawn - 1) / (n_drawn - 1)
    return first - n_drawn.log(), variance.clamp_min(0).sqrt(), n_drawn
