"""Moments and densities that have no closed form."""

import math

import pytest
import torch

from mixscvi.mixture import MixturePosterior
from mixscvi.module import densities
from mixscvi.module.densities import importance_density, latent_moments
from naive_module import (
    make_module,
    make_tensors,
    naive_flow,
    naive_mixture,
    naive_prior,
    standard_normal,
)


def test_importance_density_scores_every_point_under_every_cell():
    module = make_module(n_flow_steps=2, prior="mog").double().eval()
    q = module.posterior(make_tensors(module, 4))
    q = MixturePosterior(q.component_loc.clone(), q.component_scale.clone())
    z0 = torch.randn(6, 2, dtype=torch.float64)
    z, log_det = naive_flow(module, z0)
    z, log_det = z.detach(), log_det.detach()
    got = importance_density(q, z[:, None], module.prior_distribution(), module.flow)
    mixture = naive_mixture(q.component_loc, q.component_scale)
    shift = standard_normal(2).log_prob(z) - naive_prior(module).log_prob(z) - log_det
    expected = mixture.log_prob(z0[:, None].expand(6, 4, 2)) + shift[:, None]
    torch.testing.assert_close(got, expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("latent_distribution", ["normal", "ln"])
def test_latent_moments_are_those_behind_the_flow(latent_distribution):
    module = make_module(n_flow_steps=2, latent_distribution=latent_distribution).eval()
    q = module.posterior(make_tensors(module, 3))

    def transform(z0):
        return module.z_encoder.z_transformation(module.push_forward(z0)[0])

    mean, variance = latent_moments(q, transform, 30_000)
    with torch.no_grad():
        draws = module._plain_draws(q, 30_000)["z"]
    assert draws.shape == (30_000, 3, 2)
    error = (mean - draws.mean(0)) / (draws.std(0) / math.sqrt(15_000))
    assert error.abs().max() < 5
    squares = (draws - draws.mean(0)).square()
    error = (variance - squares.mean(0)) / (squares.std(0) / math.sqrt(15_000))
    assert error.abs().max() < 5
    again, _ = latent_moments(q, transform, 30_000)
    assert torch.equal(mean, again)


@pytest.mark.parametrize("n_cells", [1, 500])
def test_latent_moments_take_passes_that_fit_the_minibatch(n_cells, monkeypatch):
    """Many cells: few draws at a time; few cells: many. Neither changes the result."""
    monkeypatch.setattr(densities, "_ELEMENTS_AT_ONCE", 2**14)
    q = MixturePosterior(torch.randn(n_cells, 3, 2), torch.rand(n_cells, 3, 2))
    sizes = []

    def transform(z0):
        sizes.append(z0.numel())
        return z0.exp()

    mean, variance = latent_moments(q, transform, 900)
    assert max(sizes) * densities._FLOW_WIDTH <= max(2**14, 8 * n_cells * 6)
    assert len(sizes) == (1 if n_cells == 1 else 300)
    monkeypatch.setattr(densities, "_ELEMENTS_AT_ONCE", 2**30)
    torch.testing.assert_close((mean, variance), latent_moments(q, transform, 900))


def test_variances_are_never_negative():
    """Far more digits in the mean than in what varies."""
    q = MixturePosterior(torch.full((50, 3, 2), 3.0), torch.full((50, 3, 2), 1e-12))
    _, variance = latent_moments(q, lambda z: 1e4 * z.square(), 900)
    assert (variance >= 0).all()


def test_variances_are_taken_about_the_mean_of_what_is_averaged():
    """Two modes: the map of the mean is far from the mean of the map."""
    loc = torch.tensor([[[5.0], [-5.0]]])
    q = MixturePosterior(loc, torch.full_like(loc, 1e-4))
    _, variance = latent_moments(q, lambda z: 1e4 * z.square(), 20_000)
    assert variance.item() == pytest.approx(100, rel=0.1)
