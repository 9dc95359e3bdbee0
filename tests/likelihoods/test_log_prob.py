import itertools
import warnings

import pytest
import torch
from scvi.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

from mixscvi.likelihoods import eager, nb_log_prob, poisson_log_prob, zinb_log_prob
from mixscvi.mixture.mostly_zero import MostlyZero, SparseRows

L, B, S, G = 2, 5, 3, 7
THETA_SHAPES = {"gene": (G,), "gene-batch": (B, 1, G), "gene-cell": (L, B, S, G)}

REFERENCES = {
    "nb": lambda x, mu, theta, logits: NegativeBinomial(mu=mu, theta=theta).log_prob(x),
    "zinb": lambda x, mu, theta, logits: ZeroInflatedNegativeBinomial(
        mu=mu, theta=theta, zi_logits=logits
    ).log_prob(x),
    "poisson": lambda x, mu, theta, logits: Poisson(mu, validate_args=False).log_prob(x),
}
OURS = {
    "nb": lambda x, mu, theta, logits: nb_log_prob(x, mu, theta),
    "zinb": lambda x, mu, theta, logits: zinb_log_prob(x, mu, theta, logits),
    "poisson": lambda x, mu, theta, logits: poisson_log_prob(x, mu),
}
EAGER = {
    "nb": lambda x, mu, theta, logits: eager.log_prob(x, mu, theta, None),
    "zinb": eager.log_prob,
    "poisson": lambda x, mu, theta, logits: eager.log_prob(x, mu, None, None),
}
PATHS = {"kernel": OURS, "eager": EAGER}


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


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("theta_shape", THETA_SHAPES.values(), ids=THETA_SHAPES)
@pytest.mark.parametrize("name", OURS)
def test_values_and_gradients_equal_scvi(name, theta_shape, path):
    x, *parameters = draw_inputs(theta_shape)
    ours = PATHS[path][name](x, *parameters)
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


def adversarial_inputs(dtype):
    """Every combination of extreme values, each as a cell with one gene."""
    grid = itertools.product(
        (0.0, 0.3, 1.0, 7.0, 15.0, 16.0, 200.5, 1e6),  # counts
        (1e-12, 1e-4, 1.0, 300.0, 1e6),  # means
        (1e-4, 0.3, 7.9, 8.1, 1e3, 1e6),  # inverse dispersions
        (-50.0, -1.0, 0.0, 3.0, 50.0),  # logits of dropping out
    )
    x, mu, theta, logits = torch.tensor(list(grid), dtype=dtype).t()[..., None]
    return x, *(value[None, :, None].requires_grad_() for value in (mu, theta, logits))


def sizes_of_terms(x, mu, theta, logits):
    """What is added up for a value and its gradients: rounding is relative to these."""
    total, poisson = theta + mu, x * mu.log().abs() + mu
    logs = mu.log().abs() + theta.log().abs() + total.log().abs()
    ratio = torch.log1p(mu / theta)
    slope = torch.digamma(x + theta) - torch.digamma(theta)
    value = 1 + theta * ratio + x * (1 + logs) + logits.abs() + torch.lgamma(x + 1) + poisson
    by_mu = 1 + x / mu + (x + theta) / total
    by_theta = slope.abs() + ratio + (x + mu) / total + 1e-6  # the reference rounds, too
    return [value, by_mu, by_theta, 1 + logits.abs()]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_extreme_values_and_gradients_equal_scvi(name, dtype, path, monkeypatch):
    # Beyond 20 torch's softplus is the identity, which is wrong in the ninth digit.
    monkeypatch.setattr(torch.nn.functional, "softplus", lambda x: x.logaddexp(x.new_zeros(())))
    # The reference has the same inputs, in double precision.
    inputs = adversarial_inputs(dtype)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    n_used = {"nb": 3, "zinb": 4, "poisson": 2}[name]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that counts are not integers
        reference = REFERENCES[name](exact[0].detach()[:, None], *exact[1:]).sum(-1)
    results = [PATHS[path][name](*inputs)]
    references = [reference]
    results += torch.autograd.grad(results[0].sum(), inputs[1:n_used])
    references += torch.autograd.grad(reference.sum(), exact[1:n_used])
    sizes = sizes_of_terms(exact[0].detach()[:, None], *exact[1:])
    if dtype == torch.float64:
        # Here the reference rounds more than the kernel: it subtracts theta * log(theta + mu) from
        # theta * log(theta), and lgamma(theta) and its derivative from those at x + theta.
        theta = exact[2].detach()
        rounding = 1 + theta * theta.log().abs()
        sizes = [sizes[0] + rounding, *(size * rounding for size in sizes[1:])]
        sizes[2] = sizes[2] + 1 / theta + theta.log().abs()
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-14}[dtype]
    if path == "eager" and dtype == torch.float32:
        tolerance, sizes[0] = 1e-5, sizes[0] + exact[2] * exact[2].log().abs()
        sizes[2] = sizes[2] + 1 / exact[2] + exact[2].log().abs()
    for got, expected, size in zip(results, references, sizes, strict=False):
        error = (got - expected).abs().squeeze() / size.squeeze()
        assert error.max() < tolerance, (error.max(), [v.flatten()[error.argmax()] for v in exact])


@pytest.mark.parametrize("theta_shape", THETA_SHAPES.values(), ids=THETA_SHAPES)
@pytest.mark.parametrize("name", OURS)
def test_gradients_pass_gradcheck(name, theta_shape):
    x, *parameters = draw_inputs(theta_shape)
    x[2, 0] = 40.5  # not 5000, which differences do not resolve
    used = {"nb": parameters[:2], "zinb": parameters, "poisson": parameters[:1]}[name]

    def function(*used):
        return OURS[name](x, *used, *parameters[len(used) :])

    assert torch.autograd.gradcheck(function, used, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("theta_shape", THETA_SHAPES.values(), ids=THETA_SHAPES)
@pytest.mark.parametrize("name", OURS)
def test_strides_do_not_matter(name, theta_shape):
    x, *parameters = (value.detach() for value in draw_inputs(theta_shape))
    plain = OURS[name](x, *parameters)

    def strided(value):
        return torch.stack((value, value), -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]

    parameters[1] = parameters[1] if theta_shape == (G,) else strided(parameters[1])
    inputs = strided(x), strided(parameters[0]), parameters[1], strided(parameters[2])
    assert not inputs[1].is_contiguous()
    assert torch.equal(OURS[name](*inputs), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_sparse_counts_give_the_same_bits(name, dtype):
    x, *parameters = draw_inputs((G,), dtype=dtype)
    cell, gene = torch.where(x > 0)
    starts = torch.cat((torch.zeros(1, dtype=torch.long), (x > 0).sum(1).cumsum(0)))
    rows = SparseRows(starts, gene, x[cell, gene])
    # An explicit zero is a zero.
    padded = SparseRows(
        torch.cat((starts[:1], starts[1:] + 1)),
        torch.cat((torch.tensor([2]), gene)),
        torch.cat((torch.zeros(1, dtype=dtype), rows.value)),
    )
    expected = OURS[name](x, *parameters)
    for counts in (MostlyZero(rows, G), MostlyZero(padded, G)):
        assert torch.equal(OURS[name](counts, *parameters), expected)
        assert counts._dense is None
        # Likewise where nothing is compiled.
        assert torch.equal(EAGER[name](counts, *parameters), EAGER[name](x, *parameters))


@pytest.mark.parametrize("name", OURS)
def test_not_a_number_comes_through(name):
    for position in range(3 if name == "zinb" else 1):
        x, *parameters = (value.detach().float() for value in draw_inputs((G,)))
        parameters[(0, 2, 1)[position]][..., -1] = torch.nan
        assert OURS[name](x, *parameters).isnan().all()


@pytest.mark.parametrize("name", OURS)
def test_gradients_may_be_asked_for_twice(name):
    x, *parameters = draw_inputs((G,))
    value = OURS[name](x, *parameters).sum()
    (first,) = torch.autograd.grad(value, parameters[:1], retain_graph=True)
    (second,) = torch.autograd.grad(2 * value, parameters[:1])
    torch.testing.assert_close(second, 2 * first)
