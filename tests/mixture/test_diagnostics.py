import math
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch

from mixscvi.mixture import (
    ImportanceDraws,
    MixturePosterior,
    active_units,
    component_elbo,
    effective_sample_size,
    jensen_shannon_divergence,
    miselbo,
    mixture_log_prob,
    pareto_k,
    specialization,
)

assert_close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)


# Components


@pytest.fixture
def draws(make_posterior, normal, generator):
    q = make_posterior(3, 4, 2)
    z = q.rsample_stratified(5, generator=generator)
    cross = q.cross_log_prob(z)
    joint = normal(5, 3, 4) - z.square().sum(-1)
    own = cross.diagonal(dim1=-2, dim2=-1)
    return ImportanceDraws(joint, own, mixture_log_prob(cross)), cross


def test_component_bounds_are_loops(draws):
    (joint, own, mixture), cross = draws
    elbo, special, divergence = torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3)
    elbo, special, divergence = elbo.double(), special.double(), divergence.double()
    for b in range(3):
        for a in range(4):
            for i in range(5):
                density = sum(cross[i, b, a, j].exp() for j in range(4)) / 4
                elbo[b, a] += (joint[i, b, a] - cross[i, b, a, a]) / 5
                special[b, a] += (cross[i, b, a, a] - density.log()) / 5
            divergence[b] += special[b, a] / 4
    assert_close(component_elbo(joint, own), elbo)
    assert_close(specialization(own, mixture), special)
    assert_close(jensen_shannon_divergence(cross), divergence)


def test_component_elbo_and_specialization_make_miselbo(draws):
    (joint, own, mixture), cross = draws
    log_weights = ImportanceDraws(joint, own, mixture).log_weights
    assert_close(log_weights, joint - mixture)
    parts = component_elbo(joint, own) + specialization(own, mixture)
    assert_close(parts, log_weights.mean(0))
    assert_close(parts.mean(-1), miselbo(log_weights))
    assert_close(specialization(own, mixture).mean(-1), jensen_shannon_divergence(cross))


def test_importance_draws_are_named(draws):
    (joint, own, mixture), _ = draws
    named = ImportanceDraws(log_joint=joint, log_own=own, log_mixture=mixture)
    assert all(
        torch.equal(one, other) for one, other in zip(named, (joint, own, mixture), strict=True)
    )


def test_specialization_of_each_component_by_quadrature(generator):
    loc = torch.tensor([[[0.0], [0.2], [4.0]]], dtype=torch.float64)
    scale = torch.tensor([[[1.0], [0.8], [0.5]]], dtype=torch.float64)
    grid = np.linspace(-12, 12, 20_001)
    density = scipy.stats.norm.pdf(grid, loc[0].numpy(), scale[0].numpy())
    ratio = np.where(density > 0, density / density.mean(0), 1.0)
    exact = torch.from_numpy(np.trapezoid(density * np.log(ratio), grid))
    q = MixturePosterior(loc, scale)
    cross = q.cross_log_prob(q.rsample_stratified(100_000, generator=generator))
    own = cross.diagonal(dim1=-2, dim2=-1)
    estimate = specialization(own, mixture_log_prob(cross))[0]
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.01)
    # Two share a place, the third stands alone.
    assert estimate[2] > 0.95 * math.log(3) > 2 * estimate[:2].max()


# Effective sample size


def test_effective_sample_size_by_its_formula(normal):
    log_weights = normal(4, 30)
    weights = log_weights.exp()
    assert_close(effective_sample_size(log_weights), weights.sum(1) ** 2 / (weights**2).sum(1))


@pytest.mark.parametrize("n_equal", [1, 7, 50])
def test_effective_sample_size_counts_the_equal_weights(n_equal):
    log_weights = torch.full((2, 50), -math.inf).double()
    log_weights[0, :n_equal] = 3.0
    log_weights[1, -n_equal:] = -4000.0
    expected = torch.full((2,), float(n_equal), dtype=torch.float64)
    torch.testing.assert_close(effective_sample_size(log_weights), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("spread", [0.01, 1.0, 20.0])
def test_effective_sample_size_is_between_one_and_all(normal, spread):
    size = effective_sample_size(spread * normal(100, 40))
    assert (size >= 1 - 1e-10).all() and (size < 40).all()


def test_effective_sample_size_of_lognormal_weights(normal):
    share = effective_sample_size(0.7 * normal(20, 50_000)) / 50_000
    assert share.mean().item() == pytest.approx(math.exp(-(0.7**2)), rel=0.01)


# Pareto k-hat


def naive_pareto_k(weights):
    """k-hat of one row, from the papers' formulas in their own signs.

    Zhang & Stephens (2009) fit x to a generalized Pareto with shape -k; Vehtari et al. (2024)
    give the tail's length, the size of the grid and the prior.
    """
    weights = np.sort(weights)
    n_tail = math.ceil(min(0.2 * len(weights), 3 * math.sqrt(len(weights))))
    x = weights[-n_tail:] - weights[-n_tail - 1]
    n, m = n_tail, 30 + math.floor(math.sqrt(n_tail))
    first_quartile = x[math.floor(n / 4 + 0.5) - 1]
    thetas, log_likelihoods = [], []
    for j in range(1, m + 1):
        theta = 1 / x[-1] + (1 - math.sqrt(m / (j - 0.5))) / (3 * first_quartile)
        shape = -sum(math.log(1 - theta * value) for value in x) / n
        thetas.append(theta)
        log_likelihoods.append(n * (math.log(theta / shape) + shape - 1))
    estimate = 0.0
    for theta, own in zip(thetas, log_likelihoods, strict=True):
        estimate += theta / sum(math.exp(other - own) for other in log_likelihoods)
    shape = -sum(math.log(1 - estimate * value) for value in x) / n
    return (n * -shape + 10 * 0.5) / (n + 10)


@pytest.mark.parametrize("n_draws", [25, 26, 100, 224, 225, 1000, 4001])
@pytest.mark.parametrize("spread", [0.01, 0.5, 1.5, 4.0])
def test_pareto_k_by_its_formulas(normal, n_draws, spread):
    log_weights = spread * normal(3, n_draws)
    expected = [naive_pareto_k(np.exp(row)) for row in log_weights.numpy()]
    actual = pareto_k(log_weights)
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.3, 0.7, 1.2])
def test_pareto_k_of_pareto_draws(generator, shape):
    n_rows, n_draws = 60, 10_000
    uniform = torch.rand(n_rows, n_draws, dtype=torch.float64, generator=generator)
    weights = torch.from_numpy(scipy.stats.genpareto.ppf(uniform.numpy(), shape)).log()
    k = pareto_k(weights)
    n_tail = 300
    expected = (n_tail * shape + 10 * 0.5) / (n_tail + 10)
    # Of one fit, the standard error is about (1 + k) / sqrt(n_tail).
    error = (1 + shape) / math.sqrt(n_tail)
    assert k.mean().item() == pytest.approx(expected, abs=0.01 + 4 * error / math.sqrt(n_rows))
    assert k.std().item() == pytest.approx(error, rel=0.35)


def test_pareto_k_tells_good_proposals_from_bad(generator):
    target = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    k = []
    for scale in (2.0, 1.1, 0.3):
        z = scale * torch.randn(20, 5000, dtype=torch.float64, generator=generator)
        proposal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), scale)
        k.append(pareto_k(target.log_prob(z) - proposal.log_prob(z)).mean())
    assert max(k[:2]) < 0.4 < 0.7 < k[2]


def test_pareto_k_looks_at_ratios_and_not_at_order(normal, generator):
    log_weights = 1.5 * normal(3, 400)
    k = pareto_k(log_weights)
    order = torch.randperm(400, generator=generator)
    assert_close(pareto_k(log_weights[:, order]), k)
    for shift in (-1e4, 1e4):
        torch.testing.assert_close(pareto_k(log_weights + shift), k, rtol=1e-6, atol=1e-6)
    assert_close(pareto_k(log_weights.flip(0)), k.flip(0))


def test_pareto_k_in_single_precision(normal):
    log_weights = normal(3, 400)
    k = pareto_k(log_weights.float())
    assert k.dtype == torch.float32
    torch.testing.assert_close(k.double(), pareto_k(log_weights), rtol=1e-4, atol=1e-4)


def test_pareto_k_of_equal_weights(normal):
    log_weights = normal(3, 400)
    log_weights[1] = -7.0
    k = pareto_k(log_weights)
    assert k[1] == -math.inf
    assert_close(k[[0, 2]], pareto_k(log_weights[[0, 2]]))


@pytest.mark.parametrize("n_draws", [25, 1000, 20_000])
def test_one_weight_that_outweighs_all_others_is_a_bad_sign(n_draws):
    log_weights = torch.full((1, n_draws), -800.0).double()
    log_weights[0, 3] = 0.0
    assert pareto_k(log_weights).item() > 0.7


def test_one_weight_that_outweighs_a_million():
    log_weights = torch.full((1, 10**6), -800.0).double()
    log_weights[0, 3] = 0.0
    assert pareto_k(log_weights).item() > 0.7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_equal_to_rounding_are_a_good_sign(make_posterior, generator, dtype):
    """With the exact posterior as proposal all weights are p(x), but for rounding."""
    q = make_posterior(20, 4, 10)
    q = MixturePosterior(q.component_loc.to(dtype), q.component_scale.to(dtype))
    cross = q.cross_log_prob(q.rsample_stratified(1000, generator=generator)).detach()
    log_joint = mixture_log_prob(cross.flip(-1)) - 1000.0
    log_weights = (log_joint - mixture_log_prob(cross)).transpose(0, 1).flatten(1)
    assert (effective_sample_size(log_weights) > 3999).all()
    assert (pareto_k(log_weights) < 0.7).all()


@pytest.mark.parametrize("n_draws", [1, 20])
def test_pareto_k_of_too_few_draws(normal, n_draws):
    with pytest.raises(ValueError, match=rf"at least 25 draws per row, got {n_draws}"):
        pareto_k(normal(3, n_draws))


@pytest.mark.parametrize("n_draws", [21, 24])
def test_pareto_k_of_almost_enough_draws(normal, n_draws):
    with pytest.raises(ValueError, match=rf"at least 25 draws per row, got {n_draws}"):
        pareto_k(normal(3, n_draws))


# Active units


def test_active_units(normal):
    standard = normal(1000, 3)
    standard = (standard - standard.mean(0)) / standard.std(0, correction=0)
    scale = torch.tensor([0.0999, 0.1001, 0.0], dtype=torch.float64)
    means = 5.0 + scale * standard
    assert active_units(means).tolist() == [False, True, False]
    assert active_units(means, threshold=0.02).tolist() == [False, False, False]
    assert active_units(means, threshold=1e-6).tolist() == [True, True, False]


def test_active_units_at_the_threshold():
    means = torch.tensor([[-1.0, -2.0], [1.0, 2.0]], dtype=torch.float64)
    assert active_units(means, threshold=1.0).tolist() == [False, True]


PARETO_2 = -2 * (1 - (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000).log()


@pytest.mark.parametrize("outlier", [-math.inf, -6e5, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_far_from_the_posterior_does_not_hide_a_bad_tail(outlier, dtype):
    """Weights with tail index 2 are no better for one of a thousand being zero."""
    log_weights = PARETO_2.to(dtype).repeat(2, 1)
    log_weights[1, 0] = outlier
    k = pareto_k(log_weights)
    assert k[0] == pytest.approx(2.0, abs=0.3)
    torch.testing.assert_close(k[1], k[0], rtol=0, atol=0.02)


@pytest.mark.parametrize("n_finite", [1, 5, 40])
def test_a_few_draws_with_any_weight_are_a_bad_sign(n_finite):
    log_weights = torch.full((1, 1000), -math.inf)
    log_weights[0, :n_finite] = -5.0
    assert pareto_k(log_weights).item() == math.inf
    log_weights[0, n_finite:] = -6e5
    assert pareto_k(log_weights).item() == math.inf


def test_pareto_k_without_any_weight_or_with_nan():
    log_weights = torch.zeros(3, 100)
    log_weights[0] = -math.inf
    log_weights[1, 3] = math.nan
    k = pareto_k(log_weights)
    assert k[0] == math.inf
    assert k[1].isnan()
    assert k[2] == -math.inf


def test_ties_are_judged_in_the_type_that_the_weights_were_computed_in(normal):
    """Equal weights, a few roundings of single precision apart, cast to double afterwards."""
    exact = torch.full((1, 400), -1750.0, dtype=torch.float64)
    rounded = (exact + 2e-4 * normal(1, 400)).float().double()
    assert pareto_k(rounded, computed_in=torch.float32).item() == -math.inf
    assert pareto_k(rounded).item() > -1


@pytest.mark.parametrize("shift", [-3e5, -6e5, -1e6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bad_tail_is_one_wherever_the_weights_are(shift, dtype):
    log_weights = (PARETO_2 + shift).to(dtype).unsqueeze(0)
    assert pareto_k(log_weights).item() > 0.9
    assert pareto_k(log_weights.double(), computed_in=torch.float32).item() > 0.9
