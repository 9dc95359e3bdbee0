"""The distribution that scvi-tools sees."""

import torch
from scvi.distributions._utils import DistributionConcatenator, subset_distribution

from mixscvi.module import FactorizedMixture
from naive_module import naive_mixture


def factorized(n_cells=6, n_components=4, n_latent=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (n_cells, n_components, n_latent)
    loc = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    return FactorizedMixture(loc, scale)


def test_factorized_log_prob_sums_to_the_joint():
    q = factorized()
    z = 2 * torch.randn(5, 6, 3, dtype=torch.float64)
    reference = naive_mixture(q.component_loc, q.component_scale).log_prob(z)
    assert q.log_prob(z).shape == z.shape
    torch.testing.assert_close(q.log_prob(z).sum(-1), reference, rtol=1e-12, atol=1e-12)


def test_factorized_terms_are_conditionals():
    """Each term, as a function of its own coordinate, is a normalized density."""
    q = factorized(n_cells=1)
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    z = torch.randn(3, dtype=torch.float64)
    for d in range(3):
        points = z.repeat(len(grid), 1)
        points[:, d] = grid
        density = q.log_prob(points[:, None])[:, 0, d].exp()
        torch.testing.assert_close(torch.trapezoid(density, grid).item(), 1.0, rtol=1e-6, atol=0)


def test_factorized_log_prob_has_gradients():
    q = factorized()
    loc, scale = q.component_loc.requires_grad_(), q.component_scale.requires_grad_()
    z = torch.randn(6, 3, dtype=torch.float64)
    ours = torch.autograd.grad(q.log_prob(z).sum(), (loc, scale))
    reference = torch.autograd.grad(naive_mixture(loc, scale).log_prob(z).sum(), (loc, scale))
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-10)


def test_factorized_moments_are_those_of_the_mixture():
    q = factorized()
    reference = naive_mixture(q.component_loc, q.component_scale)
    torch.testing.assert_close(q.loc, reference.mean)
    torch.testing.assert_close(q.scale, reference.variance.sqrt())
    draws = q.sample((40_000,))
    assert draws.shape == (40_000, 6, 3)
    error = (draws.mean(0) - q.loc) / (q.scale / 200)
    assert error.abs().max() < 5
    torch.testing.assert_close(draws.std(0), q.scale, rtol=0.03, atol=0)


def test_factorized_survives_scvi_tools_subsets_and_concatenation():
    q = factorized()
    part = subset_distribution(q, torch.tensor([4, 1]), 0)
    z = torch.randn(2, 3, dtype=torch.float64)
    expected = naive_mixture(q.component_loc[[4, 1]], q.component_scale[[4, 1]]).log_prob(z)
    torch.testing.assert_close(part.log_prob(z).sum(-1), expected)
    store = DistributionConcatenator()
    store.store_distribution(subset_distribution(q, torch.arange(4), 0))
    store.store_distribution(subset_distribution(q, torch.arange(4, 6), 0))
    joined = store.get_concatenated_distributions(axis=0)
    torch.testing.assert_close(joined.component_loc, q.component_loc)
    torch.testing.assert_close(joined.component_scale, q.component_scale)


def test_factorized_expands():
    q = factorized(n_cells=1)
    wide = q.expand((5, 6, 3))
    assert wide.batch_shape == (5, 6, 3)
    z = torch.randn(5, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(wide.log_prob(z), q.log_prob(z.view(30, 1, 3)).view(5, 6, 3))
    joint = torch.distributions.Independent(q, 1).expand((6,))
    assert joint.batch_shape == (6,)
    assert repr(q) == "FactorizedMixture(batch_shape=(1, 3), n_components=4)"
