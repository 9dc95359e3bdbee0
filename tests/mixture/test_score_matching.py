import torch
from torch.distributions import MultivariateNormal

from mixscvi.mixture.score_matching import (
    cholesky,
    match_scores,
    squared_distance,
    weighted_moments,
)


def gaussians(normal, n_cells, n_latent):
    root = normal(n_cells, n_latent, n_latent)
    covariance = root @ root.mT / n_latent + 0.1 * torch.eye(n_latent, dtype=root.dtype)
    return normal(n_cells, n_latent), covariance


def draws_and_scores(normal, loc, covariance, target, n_draws):
    noise = normal(n_draws, *loc.shape)
    draws = loc + torch.einsum("bde,nbe->nbd", cholesky(covariance), noise)
    mean, precision = target[0], torch.linalg.inv(target[1])
    return draws, -torch.einsum("bde,nbe->nbd", precision, draws - mean)


def test_one_step_finds_a_gaussian(normal):
    target = gaussians(normal, 3, 5)
    loc, covariance = gaussians(normal, 3, 5)
    draws, scores = draws_and_scores(normal, loc + 10, 0.01 * covariance, target, 12)
    loc, covariance = match_scores(loc + 10, 0.01 * covariance, draws, scores, 1e9)
    torch.testing.assert_close(loc, target[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(covariance, target[1], rtol=1e-2, atol=1e-2)


def test_the_target_is_a_fixed_point(normal):
    target = gaussians(normal, 3, 5)
    draws, scores = draws_and_scores(normal, *target, target, 12)
    loc, covariance = match_scores(*target, draws, scores, 3.0)
    torch.testing.assert_close(loc, target[0])
    torch.testing.assert_close(covariance, target[1], rtol=1e-6, atol=1e-7)


def test_it_solves_the_quadratic_equation(normal):
    loc, covariance = gaussians(normal, 2, 4)
    draws, scores, rate = normal(6, 2, 4), normal(6, 2, 4), 2.0
    _, new = match_scores(loc, covariance, draws, scores, rate)
    for b in range(2):
        g, z = scores[:, b].mean(0), draws[:, b].mean(0)
        u = rate * scores[:, b].T.cov(correction=0) + rate / (1 + rate) * g.outer(g)
        shift = loc[b] - z
        v = covariance[b] + rate * draws[:, b].T.cov(correction=0)
        v = v + rate / (1 + rate) * shift.outer(shift)
        torch.testing.assert_close(new[b] @ u @ new[b] + new[b], v, rtol=1e-7, atol=1e-7)


def test_scores_that_are_not_finite_are_left_out(normal):
    loc, covariance = gaussians(normal, 2, 3)
    draws, scores = normal(8, 2, 3), normal(8, 2, 3)
    broken = scores.clone()
    broken[6:, 0, 1] = torch.nan
    broken[:, 1] = torch.inf
    new_loc, new_covariance = match_scores(loc, covariance, draws, broken, 2.0)
    fewer = match_scores(loc[:1], covariance[:1], draws[:6, :1], scores[:6, :1], 2.0)
    torch.testing.assert_close(new_loc[:1], fewer[0])
    torch.testing.assert_close(new_covariance[:1], fewer[1])
    torch.testing.assert_close(new_loc[1], loc[1])
    torch.testing.assert_close(new_covariance[1], covariance[1])


def test_weighted_moments_are_those_of_repeated_draws(normal):
    draws = normal(4, 1, 3)
    weights = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64).unsqueeze(-1)
    mean, covariance = weighted_moments(draws, weights)
    repeated = draws[[0, 0, 1, 2], 0]
    torch.testing.assert_close(mean[0], repeated.mean(0))
    torch.testing.assert_close(covariance[0], repeated.T.cov(correction=0))


def test_cholesky_survives_a_singular_matrix(normal):
    column = normal(2, 4, 1)
    covariance = column @ column.mT
    tril = cholesky(covariance)
    torch.testing.assert_close(tril @ tril.mT, covariance, rtol=1e-6, atol=1e-8)
    MultivariateNormal(torch.zeros(4, dtype=tril.dtype), scale_tril=tril, validate_args=True)


def test_the_squared_distance_is_in_widths_of_the_draws(normal):
    root = torch.eye(3, dtype=torch.float64) + 0.3 * normal(3, 3)
    precision = torch.linalg.inv(root @ root.mT)
    width = torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64)
    away = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    scores = -(away + width * normal(50_000, 1, 3)) @ precision
    expected = (away / width).square().sum()
    assert abs(squared_distance(scores).item() / expected.item() - 1) < 0.02
    scores[::2] = torch.inf
    assert abs(squared_distance(scores).item() / expected.item() - 1) < 0.02
    assert squared_distance(torch.full_like(scores, torch.nan)).item() == 0


def test_each_cell_has_its_rate(normal):
    loc, covariance = normal(2, 3), torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    draws, scores = normal(9, 2, 3), normal(9, 2, 3)
    both = match_scores(loc, covariance, draws, scores, torch.tensor([2.0, 50.0]))
    for cell, rate in enumerate((2.0, 50.0)):
        alone = match_scores(loc, covariance, draws, scores, rate)
        for ours, expected in zip(both, alone, strict=True):
            torch.testing.assert_close(ours[cell], expected[cell])
