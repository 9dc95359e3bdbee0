import math
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from mixscvi.mixture import MixturePosterior, jensen_shannon_divergence
from tensor_sizes import LargestTensor

assert_close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)


def naive_log_prob(z, loc, scale):
    """Log-density of a diagonal Gaussian at a point, one dimension at a time."""
    total = 0.0
    for d in range(len(z)):
        total = total - (z[d] - loc[d]) ** 2 / (2 * scale[d] ** 2)
        total = total - torch.log(scale[d]) - math.log(2 * math.pi) / 2
    return total


def gradients(value, posterior, *more):
    parameters = (posterior.component_loc, posterior.component_scale, *more)
    return torch.autograd.grad(value, parameters)


@pytest.mark.parametrize("n_components", [1, 3])
def test_component_log_prob_is_a_loop(make_posterior, normal, n_components):
    q = make_posterior(2, n_components, 3)
    value = normal(4, 2, 3).requires_grad_()
    actual = q.component_log_prob(value)
    assert actual.shape == (4, 2, n_components)
    expected = torch.stack(
        [
            naive_log_prob(value[n, b], q.component_loc[b, a], q.component_scale[b, a])
            for n in range(4)
            for b in range(2)
            for a in range(n_components)
        ]
    ).view(4, 2, n_components)
    assert_close(actual, expected)
    weights = normal(*actual.shape)
    assert_close(
        gradients((weights * actual).sum(), q, value),
        gradients((weights * expected).sum(), q, value),
    )


@pytest.mark.parametrize("n_sampled", [1, 2, 3])
def test_cross_log_prob_is_a_double_loop(make_posterior, normal, n_sampled):
    q = make_posterior(2, 3, 2)
    draws = normal(4, 2, n_sampled, 2).requires_grad_()
    actual = q.cross_log_prob(draws)
    assert actual.shape == (4, 2, n_sampled, 3)
    expected = torch.stack(
        [
            naive_log_prob(draws[i, b, s], q.component_loc[b, a], q.component_scale[b, a])
            for i in range(4)
            for b in range(2)
            for s in range(n_sampled)
            for a in range(3)
        ]
    ).view(4, 2, n_sampled, 3)
    assert_close(actual, expected)
    weights = normal(*actual.shape)
    assert_close(
        gradients((weights * actual).sum(), q, draws),
        gradients((weights * expected).sum(), q, draws),
    )


def test_log_prob_is_a_loop(make_posterior, normal):
    q = make_posterior(3, 4, 2)
    value = normal(5, 3, 2).requires_grad_()
    actual = q.log_prob(value)
    expected = torch.stack(
        [
            torch.log(
                sum(
                    naive_log_prob(
                        value[n, b], q.component_loc[b, a], q.component_scale[b, a]
                    ).exp()
                    for a in range(4)
                )
                / 4
            )
            for n in range(5)
            for b in range(3)
        ]
    ).view(5, 3)
    assert_close(actual, expected)
    weights = normal(5, 3)
    assert_close(
        gradients((weights * actual).sum(), q, value),
        gradients((weights * expected).sum(), q, value),
    )


def test_far_from_every_component_log_prob_stays_finite(make_posterior):
    q = make_posterior(2, 3, 2)
    value = torch.full((2, 2), 1e4, dtype=torch.float64, requires_grad=True)
    log_prob = q.log_prob(value)
    assert (log_prob < -1e7).all() and log_prob.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(log_prob.sum(), q, value))


def as_mixture_same_family(q):
    normals = Independent(Normal(q.component_loc, q.component_scale), 1)
    return MixtureSameFamily(Categorical(torch.ones(q.component_loc.shape[:-1]).double()), normals)


@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)])
def test_moments_and_shapes_are_those_of_torch_mixture(make_posterior, normal, batch_shape):
    q = make_posterior(*batch_shape, 4, 2)
    reference = as_mixture_same_family(q)
    assert q.batch_shape == reference.batch_shape == batch_shape
    assert q.event_shape == reference.event_shape == (2,)
    assert q.n_components == 4
    assert_close(q.mean, reference.mean)
    assert_close(q.variance, reference.variance)
    value = normal(5, *batch_shape, 2)
    assert_close(q.log_prob(value), reference.log_prob(value))
    assert q.sample().shape == (*batch_shape, 2)
    assert q.rsample((5, 6)).shape == (5, 6, *batch_shape, 2)
    assert q.rsample_stratified(7).shape == (7, *batch_shape, 4, 2)


def test_rsample_law(generator):
    loc = torch.tensor([[[-3.0, 0.0], [1.0, 2.0]], [[0.0, 0.0], [5.0, -5.0]]]).double()
    scale = torch.tensor([[[0.5, 1.0], [1.0, 2.0]], [[1.0, 1.0], [1.0, 0.1]]]).double()
    q = MixturePosterior(loc, scale)
    draws = q.rsample((40_000,), generator)
    torch.testing.assert_close(draws.mean(0), q.mean, rtol=0, atol=0.07)
    torch.testing.assert_close(draws.var(0), q.variance, rtol=0.03, atol=0)
    # A draw has one component for all of its dimensions: its means move together.
    between = (loc - q.mean[:, None]).prod(-1).mean(-1)
    covariance = (draws - q.mean).prod(-1).mean(0)
    torch.testing.assert_close(covariance, between, rtol=0.03, atol=0)
    for b in range(2):
        for d in range(2):

            def cdf(z, b=b, d=d):
                return np.mean(
                    [scipy.stats.norm.cdf(z, loc[b, a, d], scale[b, a, d]) for a in range(2)],
                    axis=0,
                )

            assert scipy.stats.kstest(draws[:, b, d].numpy(), cdf).pvalue > 1e-3
    # Cells choose independently of each other.
    left = draws[:, 0, 0] < -1
    right = draws[:, 1, 0] > 2.5
    joint = (left & right).double().mean()
    torch.testing.assert_close(joint.item(), 0.25, rtol=0.05, atol=0)


def test_rsample_gradient_is_that_of_the_chosen_component(make_posterior, generator):
    q = make_posterior(2, 3, 4)
    draws = q.rsample((50,), generator)
    by_loc, by_scale = gradients(draws.sum(), q)
    # Each draw moves with one component's mean, the same in all dimensions.
    assert_close(by_loc, by_loc[..., :1].expand_as(by_loc))
    assert_close(by_loc, by_loc.round())
    assert_close(by_loc.sum(1), torch.full((2, 4), 50.0).double())
    assert (by_loc > 0).all()
    # draws = loc + scale * noise, summed: the noise is the gradient of the scale.
    assert_close((by_loc * q.component_loc + by_scale * q.component_scale).sum(1), draws.sum(0))


def test_sample_is_rsample_without_gradient(make_posterior):
    q = make_posterior(2, 3, 4)
    sample = q.sample((5,), torch.Generator().manual_seed(1))
    rsample = q.rsample((5,), torch.Generator().manual_seed(1))
    assert rsample.requires_grad and not sample.requires_grad
    assert torch.equal(sample, rsample)


def test_rsample_stratified_law(make_posterior, generator):
    q = make_posterior(2, 3, 2, spread=3.0)
    draws = q.rsample_stratified(20_000, generator=generator)
    assert draws.shape == (20_000, 2, 3, 2)
    standardized = ((draws - q.component_loc) / q.component_scale).detach()
    torch.testing.assert_close(
        standardized.mean(0), torch.zeros(2, 3, 2).double(), rtol=0, atol=0.03
    )
    correlation = standardized.flatten(1).T.corrcoef()
    torch.testing.assert_close(correlation, torch.eye(12).double(), rtol=0, atol=0.03)
    torch.testing.assert_close(standardized.std(0), torch.ones(2, 3, 2).double(), rtol=0, atol=0.03)


def test_rsample_stratified_is_reparameterized(make_posterior, normal, generator):
    q = make_posterior(2, 3, 2)
    draws = q.rsample_stratified(5, generator=generator)
    weights = normal(5, 2, 3, 2)
    by_loc, by_scale = gradients((weights * draws).sum(), q)
    noise = (draws - q.component_loc) / q.component_scale
    assert_close(by_loc, weights.sum(0))
    assert_close(by_scale, (weights * noise).sum(0).detach())


@pytest.mark.parametrize("components", [[0, 1, 2, 3], [2, 0], [3], [1, 1, 1]])
def test_components_of_stratified_draws_are_those_asked_for(make_posterior, components):
    q = make_posterior(2, 4, 3)
    chosen = MixturePosterior(q.component_loc[:, components], q.component_scale[:, components])
    draws = q.rsample_stratified(5, torch.tensor(components), torch.Generator().manual_seed(3))
    expected = chosen.rsample_stratified(5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draws, expected)
    if len(set(components)) < len(components):
        assert not torch.equal(draws[:, :, 0], draws[:, :, 1])


@pytest.mark.parametrize(
    "draw",
    [
        lambda q, g: q.rsample((3,), g),
        lambda q, g: q.sample((3,), g),
        lambda q, g: q.rsample_stratified(3, generator=g),
        lambda q, g: q.jensen_shannon_divergence(3, g),
    ],
    ids=["rsample", "sample", "rsample_stratified", "jensen_shannon_divergence"],
)
def test_a_generator_determines_the_draws(make_posterior, draw):
    q = make_posterior(2, 3, 2)
    before = torch.get_rng_state()
    first = draw(q, torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, draw(q, torch.Generator().manual_seed(7)))
    assert not torch.equal(first, draw(q, torch.Generator().manual_seed(8)))
    torch.manual_seed(7)
    default = draw(q, None)
    torch.manual_seed(7)
    assert torch.equal(default, draw(q, None))
    assert not torch.equal(torch.get_rng_state(), before)


def test_jensen_shannon_divergence_is_that_of_its_draws(make_posterior):
    q = make_posterior(2, 3, 2)
    draws = q.rsample_stratified(6, generator=torch.Generator().manual_seed(2))
    actual = q.jensen_shannon_divergence(6, torch.Generator().manual_seed(2))
    assert_close(actual, jensen_shannon_divergence(q.cross_log_prob(draws)))


def test_single_precision_is_kept(make_posterior):
    q = make_posterior(2, 3, 2)
    single = MixturePosterior(q.component_loc.float(), q.component_scale.float())
    draws = single.rsample_stratified(2)
    assert draws.dtype == single.log_prob(draws[:, :, 0]).dtype == torch.float32
    assert single.mean.dtype == single.variance.dtype == single.rsample().dtype == torch.float32


def test_repr():
    q = MixturePosterior(torch.zeros(5, 3, 2), torch.ones(5, 3, 2))
    assert repr(q) == "MixturePosterior(batch_shape=(5,), n_components=3, n_latent=2)"


@pytest.mark.parametrize(
    ("loc_shape", "scale_shape"), [((2, 3, 4), (2, 3, 5)), ((2, 3, 4), (3, 4)), ((3,), (3,))]
)
def test_shapes_that_do_not_fit(loc_shape, scale_shape):
    with pytest.raises(ValueError, match="component_loc and component_scale") as error:
        MixturePosterior(torch.zeros(loc_shape), torch.ones(scale_shape))
    assert f"got {loc_shape} and {scale_shape}" in str(error.value)


def test_validate_args_looks_at_the_values():
    loc, scale = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    scale[1, 2, 3] = -1.0
    MixturePosterior(loc, scale)
    with pytest.raises(ValueError, match="component_scale"):
        MixturePosterior(loc, scale, validate_args=True)
    with pytest.raises(ValueError, match="component_loc"):
        MixturePosterior(loc * torch.nan, scale.abs(), validate_args=True)


def test_many_components_are_scored_in_bounded_memory(normal, monkeypatch):
    """In chunks the log-density and all its gradients are what they are in one piece."""
    from mixscvi.mixture import gaussians

    loc, log_scale, value = normal(50, 3), normal(50, 3) / 3, normal(4, 5, 2, 3)
    inputs = [part.requires_grad_() for part in (loc, log_scale, value)]
    weights = normal(4, 5, 2)
    results = []
    for at_once in (2**24, 7 * 150):
        monkeypatch.setattr(gaussians, "_ELEMENTS_AT_ONCE", at_once)
        log_prob = MixturePosterior(loc, log_scale.exp()).log_prob(value)
        results.append((log_prob, *torch.autograd.grad((weights * log_prob).sum(), inputs)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        again = MixturePosterior(loc, log_scale.exp()).log_prob(value)
    torch.testing.assert_close(again, results[0][0].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_cells", [9, 128])
@pytest.mark.parametrize("method", ["cross_log_prob", "component_log_prob", "log_prob"])
def test_densities_of_many_components_take_bounded_memory(method, n_cells, generator):
    """Forward and backward; 200 components of 10 dimensions, all at the draws of all."""
    n_samples = 1 if n_cells > 9 else 2
    shape = (n_cells, 200, 10)
    loc = torch.randn(shape, generator=generator).requires_grad_()
    scale = (0.5 + torch.rand(shape, generator=generator)).requires_grad_()
    q = MixturePosterior(loc, scale)
    stratified = (n_samples, n_cells, 200, 10)
    z = torch.randn(stratified if method == "cross_log_prob" else (200 * n_samples, n_cells, 10))
    z.requires_grad_()
    with LargestTensor() as largest:
        result = getattr(q, method)(z)
        gradients = torch.autograd.grad(result.square().sum(), (z, loc, scale))
    # The differences of all points to all means would be this many; what is asked for may be more
    # than the limit itself.
    assert largest.numel <= max(2**22, result.numel()) < z.numel() * 200
    with torch.no_grad():
        whole = torch.distributions.Normal(loc.unsqueeze(1), scale.unsqueeze(1))
        points = z if method == "cross_log_prob" else z.unsqueeze(2)
        expected = whole.log_prob(points.unsqueeze(-2)).sum(-1)
        if method == "log_prob":
            expected = expected.logsumexp(-1) - math.log(200)
    torch.testing.assert_close(result, expected.view_as(result), rtol=1e-4, atol=1e-3)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("sizes", [(1, 3, 2, 4, 2), (3, 1, 5, 4, 2), (5, 7, 3, 2, 3)])
def test_pieces_give_the_values_and_gradients_of_the_whole(sizes, generator, monkeypatch):
    n_samples, n_cells, n_sampled, n_components, n_latent = sizes
    shape = (n_cells, n_components, n_latent)
    loc = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    scale = (0.5 + torch.rand(shape, dtype=torch.float64, generator=generator)).requires_grad_()
    z = torch.randn((n_samples, n_cells, n_sampled, n_latent), dtype=torch.float64)
    z.requires_grad_()

    def compute():
        q = MixturePosterior(loc, scale)
        results = (q.cross_log_prob(z), q.component_log_prob(z[:, :, 0]), q.log_prob(z[:, :, 0]))
        total = sum(result.square().sum() for result in results)
        return *results, *torch.autograd.grad(total, (z, loc, scale))

    whole = compute()
    monkeypatch.setattr("mixscvi.mixture.gaussians._ELEMENTS_AT_ONCE", 10)
    for got, expected in zip(compute(), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_expand_repeats_the_mixture(make_posterior):
    q = make_posterior(1, 4, 3)
    wide = q.expand((6, 5))
    assert wide.batch_shape == (6, 5)
    assert wide.event_shape == (3,)
    z = torch.randn(2, 6, 5, 3, dtype=q.component_loc.dtype)
    torch.testing.assert_close(wide.log_prob(z), q.log_prob(z.flatten(0, 2)[:, None]).view(2, 6, 5))
    independent = torch.distributions.Independent(wide, 1)
    assert independent.expand((2, 6)).batch_shape == (2, 6)


def test_variance_is_never_negative():
    """Means that are equal to rounding, far from zero, with scales that underflow when squared."""
    loc = torch.full((1, 3, 1), 1e4) + torch.tensor([0.0, 1e-3, -1e-3])[None, :, None]
    q = MixturePosterior(loc, torch.full_like(loc, 1e-30))
    assert (q.variance >= 0).all()


def test_stratified_densities_are_those_of_the_cross_matrix(make_posterior):
    q = make_posterior(5, 4, 3)
    for components in (None, torch.tensor([2, 0, 2])):
        z = q.rsample_stratified(3, components)
        cross = q.cross_log_prob(z)
        expected = cross.logsumexp(-1) - math.log(4)
        torch.testing.assert_close(q.stratified_log_prob(z), expected)
        drawn = torch.arange(4) if components is None else components
        own = cross.gather(-1, drawn.expand(3, 5, -1).unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(q.own_log_prob(z, components), own)


def test_the_stratified_density_does_not_keep_the_cross_matrix():
    q = MixturePosterior(torch.randn(64, 500, 10).requires_grad_(), torch.ones(64, 500, 10))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        q.stratified_log_prob(q.rsample_stratified())
    assert max(kept) <= 64 * 500 * 10  # the draws; the cross matrix would be 50 times as large
