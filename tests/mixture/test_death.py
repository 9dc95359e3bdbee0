"""Components whose divergence from the exact posterior is known in closed form."""

import math

import pytest
import torch
from torch.distributions import Normal

from mixscvi.mixture import (
    ImportanceDraws,
    MixturePosterior,
    dead_components,
    importance_weighted_miselbo,
    siwae,
)

N_LATENT = 3


def draws_of(loc, scale, *, n_samples=20, true_loc=0.0, log_evidence=-7.0):
    """The exact posterior is N(true_loc, I) in each of three dimensions."""
    posterior = MixturePosterior(
        torch.as_tensor(loc).double()[None, :, None].expand(5, -1, N_LATENT),
        torch.as_tensor(scale).double()[None, :, None].expand(5, -1, N_LATENT),
    )
    generator = torch.Generator().manual_seed(0)
    z = posterior.rsample_stratified(n_samples, generator=generator)
    exact = Normal(torch.tensor(true_loc).double(), 1.0)
    components = torch.arange(len(loc))
    return ImportanceDraws(
        exact.log_prob(z).sum(-1) + log_evidence,
        posterior.own_log_prob(z, components),
        posterior.stratified_log_prob(z),
    )


def divergence(loc, scale):
    """KL(N(loc, scale^2) || N(0, 1)) in three dimensions."""
    return N_LATENT * (0.5 * (scale**2 + loc**2 - 1) - math.log(scale))


def test_a_component_far_from_the_posterior_is_dead():
    loc = [0.1, -0.2, 6.0]
    assert divergence(6.0, 1.0) == 54
    dead = dead_components(draws_of(loc, [1.0, 0.9, 1.0]))
    assert dead.tolist() == [[False, False, True]] * 5
    assert dead_components(draws_of([0.1, 6.0, -6.0], [1.0] * 3)).sum(1).tolist() == [2] * 5


def test_disjoint_components_of_an_equal_fit_are_alive():
    assert not dead_components(draws_of([3.0, -3.0, 2.9], [0.5] * 3)).any()


@pytest.mark.parametrize("n_samples", [5, 20])
def test_what_counts_is_the_best_component(n_samples):
    """A component is as far off in both, but in the second no other is close."""
    loc, scale = [0.1, 8.0], [1.0, 1.0]
    assert (
        dead_components(draws_of(loc, scale, n_samples=n_samples)).tolist() == [[False, True]] * 5
    )
    loc = [5.0, 8.0]
    assert divergence(8.0, 1.0) < 10 * divergence(5.0, 1.0)
    assert not dead_components(draws_of(loc, scale, n_samples=n_samples)).any()


def test_small_differences_are_none():
    """A perfect component does not make one dead that is a few nats off."""
    assert divergence(2.5, 1.0) < 20
    assert not dead_components(draws_of([0.0, 2.5], [1.0, 1.0], n_samples=50)).any()


def test_impossible_draws_are_a_death():
    draws = draws_of([0.0, 0.1, 0.2], [1.0] * 3)
    for value in (-torch.inf, torch.nan):
        broken = draws.log_joint.clone()
        broken[..., 1] = value
        dead = dead_components(draws._replace(log_joint=broken))
        assert dead.tolist() == [[False, True, False]] * 5, value
    assert not dead_components(draws_of([0.3], [1.0])).any()


def test_one_draw_has_no_variance():
    with pytest.raises(ValueError, match="at least two"):
        dead_components(draws_of([0.0, 0.1], [1.0, 1.0], n_samples=1))


def test_siwae_forgives_a_death_that_miselbo_does_not():
    """Why: SIWAE loses at most log A and has no gradient there; MISELBO pays in full."""
    far = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)
    near = torch.zeros(3, dtype=torch.float64)
    loc = torch.cat((near, far[None]))[None, :, None]
    posterior = MixturePosterior(loc, torch.ones_like(loc))
    z = posterior.rsample_stratified(50, generator=torch.Generator().manual_seed(0))
    log_weights = Normal(0.0, 1.0).log_prob(z).sum(-1) - posterior.stratified_log_prob(z)
    bounds = {bound: bound(log_weights) for bound in (siwae, importance_weighted_miselbo)}
    pulls = {
        bound: torch.autograd.grad(value.sum(), far, retain_graph=True)[0].abs().item()
        for bound, value in bounds.items()
    }
    assert bounds[siwae].item() == pytest.approx(0, abs=1e-6)  # log 4/4: three components share it
    assert pulls[siwae] < 1e-100
    assert bounds[importance_weighted_miselbo].item() < -90
    assert pulls[importance_weighted_miselbo] > 5
