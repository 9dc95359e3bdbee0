r"""Adaptive importance sampling: from a starting mixture to the exact posterior, cell by cell.

For each cell or image the target is p(x, z), known up to log p(x). Three stages:

1. **Start.** A few draws of the starting mixture say where the posterior is: their moments, under
   weights flattened so that many draws count (Koblents & Míguez 2015).
2. **Scores.** A Gaussian is fitted to the gradients of log p(x, z) at its own draws by batch and
   match (Cai et al., ICML 2024). Every draw gives `D` equations, so `2 D` draws do what importance
   weights need thousands for, and what lies far from the start is reached in a few steps.
3. **Mixture population Monte Carlo with a memory.** The Gaussian and the starting components, as
   Student's t distributions, are the first proposal. Each generation of draws is weighted against
   the mixture of all past proposals (Cornuet et al. 2012; Owen & Zhou 2000), and one step of
   expectation-maximization under these weights lowers KL(posterior || proposal) (Cappé et al.
   2008). A cell leaves once the tail index of a generation's weights is low.

The proposal is then frozen and drawn from afresh. Nothing before depends on these last draws, so
the estimate of p(x) is unbiased; log p(x) is consistent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mixscvi.mixture.diagnostics import effective_sample_size, pareto_k
from mixscvi.mixture.objectives import siwae, siwae_standard_error
from mixscvi.mixture.posterior import MixturePosterior
from mixscvi.mixture.student_mixture import StudentMixture

__all__ = ["Adapted", "LogJoint", "adapt"]

LogJoint = Callable[[Tensor, Tensor], Tensor]
"""Maps draws `(N, n, D)` and the indices `(n,)` of their cells to log p(x, z), `(N, n)`."""

# Chosen by measurement on trained models of gene counts, D = 10 and 30.
_N_START = 100
_START_INFLATION = 1.2  # of the starting components' standard deviations
_START_WEIGHT = 0.1  # of all starting components together, beside the fitted Gaussian
_SCORE_RATES = (10.0, 10.0, 10.0, 4.0, 2.0)  # one per step; the lower, the longer the memory
_COST_OF_SCORE = 3  # evaluations that a value with its gradient counts as
_FIT_INFLATION = 1.1  # of the fitted Gaussian's variances
_LEAST_WEIGHT = 0.02  # of a component, so that none is lost
_GROWTH = 1.25  # of the draws from one generation to the next
_MARGIN_OF_K = 0.2  # k-hat of few draws is uncertain by about this much
_ELEMENTS_AT_ONCE = 2**21


class Adapted(NamedTuple):
    """Adapted proposals of `B` cells or images, and what fresh draws from them say."""

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
    """Monte-Carlo standard error of ``log_likelihood`` in nats, `(B,)`."""
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
        Draws per cell of the first generation; ``200 + 10 D`` when ``None``. Later generations,
        which only the cells that need them see, are each a quarter larger.
    max_generations
        Most generations of a cell; it leaves after the second at the earliest.
    n_final
        Fresh draws per cell from the adapted proposal.
    k_threshold
        Tail index of the importance weights below which a proposal is trusted (Vehtari et al.
        2024).
    dof
        Degrees of freedom of the proposals, an integer above 2; ``5 + D // 3`` when ``None``.
    rows_per_call
        Most draws, counted over all cells, that `log_joint` is given at once (a single draw of
        every cell is the least).

    Returns
    -------
    Named results of all `B` cells; those that were not ``converged`` are flagged, not dropped.

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
    and Computing 2015), flattened weights.

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
    n_draws = 200 + 10 * n_latent if n_draws is None else n_draws
    for name, value, least in (
        ("n_draws", n_draws, 25),
        ("max_generations", max_generations, 1),
        ("n_final", n_final, 25),
        ("rows_per_call", rows_per_call, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("adapt needs gradients: call it outside torch.inference_mode")
    dof = 5 + n_latent // 3 if dof is None else dof
    target = _Target(log_joint, start.component_loc, rows_per_call)

    everyone = torch.arange(n_cells, device=start.component_loc.device)
    loc, scale = _working(start.component_loc), _working(start.component_scale)
    first = StudentMixture(
        torch.full_like(loc[..., 0], 1 / n_start_components),
        loc,
        torch.diag_embed(_START_INFLATION * scale),
        dof,
    )
    memory = _Memory(_N_START)
    draws = target.draw(first, _N_START, generator)
    memory.add(first, draws, target.values(draws, everyone))
    hopeless = memory.log_joint.isneginf().all(0)
    if hopeless.any():
        raise ValueError(
            f"log_joint is minus infinity at all {_N_START} draws from start for the cells "
            f"{hopeless.nonzero().flatten()[:5].tolist()}"
        )
    center, covariance = _moments(draws.to(loc), memory.flattened_weights(_N_START / 3))
    # Some thirty draws do not make a covariance: half of what they say of correlations is kept.
    covariance = 0.5 * (covariance + torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1)))
    center, covariance = _fit_scores(target, center, covariance, generator)

    fitted_weight = torch.full_like(first.weights[:, :1], 1 - _START_WEIGHT)
    proposal = StudentMixture(
        torch.cat((fitted_weight, _START_WEIGHT * first.weights), 1),
        torch.cat((center.unsqueeze(1), first.loc), 1),
        torch.cat((_cholesky(_FIT_INFLATION * covariance).unsqueeze(1), first.scale_tril), 1),
        dof,
    )
    frozen = [tensor.clone() for tensor in (proposal.weights, proposal.loc, proposal.scale_tril)]
    n_evaluations = torch.full_like(everyone, target.n_evaluations)
    least_ess = max(40, 3 * n_latent)
    active = everyone
    for generation in range(max_generations):
        n = int(n_draws * _GROWTH**generation)
        draws = target.draw(proposal, n, generator)
        memory.add(proposal, draws, target.values(draws, active))
        n_evaluations[active] += n
        k = memory.tail_index()
        proposal = _update(proposal, memory.draws, memory.flattened_weights(least_ess))
        for kept, new in zip(
            frozen, (proposal.weights, proposal.loc, proposal.scale_tril), strict=True
        ):
            kept[active] = new
        if generation == 0:
            continue
        # The negation keeps a cell whose k-hat is NaN.
        (going_on,) = torch.where(~(k < k_threshold - _MARGIN_OF_K))
        if len(going_on) == 0:
            break
        if len(going_on) < len(active):
            active, proposal = active[going_on], proposal.select(going_on)
            memory.keep(going_on)

    proposal = StudentMixture(*frozen, dof)
    draws = target.draw(proposal, n_final, generator)
    log_weights = target.values(draws, everyone) - proposal.log_prob(draws)
    k = _tail_index(log_weights)
    return Adapted(
        proposal=proposal,
        draws=draws,
        log_weights=log_weights,
        pareto_k=k,
        log_likelihood=siwae(log_weights.unsqueeze(-1)),
        standard_error=siwae_standard_error(log_weights.unsqueeze(-1)),
        converged=k < k_threshold,
        n_evaluations=n_evaluations + n_final,
    )


def _working(tensor: Tensor) -> Tensor:
    """In double precision where the device has it."""
    return tensor if tensor.device.type == "mps" else tensor.double()


def _cholesky(covariance: Tensor) -> Tensor:
    """Cholesky factors of matrices that are positive definite but for rounding, `(..., D, D)`."""
    exact = covariance.to("cpu", torch.float64)  # not every accelerator has float64
    diagonal = exact.diagonal(dim1=-2, dim2=-1)
    jitter = 1e-9 * diagonal + 1e-12 * diagonal.amax(-1, keepdim=True) + 1e-300
    return torch.linalg.cholesky(exact + torch.diag_embed(jitter)).to(covariance)


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

    def scores(self, draws: Tensor, cells: Tensor) -> Tensor:
        """Gradient of log p(x, z) with respect to z, `(N, n, D)`."""
        self.n_evaluations += _COST_OF_SCORE * len(draws)
        passes = []
        for some in self._passes(draws):
            with torch.enable_grad():
                leaf = some.detach().requires_grad_()
                values = self.log_joint(leaf, cells)
                self._checked(values.detach(), some, cells)
                if not values.requires_grad:
                    raise ValueError("log_joint must be differentiable in the draws")
                (score,) = torch.autograd.grad(values.sum(), leaf)
            passes.append(score)
        return _working(torch.cat(passes))


class _Memory:
    """All draws of the cells that still adapt, weighted against all proposals they came from.

    Parameters
    ----------
    n_start
        How many draws come from the start, the first proposal.
    """

    def __init__(self, n_start: int) -> None:
        self.n_start = n_start
        self.proposals: list[tuple[int, StudentMixture]] = []
        self.draws: Tensor
        self.log_joint: Tensor
        self.log_counts: Tensor
        """log sum_t N_t q_t(z) of every draw, `(N, n)`."""

    def add(self, proposal: StudentMixture, draws: Tensor, log_joint: Tensor) -> None:
        """Add a generation: `(N_t, n, D)` draws of a proposal, with their log-joint."""
        n = len(draws)
        newest = proposal.log_prob(draws) + torch.tensor(n).log().item()
        if not self.proposals:
            self.draws, self.log_joint, self.log_counts = draws, log_joint, newest
        else:
            log_n = torch.tensor(n).log().item()
            older = torch.logaddexp(self.log_counts, proposal.log_prob(self.draws) + log_n)
            for n_past, past in self.proposals:
                log_n_past = torch.tensor(n_past).log().item()
                newest = torch.logaddexp(newest, past.log_prob(draws) + log_n_past)
            self.draws = torch.cat((self.draws, draws))
            self.log_joint = torch.cat((self.log_joint, log_joint))
            self.log_counts = torch.cat((older, newest))
        self.proposals.append((n, proposal))

    def keep(self, rows: Tensor) -> None:
        """Forget all cells but these."""
        self.draws = self.draws[:, rows]
        self.log_joint, self.log_counts = self.log_joint[:, rows], self.log_counts[:, rows]
        self.proposals = [(n, proposal.select(rows)) for n, proposal in self.proposals]

    def flattened_weights(self, least_ess: float) -> Tensor:
        """Normalized weights to the largest power <= 1 that makes enough draws count, `(N, n)`."""
        log_weights = (self.log_joint - self.log_counts).mT
        low = torch.zeros_like(log_weights[:, :1])
        # Where the power of one will do, the bisection ends there.
        enough = effective_sample_size(log_weights).unsqueeze(-1) >= least_ess
        high = torch.ones_like(low)
        finite = log_weights.clamp_min(torch.finfo(log_weights.dtype).min / 4)
        for _ in range(20):
            middle = 0.5 * (low + high)
            above = effective_sample_size(middle * finite).unsqueeze(-1) >= least_ess
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        power = torch.where(enough, torch.ones_like(low), low)
        return (power * finite).softmax(-1).mT

    def tail_index(self) -> Tensor:
        """k-hat of the newest generation, alone and together with the start's draws, `(n,)`.

        The start's draws find what the adapted proposal may have left behind.
        """
        n, proposal = self.proposals[-1]
        n_start, first = self.proposals[0]
        log_joint = self.log_joint[-n:]
        alone = _tail_index(log_joint - proposal.log_prob(self.draws[-n:]))
        draws = torch.cat((self.draws[:n_start], self.draws[-n:]))
        log_joint = torch.cat((self.log_joint[:n_start], log_joint))
        share = n / (n + n_start)
        both = torch.logaddexp(
            proposal.log_prob(draws) + torch.tensor(share).log().item(),
            first.log_prob(draws) + torch.tensor(1 - share).log().item(),
        )
        return torch.maximum(alone, _tail_index(log_joint - both))


def _tail_index(log_weights: Tensor) -> Tensor:
    """k-hat of log-weights `(N, n)`, infinite where all weights are zero."""
    rows = log_weights.mT
    empty = rows.isneginf().all(-1)
    return torch.where(empty, torch.inf, pareto_k(torch.where(empty[:, None], 0.0, rows)))


def _moments(draws: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(B, D)` and covariance `(B, D, D)` of weighted draws `(N, B, D)`."""
    center = torch.einsum("nb,nbd->bd", weights, draws)
    deviation = (draws - center).transpose(0, 1)
    return center, (weights.mT.unsqueeze(-1) * deviation).mT @ deviation


def _fit_scores(
    target: _Target, loc: Tensor, covariance: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Fit a Gaussian to the target's scores, from a mean `(B, D)` and covariance `(B, D, D)`."""
    everyone = torch.arange(len(loc), device=loc.device)
    n_draws = max(2 * loc.shape[-1], 8)
    for rate in _SCORE_RATES:
        gaussian = StudentMixture(
            torch.ones_like(loc[:, :1]),
            loc.unsqueeze(1),
            _cholesky(covariance).unsqueeze(1),
            None,
        )
        draws = target.draw(gaussian, n_draws, generator)
        scores = target.scores(draws, everyone)
        loc, covariance = _match_scores(loc, covariance, draws.to(loc), scores, rate)
    return loc, covariance


def _match_scores(
    loc: Tensor, covariance: Tensor, draws: Tensor, scores: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    r"""One step of batch and match: the Gaussian whose scores are closest to the target's.

    With means :math:`\bar z, \bar g` and covariances `C`, `G` of draws and scores, the new
    covariance solves :math:`\Sigma U \Sigma + \Sigma = V` for
    :math:`U = \lambda G + \frac{\lambda}{1 + \lambda} \bar g \bar g^\top` and
    :math:`V = \Sigma_0 + \lambda C + \frac{\lambda}{1 + \lambda} (\mu_0 - \bar z)(\mu_0 -
    \bar z)^\top`: :math:`\Sigma = 2 L (I + (I + 4 L^\top U L)^{1/2})^{-1} L^\top`, with
    :math:`V = L L^\top`. The new mean is
    :math:`(\mu_0 + \lambda (\Sigma \bar g + \bar z)) / (1 + \lambda)`. Exact in one step where the
    target is Gaussian and the rate :math:`\lambda` large (Cai et al. 2024, eqs. 9 to 13).

    Parameters
    ----------
    loc, covariance
        The Gaussian so far, `(B, D)` and `(B, D, D)`.
    draws, scores
        Of this Gaussian and the target, `(N, B, D)`; draws whose score is not finite are left out.
    rate
        How much these draws count beside the Gaussian so far.
    """
    finite = scores.isfinite().all(-1)
    weights = finite / finite.sum(0).clamp_min(1)
    scores = torch.where(finite.unsqueeze(-1), scores, 0.0)
    some = finite.any(0).unsqueeze(-1)
    mean_z, cov_z = _moments(draws, weights.to(draws))
    mean_g, cov_g = _moments(scores, weights.to(draws))
    mean_z = torch.where(some, mean_z, loc)
    share = rate / (1 + rate)
    shift = loc - mean_z
    u = rate * cov_g + share * mean_g.unsqueeze(-1) * mean_g.unsqueeze(-2)
    v = covariance + rate * cov_z + share * shift.unsqueeze(-1) * shift.unsqueeze(-2)
    u, tril = u.to("cpu", torch.float64), _cholesky(v).to("cpu", torch.float64)
    values, vectors = torch.linalg.eigh(tril.mT @ u @ tril)
    root = tril @ vectors * (2 / (1 + (1 + 4 * values.clamp_min(0)).sqrt())).sqrt().unsqueeze(-2)
    new = (root @ root.mT).to(covariance)
    step = torch.einsum("bde,be->bd", new, mean_g) + mean_z
    new = torch.where(some.unsqueeze(-1), new, covariance)
    return (1 - share) * loc + share * step, new


def _update(proposal: StudentMixture, draws: Tensor, weights: Tensor) -> StudentMixture:
    r"""One step of weighted expectation-maximization.

    A component's scale matrix is averaged with its last one, which counts as many draws as a
    covariance has parameters, :math:`D (D + 1) / 2`: few effective draws change it little.

    Parameters
    ----------
    proposal
        Mixtures of `n` cells.
    draws
        All draws in memory, `(N, n, D)`.
    weights
        Their normalized weights, `(N, n)`.
    """
    n_latent = draws.shape[-1]
    z = draws.to(proposal.loc)
    log_prob = proposal.component_log_prob(z)
    share = log_prob.softmax(-1) * weights.unsqueeze(-1)  # (N, n, K)
    alpha = share.sum(0)
    tiny = torch.finfo(alpha.dtype).tiny
    n_effective = alpha.square() / share.square().sum(0).clamp_min(tiny)
    share = share / alpha.clamp_min(tiny)
    loc = torch.einsum("nbk,nbd->bkd", share, z)
    loc = torch.where(n_effective.unsqueeze(-1) < 1, proposal.loc, loc)
    scatter = torch.zeros_like(proposal.scale_tril)
    per_pass = max(1, _ELEMENTS_AT_ONCE // proposal.loc.numel())
    for some, part in zip(z.split(per_pass), share.split(per_pass), strict=True):
        deviation = some.unsqueeze(2) - loc  # (N, n, K, D)
        weighted = (part.unsqueeze(-1) * deviation).permute(1, 2, 3, 0)
        scatter += weighted @ deviation.permute(1, 2, 0, 3)
    prior = n_latent * (n_latent + 1) / 2
    kept = (prior / (n_effective + prior))[..., None, None]
    last = proposal.scale_tril @ proposal.scale_tril.mT
    alpha = alpha.clamp_min(_LEAST_WEIGHT)
    return StudentMixture(
        alpha / alpha.sum(-1, keepdim=True),
        loc,
        _cholesky(kept * last + (1 - kept) * scatter),
        proposal.dof,
    )
