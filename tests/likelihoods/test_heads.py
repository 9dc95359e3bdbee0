import numpy as np
import pytest
import torch
from scvi.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

from mixscvi.likelihoods import head_log_prob, heads, logits_log_prob
from mixscvi.mixture.mostly_zero import MostlyZero, SparseRows

L, B, S, G, H = 2, 5, 3, 600, 8  # more genes than a tile of the kernel has
THETA_SHAPES = {"gene": (G,), "gene-batch": (B, 1, G), "gene-cell": (L, B, S, G)}
LIKELIHOODS = {"zinb": (True, True), "nb": (True, False), "poisson": (False, False)}


def draw_inputs(name, theta_shape=(G,), *, dtype=torch.float64, n_cells=B):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x = torch.poisson(2 * randn(n_cells, G).exp(), generator=generator)
    x[0] = 0
    x[2, 0] = 5000
    has_theta, has_dropout = LIKELIHOODS[name]
    inputs = {
        "hidden": randn(L, n_cells, S, H),
        "scale_weight": randn(G, H),
        "scale_bias": randn(G),
        "log_library": 5 + randn(1, n_cells, 1),
    }
    if has_theta:
        inputs["theta"] = (2 * randn(*theta_shape)).exp()
    if has_dropout:
        inputs |= {"zi_weight": randn(G, H), "zi_bias": randn(G)}
    return x, {key: value.requires_grad_() for key, value in inputs.items()}


def composed(
    x, hidden, scale_weight, scale_bias, log_library, theta=None, zi_weight=None, zi_bias=None
):
    """The same from torch's layers and scvi-tools' distributions."""
    share = torch.nn.functional.linear(hidden, scale_weight, scale_bias).softmax(-1)
    mu = log_library.exp().unsqueeze(-1) * share
    if theta is None:
        px = Poisson(mu)
    elif zi_weight is None:
        px = NegativeBinomial(mu=mu, theta=theta)
    else:
        logits = torch.nn.functional.linear(hidden, zi_weight, zi_bias)
        px = ZeroInflatedNegativeBinomial(mu=mu, theta=theta, zi_logits=logits)
    return px.log_prob(x[:, None]).sum(-1)


def of_logits(
    x, hidden, scale_weight, scale_bias, log_library, theta=None, zi_weight=None, zi_bias=None
):
    zi_logits = None
    if zi_weight is not None:
        zi_logits = torch.nn.functional.linear(hidden, zi_weight, zi_bias)
    return logits_log_prob(
        x,
        torch.nn.functional.linear(hidden, scale_weight, scale_bias),
        log_library,
        theta,
        zi_logits,
        overwrite=True,
    )


def weighted_gradients(value, inputs):
    # Weights of their own for the draws, so that no gradient hides in a sum.
    weight = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
    return torch.autograd.grad((value * weight).sum(), list(inputs.values()))


CASES = [
    pytest.param(name, shape, id=f"{name}-{label}")
    for name in LIKELIHOODS
    for label, shape in THETA_SHAPES.items()
    if name != "poisson" or label == "gene"
]


@pytest.mark.parametrize("function", [head_log_prob, of_logits])
@pytest.mark.parametrize(("name", "theta_shape"), CASES)
def test_values_and_gradients_equal_scvi(name, theta_shape, function):
    x, inputs = draw_inputs(name, theta_shape)
    value, reference = function(x, **inputs), composed(x, **inputs)
    torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-9)
    gradients, expected = weighted_gradients(value, inputs), weighted_gradients(reference, inputs)
    for got, wanted in zip(gradients, expected, strict=True):
        assert got.abs().max() > 0
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8 * wanted.abs().max().item())


@pytest.mark.parametrize(("name", "theta_shape"), CASES)
def test_single_precision_is_as_close_as_that_of_scvi(name, theta_shape):
    x, inputs = draw_inputs(name, theta_shape, dtype=torch.float32)
    exact = {key: value.detach().double().requires_grad_() for key, value in inputs.items()}
    reference = composed(x.double(), **exact)
    wanted = [reference, *weighted_gradients(reference, exact)]

    def errors(function):
        value = function(x, **inputs)
        found = [value, *weighted_gradients(value, inputs)]
        pairs = zip(found, wanted, strict=True)
        return torch.stack([(got - want).norm() / want.norm() for got, want in pairs])

    assert (errors(head_log_prob) <= 2 * errors(composed) + 1e-7).all()


@pytest.mark.parametrize("equal", [True, False], ids=["equal weights", "other weights"])
@pytest.mark.parametrize(("name", "theta_shape"), CASES)
def test_gradients_hold_whether_or_not_rows_count_alike_as_said(name, theta_shape, equal):
    x, inputs = draw_inputs(name, theta_shape)

    def gradients(**options):
        value = head_log_prob(x, **inputs, **options)
        if equal:
            return torch.autograd.grad(0.3 * value.sum(), list(inputs.values()))
        return weighted_gradients(value, inputs)

    for got, wanted in zip(gradients(equal_rows=True), gradients(), strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10 * wanted.abs().max().item())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gradients_pass_gradcheck(name):
    x, inputs = draw_inputs(name)
    x[2, 0] = 40.5  # not 5000, which differences do not resolve
    x, genes = x[:, :7], {"scale_weight", "scale_bias", "theta", "zi_weight", "zi_bias"}
    inputs = {
        key: value.detach()[:7].clone().requires_grad_() if key in genes else value
        for key, value in inputs.items()
    }

    def function(*values):
        return head_log_prob(x, **dict(zip(inputs, values, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(inputs.values()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows_per_block", [1, 4, 7, 1000])
@pytest.mark.parametrize(("name", "theta_shape"), CASES)
def test_blocks_without_gradients_give_the_same(name, theta_shape, rows_per_block, monkeypatch):
    x, inputs = draw_inputs(name, theta_shape)
    with_gradients = head_log_prob(x, **inputs)
    monkeypatch.setattr(heads, "_ELEMENTS_PER_BLOCK", rows_per_block * G)
    with torch.no_grad():
        without = head_log_prob(x, **inputs)
        inputs = {key: value.detach() for key, value in inputs.items()}
    assert not without.requires_grad
    torch.testing.assert_close(without, with_gradients.detach(), rtol=1e-13, atol=1e-11)
    cell, gene = torch.where(x > 0)
    starts = torch.cat((torch.zeros(1, dtype=torch.long), (x > 0).sum(1).cumsum(0)))
    sparse = MostlyZero(SparseRows(starts, gene, x[cell, gene]), G)
    assert torch.equal(head_log_prob(sparse, **inputs), without)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_many_threads_give_the_same_bits(name):
    # Enough elements for several tasks, and more cells than need a table of log-gamma terms.
    x, inputs = draw_inputs(name, dtype=torch.float32, n_cells=40)
    usual = torch.get_num_threads()
    found = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            logits = torch.randn(L, 40, S, G, generator=torch.Generator().manual_seed(1))
            logits.requires_grad_()
            theta, zi = inputs.get("theta"), logits.flip(-1) if name == "zinb" else None
            value = logits_log_prob(x, logits, inputs["log_library"], theta, zi)
            (gradient,) = torch.autograd.grad(value.sum(), logits)
            found.append((value, gradient))
    finally:
        torch.set_num_threads(usual)
    for value, gradient in found[1:]:
        assert torch.equal(value, found[0][0])
        assert torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_overwriting_saves_memory_and_changes_nothing(name):
    x, inputs = draw_inputs(name)
    logits = torch.randn(L, B, S, G, dtype=torch.float64)
    zi_logits = torch.randn(L, B, S, G, dtype=torch.float64) if name == "zinb" else None

    def run(overwrite):
        given = [None if v is None else v.clone().requires_grad_() for v in (logits, zi_logits)]
        value = logits_log_prob(
            x, given[0], inputs["log_library"], inputs.get("theta"), given[1], overwrite=overwrite
        )
        unchanged = torch.equal(given[0], logits)
        return value, torch.autograd.grad(value.sum(), given[0])[0], unchanged

    kept, overwritten = run(False), run(True)
    assert torch.equal(kept[0], overwritten[0])
    assert torch.equal(kept[1], overwritten[1])
    assert kept[2]
    assert not overwritten[2]


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_bfloat16_autocast_is_finite(name):
    x, inputs = draw_inputs(name, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = head_log_prob(x, **inputs)
    assert value.isfinite().all()
    for gradient in weighted_gradients(value, inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("with_dropout", [False, True])
def test_bits_do_not_depend_on_where_tensors_lie_in_memory(with_dropout):
    """Sums were once taken in another order where two arrays happened to be neighbors."""
    generator = torch.Generator().manual_seed(0)
    n_cells, n_genes, n_hidden = 22, 20, 12
    x = torch.poisson(torch.full((n_cells, n_genes), 1.5), generator=generator)
    hidden = torch.randn(1, n_cells, 1, n_hidden, generator=generator).requires_grad_()
    weights = torch.randn(2, n_genes, n_hidden, generator=generator)
    biases = torch.randn(2, n_genes, generator=generator)
    theta = torch.rand(n_genes, generator=generator).requires_grad_()
    dropout = (weights[1], biases[1]) if with_dropout else ()

    def compute():
        arguments = (weights[0], biases[0], torch.tensor(3.0), theta, *dropout)
        value = head_log_prob(x, hidden, *arguments)
        return value, *torch.autograd.grad(value.sum(), (hidden, theta))

    expected = compute()
    random = np.random.default_rng(0)
    for _ in range(1500):
        holes = [np.ones(random.integers(4, 300), np.float32) for _ in range(60)]
        del holes[:: random.integers(2, 5)]
        for got, wanted in zip(compute(), expected, strict=True):
            assert torch.equal(got, wanted)
