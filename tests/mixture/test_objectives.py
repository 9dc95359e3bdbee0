import math
from functools import partial
from itertools import permutations

import pytest
import scipy.stats
import torch

from mixscvi.mixture import (
    Estimator,
    importance_weighted_miselbo,
    miselbo,
    mixture_log_prob,
    siwae,
    siwae_standard_error,
)

assert_close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)


def naive_miselbo(log_weights):
    n_samples, n_rows, n_sampled = log_weights.shape
    rows = []
    for b in range(n_rows):
        total = 0.0
        for i in range(n_samples):
            for s in range(n_sampled):
                total = total + log_weights[i, b, s]
        rows.append(total / (n_samples * n_sampled))
    return torch.stack(rows)


def naive_importance_weighted_miselbo(log_weights):
    n_samples, n_rows, n_sampled = log_weights.shape
    rows = []
    for b in range(n_rows):
        total = 0.0
        for s in range(n_sampled):
            mean_weight = sum(log_weights[i, b, s].exp() for i in range(n_samples)) / n_samples
            total = total + mean_weight.log()
        rows.append(total / n_sampled)
    return torch.stack(rows)


def naive_siwae(log_weights):
    n_samples, n_rows, n_sampled = log_weights.shape
    rows = []
    for b in range(n_rows):
        total = 0.0
        for i in range(n_samples):
            for s in range(n_sampled):
                total = total + log_weights[i, b, s].exp()
        rows.append((total / (n_samples * n_sampled)).log())
    return torch.stack(rows)


def naive_standard_error(log_weights):
    n_samples, n_rows, n_sampled = log_weights.shape
    rows = []
    for b in range(n_rows):
        variance, total = 0.0, 0.0
        for s in range(n_sampled):
            weights = [log_weights[i, b, s].exp() for i in range(n_samples)]
            mean = sum(weights) / n_samples
            spread = sum((weight - mean) ** 2 for weight in weights) / (n_samples - 1)
            variance = variance + spread / n_samples / n_sampled**2
            total = total + mean / n_sampled
        rows.append(variance.sqrt() / total)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("objective", "naive"),
    [
        (miselbo, naive_miselbo),
        (importance_weighted_miselbo, naive_importance_weighted_miselbo),
        (siwae, naive_siwae),
        (siwae_standard_error, naive_standard_error),
    ],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("shape", [(3, 2, 4), (4, 3, 1), (2, 1, 5)])
def test_objective_is_a_double_loop(normal, objective, naive, shape):
    log_weights = normal(*shape).requires_grad_()
    actual, expected = objective(log_weights), naive(log_weights)
    assert actual.shape == (shape[1],)
    assert_close(actual, expected)
    weights = normal(shape[1])
    (gradient,) = torch.autograd.grad((weights * actual).sum(), log_weights)
    (naive_gradient,) = torch.autograd.grad((weights * expected).sum(), log_weights)
    assert_close(gradient, naive_gradient)
    assert torch.autograd.gradcheck(objective, log_weights)


@pytest.mark.parametrize("n_components", [1, 5])
def test_mixture_log_prob_is_a_loop(normal, n_components):
    cross = normal(2, 3, n_components).requires_grad_()
    actual = mixture_log_prob(cross)
    expected = torch.log(sum(cross[..., a].exp() for a in range(n_components)) / n_components)
    assert_close(actual, expected)
    weights = normal(2, 3)
    assert_close(
        torch.autograd.grad((weights * actual).sum(), cross),
        torch.autograd.grad((weights * expected).sum(), cross),
    )


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_bounds_are_ordered(normal, spread):
    log_weights = spread * normal(6, 50, 4)
    lowest, middle, highest = (
        objective(log_weights) for objective in (miselbo, importance_weighted_miselbo, siwae)
    )
    assert (lowest < middle).all()
    assert (middle < highest).all()


def test_bounds_coincide_where_all_weights_do(normal):
    row = normal(1, 5, 1)
    log_weights = row.expand(3, 5, 4)
    for objective in (miselbo, importance_weighted_miselbo, siwae):
        assert_close(objective(log_weights), row[0, :, 0])
    assert_close(siwae_standard_error(log_weights), torch.zeros(5).double())


def test_one_draw_makes_the_paper_form_miselbo(normal):
    log_weights = normal(1, 5, 3)
    assert_close(importance_weighted_miselbo(log_weights), miselbo(log_weights))
    assert (siwae(log_weights) > miselbo(log_weights)).all()


def test_one_component_makes_the_paper_form_siwae(normal):
    log_weights = normal(4, 5, 1)
    assert_close(importance_weighted_miselbo(log_weights), siwae(log_weights))


@pytest.mark.parametrize("shift", [-1e5, 1e5])
def test_weights_far_outside_of_the_exponential_range(normal, shift):
    log_weights = normal(4, 5, 3)
    for objective in (miselbo, importance_weighted_miselbo, siwae):
        torch.testing.assert_close(
            objective(log_weights + shift), objective(log_weights) + shift, rtol=0, atol=1e-9
        )
    torch.testing.assert_close(
        siwae_standard_error(log_weights + shift),
        siwae_standard_error(log_weights),
        rtol=1e-8,
        atol=0,
    )


def test_a_weight_of_zero_counts_as_a_draw():
    log_weights = torch.tensor([[[0.0, -math.inf]], [[0.0, 0.0]]]).double()
    assert_close(siwae(log_weights), torch.tensor([math.log(3 / 4)], dtype=torch.float64))
    cross = torch.tensor([0.0, -math.inf, -math.inf]).double()
    assert_close(mixture_log_prob(cross), torch.tensor(-math.log(3), dtype=torch.float64))


def test_standard_error_is_the_spread_of_repetitions(normal):
    n_repetitions, n_samples = 4000, 100
    level = torch.tensor([-1.5, 0.0, 1.5]).double()
    log_weights = level + 0.5 * normal(n_samples, n_repetitions, 3)
    spread = siwae(log_weights).std()
    error = siwae_standard_error(log_weights).mean()
    torch.testing.assert_close(error, spread, rtol=0.05, atol=0)
    # The strata differ: an error that pooled them would be far too large.
    pooled = log_weights.permute(0, 2, 1).reshape(-1, n_repetitions, 1)
    assert siwae_standard_error(pooled).mean() > 1.5 * spread


def test_standard_error_falls_with_the_root_of_the_draws(normal):
    log_weights = 0.3 * normal(40_000, 1, 2)
    ratio = siwae_standard_error(log_weights[:10_000]) / siwae_standard_error(log_weights)
    torch.testing.assert_close(ratio.item(), 2.0, rtol=0.05, atol=0)


def test_standard_error_of_one_draw(normal):
    with pytest.raises(ValueError, match="L=1"):
        siwae_standard_error(normal(1, 3, 4))


SOME = [Estimator.SOME_TO_ALL, Estimator.SOME_TO_SOME]


@pytest.mark.parametrize("estimator", list(Estimator))
def test_estimator_is_its_name(estimator):
    assert Estimator(str(estimator)) is estimator
    assert str(estimator) == estimator.name.lower()


@pytest.mark.parametrize("estimator", list(Estimator))
def test_choosing_all_components_needs_no_indices(estimator):
    assert estimator.choose(4, 4) is None


@pytest.mark.parametrize("estimator", SOME)
@pytest.mark.parametrize("n_sampled", [1, 3, 6])
def test_chosen_components_are_distinct(estimator, n_sampled, generator):
    for _ in range(200):
        chosen = estimator.choose(7, n_sampled, generator)
        assert chosen.shape == (n_sampled,)
        assert chosen.dtype == torch.int64
        assert len(set(chosen.tolist())) == n_sampled
        assert set(chosen.tolist()) <= set(range(7))


@pytest.mark.parametrize("estimator", SOME)
def test_choice_is_uniform(estimator, generator):
    outcomes = list(permutations(range(4), 2))
    counts = dict.fromkeys(outcomes, 0)
    for _ in range(6000):
        counts[tuple(estimator.choose(4, 2, generator).tolist())] += 1
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize("estimator", SOME)
def test_a_generator_determines_the_choice(estimator):
    def choices(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([estimator.choose(20, 5, generator) for _ in range(10)])

    before = torch.get_rng_state()
    assert torch.equal(choices(1), choices(1))
    assert not torch.equal(choices(1), choices(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("estimator", list(Estimator))
@pytest.mark.parametrize("n_sampled", [-1, 0, 5])
def test_a_number_of_components_out_of_range(estimator, n_sampled):
    with pytest.raises(ValueError, match=rf"n_sampled .* n_components=4, got {n_sampled}$"):
        estimator.choose(4, n_sampled)


def test_all_to_all_takes_no_fewer():
    with pytest.raises(ValueError, match=r"all_to_all .* n_components=4, got n_sampled=2$"):
        Estimator.ALL_TO_ALL.choose(4, 2)


@pytest.mark.parametrize("numbers", [(2.5, 1), (4, 2.5), (4, True), (4, "2")])
def test_numbers_of_components_are_integers(numbers):
    with pytest.raises(TypeError, match="must be an integer, got"):
        Estimator.SOME_TO_ALL.check(*numbers)
