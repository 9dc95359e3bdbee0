from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixscvi.mixture import distances, student_mixture
from mixscvi.mixture.student_mixture import StudentMixture

assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


@pytest.fixture
def make_mixture(normal):
    def make(n_cells, n_components, n_latent, dof, shift=0.0):
        weights = normal(n_cells, n_components).softmax(-1)
        loc = shift + normal(n_cells, n_components, n_latent)
        root = 0.4 * normal(n_cells, n_components, n_latent, n_latent)
        scale = root @ root.mT + 0.3 * torch.eye(n_latent, dtype=loc.dtype)
        return StudentMixture(weights, loc, torch.linalg.cholesky(scale), dof)

    return make


@pytest.mark.parametrize("shift", [0.0, 1e5])
def test_log_prob_is_scipys(make_mixture, normal, shift):
    q = make_mixture(2, 3, 4, 5, shift)
    z = shift + 2 * normal(6, 7, 2, 4)
    actual = q.log_prob(z)
    assert actual.shape == (6, 7, 2)
    scale = q.scale_tril @ q.scale_tril.mT
    for b in range(2):
        density = sum(
            q.weights[b, k].item()
            * scipy.stats.multivariate_t.pdf(z[:, :, b].numpy(), q.loc[b, k], scale[b, k], df=5)
            for k in range(3)
        )
        tolerance = 1e-10 if shift == 0 else 1e-8
        np.testing.assert_allclose(actual[:, :, b], np.log(density), rtol=tolerance, atol=tolerance)


def test_without_degrees_of_freedom_it_is_torchs_mixture_of_gaussians(make_mixture, normal):
    q = make_mixture(3, 2, 4, None)
    components = MultivariateNormal(q.loc, scale_tril=q.scale_tril)
    reference = MixtureSameFamily(Categorical(q.weights), components)
    z = normal(5, 3, 4)
    assert_close(q.log_prob(z), reference.log_prob(z))
    assert_close(q.mean, reference.mean)
    assert_close(q.variance, reference.variance)
    assert_close(q.component_log_prob(z).logsumexp(-1), q.log_prob(z))


@pytest.mark.parametrize("dof", [8, None])
@pytest.mark.parametrize("stratified", [True, False])
def test_draws_have_the_moments(make_mixture, generator, dof, stratified):
    q = make_mixture(2, 3, 2, dof)
    n = 200_000
    z = q.sample_stratified(n, generator) if stratified else q.sample((n,), generator)
    assert z.shape == (n, 2, 2)
    standard_error = (q.variance / n).sqrt()
    assert ((z.mean(0) - q.mean).abs() < 4.5 * standard_error).all()
    for b in range(2):
        torch.testing.assert_close(z[:, b].T.cov(), q.covariance[b], rtol=0.05, atol=0.02)


def test_draws_follow_the_density(make_mixture, generator):
    """E_q[f / q] is the integral of f, here a Gaussian's, for draws and density that agree."""
    q = make_mixture(1, 2, 2, 4)
    z = q.sample((100_000,), generator)
    ratio = (MultivariateNormal(q.mean[0], q.covariance[0]).log_prob(z) - q.log_prob(z)).exp()
    assert abs(ratio.mean().item() - 1) < 4.5 * ratio.std().item() / len(z) ** 0.5


def test_stratified_draws_share_out_the_components(generator):
    weights = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
    loc = torch.tensor([-100.0, 100.0], dtype=torch.float64).view(1, 2, 1).expand(2, 2, 1)
    q = StudentMixture(weights, loc, torch.ones(2, 2, 1, 1, dtype=torch.float64), None)
    for _ in range(5):
        n_left = (q.sample_stratified(40, generator) < 0).sum(0).squeeze(-1)
        assert ((n_left - 40 * weights[:, 0]).abs() <= 1).all()


@pytest.mark.parametrize("dof", [6, None])
def test_stratified_draws_are_even_and_unbiased(make_mixture, dof):
    """Many copies of one mixture are many repetitions of a few draws each."""
    n_copies, n_draws = 4000, 64
    q = make_mixture(1, 3, 4, dof).select(torch.zeros(n_copies, dtype=torch.long))
    even = q.sample_stratified(n_draws, torch.Generator().manual_seed(0))
    independent = q.sample((n_draws,), torch.Generator().manual_seed(0))
    assert not even[:, 0].equal(even[:, 1])
    expected = {"mean": q.mean[0], "square": q.variance[0] + q.mean[0].square()}
    for name, power in (("mean", 1), ("square", 2)):
        averages = even.pow(power).mean(0)
        spread = averages.std(0)
        error = averages.mean(0) - expected[name]
        assert (error.abs() < 4.5 * spread / n_copies**0.5).all(), name
        assert (spread < 0.9 * independent.pow(power).mean(0).std(0)).all(), name
        # Copies share the sequence and not its shift: their averages do not move together.
        halves = averages.view(2, -1, 4)
        together = ((halves[0] - halves[0].mean(0)) * (halves[1] - halves[1].mean(0))).mean(0)
        assert (together.abs() < 4.5 * spread.square() / (n_copies / 2) ** 0.5).all(), name


def test_stratified_draws_come_from_the_generator_alone(make_mixture):
    q = make_mixture(2, 3, 4, 5)
    before = torch.get_rng_state()
    draws = [q.sample_stratified(9, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.get_rng_state().equal(before)
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", ["none", "almost one"])
def test_stratified_draws_are_finite_at_the_faces_of_the_cube(make_mixture, dtype, shift):
    q = make_mixture(2, 3, 4, 5)
    q = StudentMixture(q.weights.to(dtype), q.loc.to(dtype), q.scale_tril.to(dtype), 5)
    value = {"none": 0.0, "almost one": 1 - torch.finfo(dtype).eps / 2}[shift]
    q._rand = lambda *shape, generator: torch.full(shape, value, dtype=dtype)
    assert q.sample_stratified(64).isfinite().all()


@pytest.mark.parametrize("n_draws", [0, 1, 2])
def test_few_stratified_draws(make_mixture, n_draws):
    assert make_mixture(2, 3, 4, 5).sample_stratified(n_draws).shape == (n_draws, 2, 4)


def test_samples_of_any_shape_come_from_the_generator(make_mixture):
    q = make_mixture(2, 3, 4, 5)
    draws = [q.sample((3, 5), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0].shape == (3, 5, 2, 4)
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])
    assert q.sample().shape == (2, 4)


def test_select_takes_cells(make_mixture, normal):
    q = make_mixture(4, 3, 2, 5)
    z = normal(5, 4, 2)
    cells = torch.tensor([2, 0])
    assert_close(q.select(cells).log_prob(z[:, cells]), q.log_prob(z)[:, cells])


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.n_elements = max(self.n_elements, leaf.numel())
        return out


@pytest.mark.parametrize("kernel", [True, False])
def test_memory_is_bounded_and_passes_change_nothing(kernel, make_mixture, normal, monkeypatch):
    q = make_mixture(3, 4, 8, 5)
    z = normal(500, 3, 8)
    whole = q.log_prob(z)
    gaussian = StudentMixture(q.weights, q.loc, q.scale_tril, None)
    draws = gaussian.sample_stratified(500, torch.Generator().manual_seed(0))
    monkeypatch.setattr(student_mixture, "_ELEMENTS_AT_ONCE", 1000)
    for name in ("_ELEMENTS_AT_ONCE", "_ELEMENTS_IN_CACHE"):
        monkeypatch.setattr(distances, name, 1000)
    if not kernel:
        monkeypatch.setattr(distances, "_kernels", lambda *tensors: None)
    with Largest() as largest:
        passes = q.log_prob(z)
        q.sample((500,), torch.Generator().manual_seed(0))
        again = gaussian.sample_stratified(500, torch.Generator().manual_seed(0))
    assert_close(passes, whole)
    assert_close(again, draws)
    # The draws have 12,000 elements; under all components they would have 48,000.
    assert largest.n_elements <= z.numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(2, 2)}, "weights and loc"),
        ({"loc": torch.zeros(3, 4)}, "weights and loc"),
        ({"scale_tril": torch.ones(2, 3, 4)}, "scale_tril"),
        ({"dof": 2}, "dof"),
        ({"dof": 4.5}, "dof"),
    ],
)
def test_bad_arguments_are_named(make_mixture, change, message):
    q = make_mixture(2, 3, 4, 5)
    arguments = {"weights": q.weights, "loc": q.loc, "scale_tril": q.scale_tril, "dof": 5}
    with pytest.raises(ValueError, match=message):
        StudentMixture(**(arguments | change))


def test_values_are_checked_on_request(make_mixture):
    q = make_mixture(2, 3, 4, 5)
    with pytest.raises(ValueError, match="weights"):
        StudentMixture(2 * q.weights, q.loc, q.scale_tril, 5, validate_args=True)
