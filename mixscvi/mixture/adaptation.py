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
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mixscvi.mixture.population import Memory, maximization_step, tail_index
from mixscvi.mixture.posterior import MixturePosterior
from mixscvi.mixture.score_matching import (
    cholesky,
    match_scores,
    squared_distance,
    weighted_moments,
)
from mixscvi.mixture.student_mixture import StudentMixture

__all__ = ["Adapted", "LogJoint", "adapt"]

LogJoint = Callable[[Tensor, Tensor], Tensor]
"""Maps draws `(N, n, D)` and the indices `(n,)` of their cells to log p(x, z), `(N, n)`."""

# Chosen by measurement on trained models of gene counts, D = 10 and 30.
_N_START = 100
_START_INFLATION = 1.2  # of the starting components' standard deviations
_ASCENT_WEIGHT = 0.2  # of the modes found by ascents together, beside the fitted Gaussian
_LEAST_ASCENTS = 4  # one finds a second mode much less often
_SCORE_RATES = (1000.0, 100.0, 30.0, 10.0, 4.0)  # one per step; the lower, the longer the memory
_MOST_RATE = 1e5  # of the first step, which is as large as the target's squared distance in widths
_N_ASCENT_STEPS = 4
_COST_OF_SCORE = 3  # evaluations that a value with its gradient counts as
_FIT_INFLATION = 1.1  # of the fitted Gaussian's variances
_ASCENT_INFLATION = 2.5  # of the same about the modes that the starting components found
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
    n_cells, n_start_components, n_latent = start.component_loc.shape
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
    target = _Target(log_joint, start.component_loc, rows_per_call)

    everyone = torch.arange(n_cells, device=start.component_loc.device)
    start_loc, scale = _working(start.component_loc), _working(start.component_scale)
    first = StudentMixture(
        torch.full_like(scale[..., 0], 1 / n_start_components),
        start_loc,
        torch.diag_embed(_START_INFLATION * scale),
        dof,
    )
    draws = target.draw(first, _N_START, generator)
    memory = Memory(first, draws, target.values(draws, everyone))
    hopeless = memory.log_joint.isneginf().all(0)
    if hopeless.any():
        raise ValueError(
            f"log_joint is minus infinity at all {_N_START} draws from start for the cells "
            f"{hopeless.nonzero().flatten()[:5].tolist()}"
        )
    center, covariance = weighted_moments(draws.to(scale), memory.flattened_weights(_N_START / 3))
    # Some thirty draws do not make a covariance: half of what they say of correlations is kept.
    covariance = 0.5 * (covariance + torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1)))
    center, covariance = _fit_scores(target, memory, center, covariance, generator)

    modes = first.loc
    if n_start_components < _LEAST_ASCENTS:
        more = first.sample((_LEAST_ASCENTS - n_start_components,), generator)
        modes = torch.cat((modes, more.transpose(0, 1)), 1)
    modes = _ascend(target, modes, covariance)
    n_modes = modes.shape[1]
    inflation = torch.full_like(modes[:, :, 0], _ASCENT_INFLATION)
    inflation = torch.cat((torch.full_like(inflation[:, :1], _FIT_INFLATION), inflation), 1)
    shares = torch.full_like(inflation, _ASCENT_WEIGHT / n_modes)
    shares[:, 0] = 1 - _ASCENT_WEIGHT
    proposal = StudentMixture(
        shares,
        torch.cat((center.unsqueeze(1), modes), 1),
        cholesky(inflation[..., None, None] * covariance.unsqueeze(1)),
        dof,
    )
    least_ess = max(40, 3 * n_latent)
    least_share = min(_LEAST_SHARE, _LEAST_SHARE_TIMES_D / n_latent)
    proposal = maximization_step(proposal, memory.draws, memory.flattened_weights(least_ess))
    weights, loc, scale_tril = (
        tensor.clone() for tensor in (proposal.weights, proposal.loc, proposal.scale_tril)
    )
    n_evaluations = torch.full_like(everyone, target.n_evaluations)
    n_needed = torch.zeros_like(weights[:, 0])  # fresh draws, for the standard error
    active = everyone
    for generation in range(max_generations):
        n = int(n_draws * _GROWTH**generation)
        draws = target.draw(proposal, n, generator)
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

    proposal = StudentMixture(weights, loc, scale_tril, dof)
    draws = target.draw(proposal, n_final, generator)
    log_weights = target.values(draws, everyone) - proposal.log_prob(draws)
    estimate, error, n_drawn = _estimate(target, proposal, log_weights, n_needed, generator)
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


def _working(tensor: Tensor) -> Tensor:
    """In double precision where the device has it."""
    return tensor if tensor.device.type == "mps" else tensor.double()


class _Target:
    """The log-joint with its results checked, its calls bounded and counted.

    Parameters
    ----------
    log_joint
        What the caller gave.
    like
        Draws are handed over in its type.
    rows_per_call
        Most draws of all cells at once.
    """

    def __init__(self, log_joint: LogJoint, like: Tensor, rows_per_call: int) -> None:
        self.log_joint, self.like, self.rows_per_call = log_joint, like, rows_per_call
        self.n_evaluations = 0  # of a cell that was in every call

    def draw(
        self, proposal: StudentMixture, n_draws: int, generator: torch.Generator | None
    ) -> Tensor:
        """Stratified draws `(N, B, D)`, rounded as the log-joint will see them."""
        return proposal.sample_stratified(n_draws, generator).to(self.like)

    def _passes(self, draws: Tensor) -> tuple[Tensor, ...]:
        return draws.split(max(1, self.rows_per_call // draws.shape[1]))

    def _checked(self, values: Tensor, draws: Tensor, cells: Tensor) -> Tensor:
        if values.shape != draws.shape[:2]:
            raise ValueError(
                f"log_joint must return the shape {tuple(draws.shape[:2])} for draws of shape "
                f"{tuple(draws.shape)}, got {tuple(values.shape)}"
            )
        wrong = (values.isnan() | values.isposinf()).any(0)
        if wrong.any():
            raise ValueError(
                "log_joint must be finite or minus infinity, got NaN or infinity for the cells "
                f"{cells[wrong][:5].tolist()}"
            )
        return _working(values)

    def values(self, draws: Tensor, cells: Tensor) -> Tensor:
        """log p(x, z) of draws, `(N, n)`."""
        self.n_evaluations += len(draws)
        passes = [
            self._checked(self.log_joint(some, cells), some, cells) for some in self._passes(draws)
        ]
        return torch.cat(passes)

    def scores(self, draws: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x, z), `(N, n)`, and its gradient with respect to z, `(N, n, D)`."""
        self.n_evaluations += _COST_OF_SCORE * len(draws)
        passes = []
        for some in self._passes(draws):
            with torch.enable_grad():
                leaf = some.detach().requires_grad_()
                values = self.log_joint(leaf, cells)
                if not values.requires_grad:
                    raise ValueError("log_joint must be differentiable in the draws")
                (score,) = torch.autograd.grad(values.sum(), leaf)
            passes.append((self._checked(values.detach(), some, cells), _working(score)))
        log_joint, scores = zip(*passes, strict=True)
        return torch.cat(log_joint), torch.cat(scores)


def _fit_scores(
    target: _Target,
    memory: Memory,
    loc: Tensor,
    covariance: Tensor,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Fit a Gaussian to the target's scores, from a mean `(B, D)` and covariance `(B, D, D)`.

    Every step's draws are added to the memory.
    """
    everyone = torch.arange(len(loc), device=loc.device)
    n_draws = max(2 * loc.shape[-1], 8)
    for step, rate in enumerate(_SCORE_RATES):
        gaussian = StudentMixture(
            torch.ones_like(loc[:, :1]),
            loc.unsqueeze(1),
            cholesky(covariance).unsqueeze(1),
            None,
        )
        draws = target.draw(gaussian, n_draws, generator)
        log_joint, scores = target.scores(draws, everyone)
        memory.add(gaussian, draws, log_joint)
        counting: float | Tensor = rate
        if step == 0:  # it is to reach what is far away
            counting = squared_distance(scores).nan_to_num().clamp(rate, _MOST_RATE)
        loc, covariance = match_scores(loc, covariance, draws.to(loc), scores, counting)
    return loc, covariance


def _ascend(target: _Target, points: Tensor, covariance: Tensor) -> Tensor:
    """Move points `(B, M, D)` uphill, each to a mode of its own.

    The fitted covariance `(B, D, D)` turns a score into a step: it leads to the mode of a
    Gaussian of that covariance at once. A step that does not climb is taken back and halved.
    """
    everyone = torch.arange(len(points), device=points.device)
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


def _estimate(
    target: _Target,
    proposal: StudentMixture,
    log_weights: Tensor,
    n_needed: Tensor,
    generator: torch.Generator | None,
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
        draws = target.draw(some, per_round, generator)
        more = target.values(draws, cells) - some.log_prob(draws)
        first[cells] = torch.logaddexp(first[cells], more.logsumexp(0))
        second[cells] = torch.logaddexp(second[cells], (2 * more).logsumexp(0))
        n_drawn[cells] += per_round
    variance = ((second - 2 * first).exp() * n_drawn - 1) / (n_drawn - 1)
    return first - n_drawn.log(), variance.clamp_min(0).sqrt(), n_drawn
