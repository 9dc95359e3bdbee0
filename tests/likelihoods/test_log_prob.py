import pytest
import torch
from scvi.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

from mixscvi.likelihoods import nb_log_prob, poisson_log_prob, zinb_log_prob

L, B, S, G = 2, 5, 3, 7
THETA_SHAPES = {"gene": (G,), "gene-batch": (B, 1, G), "gene-cell": (L, B, S, G)}

REFERENCES = {
    "nb": lambda x, mu, theta, logits: NegativeBinomial(mu=mu, theta=theta).log_prob(x),
    "zinb": lambda x, mu, theta, logits: ZeroInflatedNegativeBinomial(
        mu=mu, theta=theta, zi_logits=logits
    ).log_prob(x),
    "poisson": lambda x, mu, theta, logits: Poisson(mu).log_prob(x),
}
OURS = {
    "nb": lambda x, mu, theta, logits: nb_log_prob(x, mu, theta),
    "zinb": lambda x, mu, theta, logits: zinb_log_prob(x, mu, theta, logits),
    "poisson": lambda x, mu, theta, logits: poisson_log_prob(x, mu),
}


def draw_inputs(theta_shape, *, n_draws=L, dtype=torch.float64, mean_count=3.0):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    rate = mean_count * (0.5 * randn(B, G)).exp()
    x = torch.poisson(rate, generator=generator)
    x[0] = 0
    x[1, :3] = 0
    x[2, 0] = 5000
    mu = (randn(n_draws, B, S, G) + 1).exp()
    theta = (2 * randn(*theta_shape)).exp()
    logits = 3 * randn(n_draws, B, S, G)
    return x, mu.requires_grad_(), theta.requires_grad_(), logits.requires_grad_()


@pytest.mark.parametrize("theta_shape", THETA_SHAPES.values(), ids=THETA_SHAPES)
@pytest.mark.parametrize("name", OURS)
def test_values_and_gradients_equal_scvi(name, theta_shape):
    x, *parameters = draw_inputs(theta_shape)
    ours = OURS[name](x, *parameters)
    reference = REFERENCES[name](x[:, None], *parameters).sum(-1)
    assert ours.shape == (L, B, S)
    torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-9)

    # Weights of their own for the draws, so that no gradient hides in a sum.
    weight = torch.linspace(-1, 2, ours.numel(), dtype=ours.dtype).view_as(ours)
    used = {"nb": parameters[:2], "zinb": parameters, "poisson": parameters[:1]}[name]
    ours_grad = torch.autograd.grad((ours * weight).sum(), used)
    reference_grad = torch.autograd.grad((reference * weight).sum(), used)
    for got, expected in zip(ours_grad, reference_grad, strict=True):
        assert got.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", OURS)
def test_cells_without_counts(name):
    _, *parameters = draw_inputs((G,))
    zeros = torch.zeros(B, G, dtype=torch.float64)
    reference = REFERENCES[name](zeros[:, None], *parameters).sum(-1)
    torch.testing.assert_close(OURS[name](zeros, *parameters), reference, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("name", OURS)
def test_extreme_parameters_stay_finite(name):
    x, mu, theta, logits = draw_inputs((G,), dtype=torch.float32)
    mu = torch.full_like(mu, 1e-12).requires_grad_()
    theta = torch.full_like(theta, 1e4).requires_grad_()
    logits = torch.tensor([-80.0, 80.0]).repeat(L * B * S * G // 2).view_as(logits)
    value = OURS[name](x, mu, theta, logits.requires_grad_())
    assert value.isfinite().all()
    (gradient,) = torch.autograd.grad(value.sum(), mu)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("theta_shape", THETA_SHAPES.values(), ids=THETA_SHAPES)
@pytest.mark.parametrize("name", OURS)
def test_single_precision_is_close_to_double(name, theta_shape):
    single = draw_inputs(theta_shape, dtype=torch.float32)
    double = [value.double() for value in single]
    ours = OURS[name](*single).double()
    # lgamma(5000) is 38000, of which single precision keeps 0.004.
    torch.testing.assert_close(ours, OURS[name](*double), rtol=2e-5, atol=2e-2)


@pytest.mark.parametrize("name", OURS)
def test_each_draw_is_on_its_own(name):
    x, *parameters = draw_inputs((G,))
    together = OURS[name](x, *parameters)
    mu, theta, logits = parameters
    for draw in range(L):
        for s in range(S):
            cut = (slice(draw, draw + 1), slice(None), slice(s, s + 1))
            alone = OURS[name](x, mu[cut], theta, logits[cut])
            torch.testing.assert_close(alone, together[cut])


@pytest.mark.parametrize("name", OURS)
def test_probabilities_of_all_counts_sum_to_one(name):
    counts = torch.arange(4000, dtype=torch.float64)[:, None]
    shape = (1, len(counts), 1, 1)
    mu, logits = torch.full(shape, 3.0).double(), torch.full(shape, -0.7).double()
    theta = torch.tensor([1.3], dtype=torch.float64)
    total = OURS[name](counts, mu, theta, logits).exp().sum()
    torch.testing.assert_close(total.item(), 1.0, rtol=1e-6, atol=0)
