"""The identities by which the mixture posterior and its objectives are known to be right."""

import math
from functools import partial
from itertools import combinations
from statistics import NormalDist

import pytest
import torch
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)

from mixscvi.mixture import (
    InverseAutoregressiveFlow,
    MixturePosterior,
    component_elbo,
    importance_weighted_miselbo,
    jensen_shannon_divergence,
    miselbo,
    mixture_log_prob,
    siwae,
    siwae_standard_error,
)

assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def log_joint(z):
    """Some log p(x, z) that is neither Gaussian nor normalized."""
    return z.sin().sum(-1) - 0.3 * z.square().sum(-1) + 0.1 * z.prod(-1)


def log_weights_of(q, draws):
    return log_joint(draws) - mixture_log_prob(q.cross_log_prob(draws))


def repeated(q, n_components):
    """The first component of each row, several times."""
    return MixturePosterior(
        q.component_loc[:, :1].expand(-1, n_components, -1),
        q.component_scale[:, :1].expand(-1, n_components, -1),
    )


def gradients(value, *parameters):
    return torch.autograd.grad(value, parameters, retain_graph=True)


# 1: MISELBO is the components' mean ELBO and their divergence


@pytest.mark.parametrize("n_components", [1, 2, 5])
def test_miselbo_is_mean_elbo_and_divergence(make_posterior, normal, generator, n_components):
    q = make_posterior(3, n_components, 2)
    draws = q.rsample_stratified(4, generator=generator)
    cross = q.cross_log_prob(draws)
    own = torch.stack(
        [
            Independent(Normal(q.component_loc[:, a], q.component_scale[:, a]), 1).log_prob(
                draws[:, :, a]
            )
            for a in range(n_components)
        ],
        -1,
    )
    joint = normal(4, 3, n_components) + log_joint(draws)
    bound = miselbo(joint - mixture_log_prob(cross))
    parts = component_elbo(joint, own).mean(-1) + jensen_shannon_divergence(cross)
    assert_close(bound, parts)
    parameters = (q.component_loc, q.component_scale)
    assert_close(gradients(bound.sum(), *parameters), gradients(parts.sum(), *parameters))


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("n_components", [2, 4])
def test_divergence_is_between_zero_and_log_a(make_posterior, generator, n_components, spread):
    q = make_posterior(20, n_components, 2, spread=spread)
    draws = q.rsample_stratified(4000, generator=generator)
    cross = q.cross_log_prob(draws).detach()
    divergence = jensen_shannon_divergence(cross)
    noise = 5 * 0.7 * math.log(n_components) / math.sqrt(4000 * n_components)
    assert (divergence > -noise).all()
    assert (divergence < math.log(n_components) + noise).all()
    # Farther apart, more divergent: neither end of the range holds all of them.
    share = divergence.mean() / math.log(n_components)
    lowest, highest = {0.1: (0.0, 0.3), 1.0: (0.3, 0.7), 3.0: (0.7, 1.0)}[spread]
    assert lowest < share < highest


@pytest.mark.parametrize("n_components", [1, 3])
def test_divergence_of_coinciding_components_is_zero(make_posterior, generator, n_components):
    q = repeated(make_posterior(3, 1, 2), n_components)
    divergence = q.jensen_shannon_divergence(50, generator)
    assert_close(divergence, torch.zeros(3).double())


@pytest.mark.parametrize("n_components", [2, 5])
def test_divergence_of_disjoint_components_is_log_a(make_posterior, generator, n_components):
    q = make_posterior(3, n_components, 2)
    far = 1000.0 * torch.arange(n_components)[:, None].double()
    apart = MixturePosterior(q.component_loc + far, q.component_scale)
    divergence = apart.jensen_shannon_divergence(50, generator)
    assert_close(divergence, torch.full((3,), math.log(n_components), dtype=torch.float64))


def test_divergence_of_two_gaussians_by_quadrature(generator):
    loc = torch.tensor([[[-0.5], [1.0]]]).double()
    scale = torch.tensor([[[1.0], [0.6]]]).double()
    q = MixturePosterior(loc, scale)
    grid = torch.linspace(-12, 12, 20_001).double()
    density = Normal(loc[0], scale[0]).log_prob(grid).exp()
    mixture = density.mean(0)
    terms = torch.where(density > 0, density * (density / mixture).log(), 0.0)
    exact = torch.trapezoid(terms, grid).mean()
    estimate = q.jensen_shannon_divergence(200_000, generator)
    torch.testing.assert_close(estimate[0], exact, rtol=0, atol=0.005)


# 2 and 3: one component, or several that coincide


def test_one_component_makes_elbo_and_iwae(make_posterior, generator):
    q = make_posterior(3, 1, 2)
    draws = q.rsample_stratified(6, generator=generator)
    log_weights = log_weights_of(q, draws)
    single = Independent(Normal(q.component_loc[:, 0], q.component_scale[:, 0]), 1)
    ratio = log_joint(draws[:, :, 0]) - single.log_prob(draws[:, :, 0])
    elbo = ratio.mean(0)
    iwae = ratio.exp().mean(0).log()
    parameters = (q.component_loc, q.component_scale)
    for actual, expected in (
        (miselbo(log_weights), elbo),
        (siwae(log_weights), iwae),
        (importance_weighted_miselbo(log_weights), iwae),
    ):
        assert_close(actual, expected)
        assert_close(gradients(actual.sum(), *parameters), gradients(expected.sum(), *parameters))


@pytest.mark.parametrize("objective", [miselbo, siwae, importance_weighted_miselbo])
@pytest.mark.parametrize("n_components", [2, 4])
def test_identical_components_are_one(make_posterior, generator, objective, n_components):
    one = make_posterior(3, 1, 2)
    many = repeated(one, n_components)
    draws = one.rsample_stratified(6, generator=generator)
    expected = objective(log_weights_of(one, draws))
    actual = objective(log_weights_of(many, draws.expand(-1, -1, n_components, -1)))
    assert_close(actual, expected)
    parameters = (one.component_loc, one.component_scale)
    assert_close(gradients(actual.sum(), *parameters), gradients(expected.sum(), *parameters))


# 4 and 5: the estimators that draw from some of the components


def some_to_all(q, draws, subset):
    return miselbo(log_weights_of(q, draws[:, :, subset]))


def some_to_some(q, draws, subset):
    own = MixturePosterior(q.component_loc[:, subset], q.component_scale[:, subset])
    return miselbo(log_weights_of(own, draws[:, :, subset]))


SUBSETS = [list(subset) for subset in combinations(range(4), 2)]


def test_some_to_all_is_unbiased(make_posterior, generator):
    q = make_posterior(3, 4, 2)
    draws = q.rsample_stratified(5, generator=generator)
    exact = miselbo(log_weights_of(q, draws))
    values = torch.stack([some_to_all(q, draws, subset) for subset in SUBSETS])
    assert values.std(0).min() > 0.01
    assert_close(values.mean(0), exact)
    parameters = (q.component_loc, q.component_scale)
    assert_close(gradients(values.mean(0).sum(), *parameters), gradients(exact.sum(), *parameters))


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_some_to_some_is_a_lower_bound(make_posterior, generator, spread):
    q = make_posterior(3, 4, 2, spread=spread)
    draws = q.rsample_stratified(4000, generator=generator).detach()
    gap = torch.stack(
        [
            log_weights_of(q, draws[:, :, subset])
            - log_weights_of(
                MixturePosterior(q.component_loc[:, subset], q.component_scale[:, subset]),
                draws[:, :, subset],
            )
            for subset in SUBSETS
        ]
    ).mean((0, -1))
    error = gap.std(0) / math.sqrt(len(gap))
    assert (gap.mean(0) > 8 * error).all()
    expected = torch.stack(
        [some_to_all(q, draws, subset) - some_to_some(q, draws, subset) for subset in SUBSETS]
    ).mean(0)
    assert_close(gap.mean(0), expected)
    assert (gap.mean(0) < math.log(4 / 2)).all()


def test_some_to_some_is_exact_only_where_components_coincide(make_posterior, generator):
    q = repeated(make_posterior(3, 1, 2), 4)
    draws = q.rsample_stratified(5, generator=generator)
    apart = MixturePosterior(
        q.component_loc + 1000.0 * torch.arange(4)[:, None].double(), q.component_scale
    )
    far_draws = apart.rsample_stratified(5, generator=generator)
    for subset in SUBSETS:
        assert_close(some_to_some(q, draws, subset), some_to_all(q, draws, subset))
        gap = some_to_all(apart, far_draws, subset) - some_to_some(apart, far_draws, subset)
        torch.testing.assert_close(
            gap, torch.full((3,), math.log(4 / 2), dtype=torch.float64), rtol=0, atol=1e-8
        )


# 6: models whose log p(x) is known


class LinearGaussian:
    """x = W z + noise, z standard normal; three observations."""

    def __init__(self, weight, noise_scale, x):
        self.weight, self.noise_scale, self.x = weight, noise_scale, x
        n_out, n_latent = weight.shape
        covariance = weight @ weight.T + noise_scale**2 * torch.eye(n_out).double()
        self.log_evidence = MultivariateNormal(torch.zeros(n_out).double(), covariance).log_prob(x)
        precision = torch.eye(n_latent).double() + weight.T @ weight / noise_scale**2
        self.posterior_covariance = precision.inverse()
        self.posterior_loc = x @ weight @ self.posterior_covariance / noise_scale**2

    def log_joint(self, draws):
        likelihood = Normal(draws @ self.weight.T, self.noise_scale)
        prior = Normal(torch.zeros((), dtype=torch.float64), 1.0)
        return likelihood.log_prob(self.x[:, None]).sum(-1) + prior.log_prob(draws).sum(-1)

    def log_weights(self, q, n_samples, generator):
        draws = q.rsample_stratified(n_samples, generator=generator)
        return self.log_joint(draws) - mixture_log_prob(q.cross_log_prob(draws))


@pytest.mark.parametrize("n_components", [1, 4])
def test_siwae_converges_to_the_evidence(normal, generator, n_components):
    model = LinearGaussian(normal(4, 2), 0.7, normal(3, 4))
    scale = model.posterior_covariance.diagonal().sqrt()
    loc = model.posterior_loc[:, None] + 0.5 * scale * normal(3, n_components, 2)
    q = MixturePosterior(loc, 1.3 * scale.expand_as(loc))
    log_weights = model.log_weights(q, 40_000 // n_components, generator)
    error = siwae_standard_error(log_weights)
    assert (error < 0.02).all()
    assert ((siwae(log_weights) - model.log_evidence).abs() < 4 * error).all()
    # The proposal is imperfect: the bound that averages outside the logarithm shows it.
    assert (model.log_evidence - miselbo(log_weights) > 10 * error).all()


@pytest.mark.parametrize("n_components", [1, 4])
def test_every_weight_of_the_exact_posterior_is_the_evidence(normal, generator, n_components):
    orthogonal = torch.linalg.qr(normal(4, 2)).Q * torch.tensor([2.0, 0.5]).double()
    model = LinearGaussian(orthogonal, 0.7, normal(3, 4))
    loc = model.posterior_loc[:, None].expand(-1, n_components, -1)
    q = MixturePosterior(loc, model.posterior_covariance.diagonal().sqrt().expand_as(loc))
    log_weights = model.log_weights(q, 5, generator)
    assert_close(log_weights, model.log_evidence[:, None].expand_as(log_weights))


def test_siwae_is_below_the_evidence_in_expectation_and_rises_with_draws(normal, generator):
    model = LinearGaussian(normal(4, 2), 0.7, normal(3, 4))
    scale = model.posterior_covariance.diagonal().sqrt()
    loc = model.posterior_loc[:, None] + scale * normal(3, 2, 2)
    q = MixturePosterior(loc, 1.2 * scale.expand_as(loc))
    log_weights = model.log_weights(q, 20_000, generator)
    means = [
        torch.stack([siwae(part) for part in log_weights.split(n_samples)]).mean(0)
        for n_samples in (1, 4, 20)
    ]
    for lower, higher in zip(means, [*means[1:], model.log_evidence], strict=True):
        assert (lower < higher).all()


LOG_TWO = math.log(2)
FOLDED_X, FOLDED_NOISE = 2.0, 0.25


FOLDED_PRECISION = 1 + FOLDED_NOISE**-2
FOLDED_MODE = FOLDED_X * FOLDED_NOISE**-2 / FOLDED_PRECISION


def folded_log_joint(z):
    """log p(x, z) of x = |z| + noise at one x: two modes, at about x and -x."""
    prior = Normal(torch.zeros((), dtype=torch.float64), 1.0).log_prob(z)
    return (prior + Normal(z.abs(), FOLDED_NOISE).log_prob(torch.tensor(FOLDED_X))).squeeze(-1)


def folded_log_evidence():
    """Twice the integral over the positive half, where |z| is z."""
    half = NormalDist(0, math.sqrt(1 + FOLDED_NOISE**2)).pdf(FOLDED_X)
    return math.log(2 * half * NormalDist().cdf(FOLDED_MODE * math.sqrt(FOLDED_PRECISION)))


def fitted(n_components, generator):
    """A posterior fitted by MISELBO, from a start between the modes."""
    start = torch.tensor([1.0, -1.0], dtype=torch.float64)[:n_components]
    loc = start.view(1, -1, 1).clone().requires_grad_()
    log_scale = torch.full_like(loc, math.log(0.5)).requires_grad_()
    optimiser = torch.optim.Adam([loc, log_scale], lr=0.05)
    for _ in range(400):
        q = MixturePosterior(loc, log_scale.exp())
        draws = q.rsample_stratified(16, generator=generator)
        loss = -miselbo(folded_log_joint(draws) - mixture_log_prob(q.cross_log_prob(draws))).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return MixturePosterior(loc.detach(), log_scale.detach().exp())


def test_two_components_beat_one_on_two_modes(generator):
    bounds = []
    for n_components in (1, 2):
        q = fitted(n_components, generator)
        draws = q.rsample_stratified(50_000, generator=generator)
        bounds.append(
            miselbo(folded_log_joint(draws) - mixture_log_prob(q.cross_log_prob(draws))).item()
        )
    one, two = bounds
    evidence = folded_log_evidence()
    assert one < two < evidence + 1e-3
    assert two == pytest.approx(evidence, abs=0.03)
    assert two - one == pytest.approx(LOG_TWO, abs=0.03)


def test_only_siwae_reaches_the_evidence_when_components_specialize(generator):
    # Three components on one mode, one on the other: their mean weights are 2/3 p(x) and 2 p(x).
    side = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64).view(1, 4, 1)
    scale = torch.full_like(side, FOLDED_PRECISION**-0.5)
    q = MixturePosterior(FOLDED_MODE * side, scale)
    draws = q.rsample_stratified(5000, generator=generator)
    log_weights = folded_log_joint(draws) - mixture_log_prob(q.cross_log_prob(draws))
    evidence = folded_log_evidence()
    paper = importance_weighted_miselbo(log_weights).item()
    # The two halves meet 7.8 standard deviations from either mode.
    assert paper - evidence == pytest.approx((3 * math.log(2 / 3) + LOG_TWO) / 4, abs=1e-8)
    assert siwae(log_weights).item() == pytest.approx(evidence, abs=1e-8)


# 7 and 8: torch's mixture, and a double loop


@pytest.mark.parametrize("n_components", [1, 2, 5])
def test_mixture_density_is_torch_mixture_density(make_posterior, generator, n_components):
    q = make_posterior(3, n_components, 2)
    reference = MixtureSameFamily(
        Categorical(logits=torch.zeros(3, n_components).double()),
        Independent(Normal(q.component_loc, q.component_scale), 1),
    )
    draws = q.rsample_stratified(4, generator=generator)
    by_cross = mixture_log_prob(q.cross_log_prob(draws))
    parameters = (q.component_loc, q.component_scale)
    for s in range(n_components):
        expected = reference.log_prob(draws[:, :, s])
        for actual in (q.log_prob(draws[:, :, s]), by_cross[:, :, s]):
            assert_close(actual, expected)
            assert_close(
                gradients(actual.sum(), *parameters), gradients(expected.sum(), *parameters)
            )


@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize("objective", ["miselbo", "siwae"])
def test_objective_is_a_double_loop_over_components(
    make_posterior, generator, objective, n_samples
):
    q = make_posterior(2, 3, 2)
    draws = q.rsample_stratified(n_samples, generator=generator)
    log_weights = log_weights_of(q, draws)
    actual = {"miselbo": miselbo, "siwae": siwae}[objective](log_weights)
    rows = []
    for b in range(2):
        terms = []
        for i in range(n_samples):
            for s in range(3):
                density = 0.0
                for a in range(3):
                    normal = Normal(q.component_loc[b, a], q.component_scale[b, a])
                    density = density + normal.log_prob(draws[i, b, s]).sum().exp() / 3
                terms.append(log_joint(draws[i, b, s]) - density.log())
        terms = torch.stack(terms)
        rows.append(terms.mean() if objective == "miselbo" else terms.exp().mean().log())
    expected = torch.stack(rows)
    assert_close(actual, expected)
    parameters = (q.component_loc, q.component_scale)
    assert_close(gradients(actual.sum(), *parameters), gradients(expected.sum(), *parameters))


# One flow for all components


def test_a_shared_flow_leaves_the_mixture(make_posterior, generator):
    q = make_posterior(3, 4, 2)
    flow = InverseAutoregressiveFlow(2, 2, hidden_features=(8,)).double()
    z0 = q.rsample_stratified(5, generator=generator)
    z, log_det = flow(z0)
    actual = mixture_log_prob(q.cross_log_prob(z0)) - log_det
    by_component = [
        TransformedDistribution(
            Independent(Normal(q.component_loc[:, a], q.component_scale[:, a]), 1),
            [flow.transform],
        )
        for a in range(4)
    ]
    expected = torch.stack(
        [
            torch.stack([component.log_prob(z[:, :, s]).exp() for component in by_component])
            .mean(0)
            .log()
            for s in range(4)
        ],
        -1,
    )
    assert_close(actual, expected)


# Two levels: components are joint


def test_two_levels_mix_joint_densities(make_posterior, generator):
    upper, lower = make_posterior(2, 3, 2), make_posterior(2, 3, 4)
    z2 = upper.rsample_stratified(2, generator=generator)
    z1 = lower.rsample_stratified(2, generator=generator)
    actual = mixture_log_prob(upper.cross_log_prob(z2) + lower.cross_log_prob(z1))
    joint = MixturePosterior(
        torch.cat((upper.component_loc, lower.component_loc), -1),
        torch.cat((upper.component_scale, lower.component_scale), -1),
    )
    for s in range(3):
        assert_close(actual[:, :, s], joint.log_prob(torch.cat((z2, z1), -1)[:, :, s]))
