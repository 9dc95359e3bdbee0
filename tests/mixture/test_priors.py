import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from mixscvi.mixture import (
    AmortizedEncoder,
    GaussianMixture,
    Prior,
    SeparateEncoder,
    StandardNormal,
    VampPrior,
)
from tensor_sizes import LargestTensor

assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)

ENCODERS = [SeparateEncoder, AmortizedEncoder]
N_LATENT, N_PSEUDO, N_COMPONENTS = 2, 5, 3


class PseudoInputs(nn.Module):
    """Learned inputs, and the covariates that go with them where there are any."""

    def __init__(self, *values):
        super().__init__()
        self.values = nn.ParameterList(values)

    def forward(self):
        return tuple(self.values) if len(self.values) > 1 else self.values[0]


@pytest.fixture
def make_encoder(scramble):
    def make(kind, **options):
        sizes = {"n_in": 6, "n_latent": N_LATENT, "n_hidden": 5, "n_layers": 2}
        encoder = kind(N_COMPONENTS, dropout_rate=0.5, **sizes, **options)
        return scramble(encoder.double()).train()

    return make


@pytest.fixture
def vamp(make_encoder, normal):
    return VampPrior(PseudoInputs(normal(N_PSEUDO, 6))), make_encoder(SeparateEncoder)


@pytest.fixture
def mixture_of_gaussians(normal):
    prior = GaussianMixture(N_LATENT, 4).double()
    for parameter in prior.parameters():
        parameter.data = 0.4 * normal(*parameter.shape)
    return prior


@pytest.fixture(params=["normal", "mog", "vamp"])
def prior_and_encoder(request, vamp, mixture_of_gaussians):
    return {
        "normal": (StandardNormal(N_LATENT).double(), None),
        "mog": (mixture_of_gaussians, None),
        "vamp": vamp,
    }[request.param]


# What every prior offers


def test_contract(prior_and_encoder, normal):
    prior, encoder = prior_and_encoder
    assert isinstance(prior, Prior)
    p = prior(encoder)
    assert p.batch_shape == () and p.event_shape == (N_LATENT,)
    z = normal(7, 3, 4, N_LATENT)
    log_prob = p.log_prob(z)
    assert log_prob.shape == (7, 3, 4) and log_prob.dtype == torch.float64
    assert_close(log_prob[2, 1, 3], p.log_prob(z[2, 1, 3]))
    sample = p.sample((5, 6))
    assert sample.shape == (5, 6, N_LATENT) and not sample.requires_grad


def test_density_integrates_to_one(prior_and_encoder):
    prior, encoder = prior_and_encoder
    axis = torch.linspace(-15, 15, 401, dtype=torch.float64)
    density = prior(encoder).log_prob(torch.cartesian_prod(axis, axis)).exp()
    total = density.sum().item() * (axis[1] - axis[0]).item() ** 2
    assert total == pytest.approx(1.0, abs=1e-6)


def test_samples_follow_the_density(prior_and_encoder):
    """Moments, against quadrature of the density on a grid."""
    prior, encoder = prior_and_encoder
    p = prior(encoder)
    axis = torch.linspace(-15, 15, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    mass = p.log_prob(grid).exp().detach() * (axis[1] - axis[0]) ** 2
    mean = mass @ grid
    covariance = (grid - mean).T @ (mass[:, None] * (grid - mean))
    sample = p.sample((50_000,))
    torch.testing.assert_close(sample.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(sample.T.cov(), covariance, rtol=0, atol=0.04 * covariance.max())
    torch.testing.assert_close(p.mean, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(p.variance, covariance.diagonal(), rtol=0, atol=1e-5)


def test_gradient_reaches_every_parameter(prior_and_encoder, normal):
    prior, encoder = prior_and_encoder
    z = normal(50, N_LATENT).requires_grad_()
    prior(encoder).log_prob(z).sum().backward()
    assert z.grad.abs().min() > 0
    parts = nn.ModuleList([prior] if encoder is None else [prior, encoder])
    for name, parameter in parts.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_state_dict_round_trip(prior_and_encoder, normal):
    prior, encoder = prior_and_encoder
    z = normal(4, N_LATENT)
    expected = prior(encoder).log_prob(z)
    state = {name: value.clone() for name, value in prior.state_dict().items()}
    for parameter in prior.parameters():
        parameter.data += 1.0
    if state:
        assert not torch.allclose(prior(encoder).log_prob(z), expected)
    prior.load_state_dict(state)
    assert torch.equal(prior(encoder).log_prob(z), expected)


# Standard normal


def test_standard_normal_log_prob(normal):
    prior = StandardNormal(3).double()
    z = normal(6, 3).requires_grad_()
    actual = prior(None).log_prob(z)
    expected = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double()).log_prob(z)
    assert_close(actual, expected)
    (gradient,) = torch.autograd.grad(actual.sum(), z)
    assert_close(gradient, -z.detach())
    assert not list(prior.parameters()) and not prior.state_dict()


# Mixture of Gaussians


def test_gaussian_mixture_is_a_loop(mixture_of_gaussians, normal):
    prior = mixture_of_gaussians
    z = normal(6, N_LATENT).requires_grad_()
    actual = prior(None).log_prob(z)
    weights = prior.logits.exp() / prior.logits.exp().sum()
    density = 0.0
    for k in range(4):
        factor = weights[k]
        for d in range(N_LATENT):
            scale = prior.log_scale[k, d].exp()
            standardized = (z[:, d] - prior.loc[k, d]) / scale
            factor = factor * (-(standardized**2) / 2).exp() / (scale * math.sqrt(2 * math.pi))
        density = density + factor
    expected = density.log()
    assert_close(actual, expected)
    coefficients = normal(6)
    targets = (z, *prior.parameters())
    assert_close(
        torch.autograd.grad((coefficients * actual).sum(), targets),
        torch.autograd.grad((coefficients * expected).sum(), targets),
    )


def test_gaussian_mixture_starts_with_equal_weights_and_unit_scales():
    prior = GaussianMixture(3, n_components=200)
    p = prior(None)
    assert_close(p.mixture_distribution.probs, torch.full((200,), 1 / 200), rtol=1e-6, atol=0)
    assert (p.component_distribution.base_dist.scale == 1).all()
    assert prior.loc.shape == (200, 3)
    assert prior.loc.std().item() == pytest.approx(1.0, abs=0.1)


# VampPrior


def naive_vamp(encoder, inputs, z):
    """Sum over pseudo-inputs and components; each input passes the encoder alone."""
    was_training = encoder.training
    encoder.eval()
    density = 0.0
    for k in range(N_PSEUDO):
        q = encoder(*(value[k : k + 1] for value in inputs))
        for a in range(N_COMPONENTS):
            component = Normal(q.component_loc[0, a], q.component_scale[0, a])
            density = density + component.log_prob(z).sum(-1).exp()
    encoder.train(was_training)
    return (density / (N_PSEUDO * N_COMPONENTS)).log()


@pytest.mark.parametrize("n_covariates", [0, 2])
@pytest.mark.parametrize("kind", ENCODERS)
def test_vamp_prior_is_a_double_loop(make_encoder, normal, kind, n_covariates):
    encoder = make_encoder(kind, n_covariates=n_covariates, activation=nn.Tanh)
    inputs = [normal(N_PSEUDO, 6)] + [normal(N_PSEUDO, n_covariates)] * bool(n_covariates)
    prior = VampPrior(PseudoInputs(*inputs))
    z = normal(7, N_LATENT).requires_grad_()
    p = prior(encoder)
    assert p.n_components == N_PSEUDO * N_COMPONENTS
    actual = p.log_prob(z)
    expected = naive_vamp(encoder, list(prior.pseudo_inputs.values), z)
    assert_close(actual, expected)
    coefficients = normal(7)
    targets = (z, *prior.parameters(), *encoder.parameters())
    by_actual = torch.autograd.grad((coefficients * actual).sum(), targets)
    by_expected = torch.autograd.grad((coefficients * expected).sum(), targets)
    assert_close(by_actual, by_expected)
    assert all(gradient.any() for gradient in by_actual)


def test_vamp_prior_holds_no_parameter_of_the_encoder(vamp):
    prior, encoder = vamp
    prior(encoder)
    assert [name for name, _ in prior.named_parameters()] == ["pseudo_inputs.values.0"]


def test_vamp_prior_leaves_the_encoder_as_it_was(vamp):
    prior, encoder = vamp
    encoder.trunk.batch_norms[1].eval()
    encoder.heads.eval()
    flags = [part.training for part in encoder.modules()]
    assert True in flags and False in flags
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    prior(encoder)
    assert [part.training for part in encoder.modules()] == flags
    after = encoder.state_dict()
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_vamp_prior_leaves_the_encoder_as_it_was_after_an_error(vamp, normal):
    _, encoder = vamp
    encoder.heads.eval()
    flags = [part.training for part in encoder.modules()]
    with pytest.raises(RuntimeError):
        VampPrior(PseudoInputs(normal(N_PSEUDO, 99)))(encoder)
    assert [part.training for part in encoder.modules()] == flags


def test_vamp_prior_is_no_function_of_the_mode_or_of_chance(vamp, normal):
    prior, encoder = vamp
    z = normal(4, N_LATENT)
    training = prior(encoder).log_prob(z)
    assert torch.equal(training, prior(encoder).log_prob(z))
    assert torch.equal(training, prior(encoder.eval()).log_prob(z))


def test_vamp_prior_needs_an_encoder(vamp):
    prior, _ = vamp
    with pytest.raises(ValueError, match="encoder=None"):
        prior(encoder=None)


def test_a_prior_of_many_gaussians_takes_bounded_memory(generator):
    prior = GaussianMixture(10, 500)
    z = torch.randn(40, 128, 10, generator=generator)
    p = prior(None)
    expected = torch.distributions.MixtureSameFamily(
        p.mixture_distribution, p.component_distribution
    ).log_prob(z)
    z.requires_grad_()
    with LargestTensor() as largest:
        log_prob = p.log_prob(z)
        gradients = torch.autograd.grad(log_prob.sum(), [z, *prior.parameters()])
    assert largest.numel <= 2**22 < z.numel() * 500
    torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-4)
    whole = torch.distributions.MixtureSameFamily(
        prior(None).mixture_distribution, prior(None).component_distribution
    ).log_prob(z)
    for got, wanted in zip(
        gradients, torch.autograd.grad(whole.sum(), [z, *prior.parameters()]), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
