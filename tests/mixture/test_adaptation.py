"""Closed forms in double precision; every tolerance is a number of standard errors or nats."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from mixscvi.mixture import MixturePosterior, adaptation
from mixscvi.mixture.adaptation import adapt
from mixscvi.mixture.population import Memory

STANDARD = Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class LinearGaussian:
    """z ~ N(0, I), x = W z + noise; posterior and evidence in closed form."""

    def __init__(self, normal, n_cells, n_latent, noise=0.5):
        self.w = normal(2 * n_latent, n_latent) / n_latent**0.5
        self.x = normal(n_cells, n_latent) @ self.w.T + noise * normal(n_cells, 2 * n_latent)
        identity = torch.eye(n_latent, dtype=torch.float64)
        self.noise = noise
        self.covariance = torch.linalg.inv(identity + self.w.T @ self.w / noise**2)
        self.mean = self.x @ self.w @ self.covariance / noise**2
        of_x = self.w @ self.w.T + noise**2 * torch.eye(2 * n_latent, dtype=torch.float64)
        self.evidence = MultivariateNormal(torch.zeros_like(of_x[0]), of_x).log_prob(self.x)

    def log_joint(self, z, cells):
        log_prior = STANDARD.log_prob(z).sum(-1)
        return log_prior + Normal(z @ self.w.T, self.noise).log_prob(self.x[cells]).sum(-1)

    def start(self, n_components, width, distance):
        """Components of `width` posterior standard deviations, at least `distance` of them off."""
        scale = self.covariance.diagonal().sqrt()
        times = torch.linspace(1, 1.5, n_components, dtype=torch.float64)[:, None]
        loc = self.mean.unsqueeze(1) + distance * times * scale
        return MixturePosterior(loc, (width * scale).expand_as(loc))


@pytest.mark.parametrize("n_latent", [2, 10, 30])
@pytest.mark.parametrize("n_components", [1, 3])
def test_linear_gaussian(normal, n_latent, n_components):
    model = LinearGaussian(normal, 12, n_latent)
    start = model.start(n_components, width=0.1, distance=3.0)
    adapted = adapt(model.log_joint, start, generator=seeded())
    assert adapted.converged.all()
    error = adapted.log_likelihood - model.evidence
    assert (error.abs() < 4.5 * adapted.standard_error).all()
    assert (error.abs() < 0.15).all()
    assert (adapted.standard_error < 0.05).all()
    weights = adapted.log_weights.softmax(0)
    mean = torch.einsum("nb,nbd->bd", weights, adapted.draws)
    deviations = (mean - model.mean) / model.covariance.diagonal().sqrt()
    assert (deviations.abs() < 0.3).all()
    ours = adapted.proposal.scale_tril[:, 0].square().sum(-1)
    assert ((ours / model.covariance.diagonal()).log().abs() < 0.5).all()


def absolute_value_model(x, noise=0.3):
    def log_joint(z, cells):
        log_likelihood = Normal(z.squeeze(-1).abs(), noise).log_prob(x[cells])
        return STANDARD.log_prob(z).squeeze(-1) + log_likelihood

    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    everyone = torch.arange(len(x))
    density = log_joint(grid[:, None, None].expand(-1, len(x), 1), everyone).exp()
    return log_joint, torch.trapezoid(density, grid, dim=0).log()


@pytest.mark.parametrize(
    ("loc", "scale"),
    [([-3.0, 3.0], 0.03), ([-0.5, 0.5], 0.3), ([0.0], 1.0)],
    ids=["narrow", "off", "one wide component"],
)
def test_both_modes_of_an_absolute_value(loc, scale):
    x = torch.tensor([0.2, 1.0, 2.0, 3.0], dtype=torch.float64)
    log_joint, exact = absolute_value_model(x)
    loc = torch.tensor(loc, dtype=torch.float64).view(1, -1, 1).expand(4, -1, 1)
    start = MixturePosterior(loc, torch.full_like(loc, scale))
    adapted = adapt(log_joint, start, generator=seeded())
    assert adapted.converged.all()
    assert ((adapted.log_likelihood - exact).abs() < 0.1).all()
    right = (adapted.log_weights.softmax(0) * (adapted.draws.squeeze(-1) > 0)).sum(0)
    torch.testing.assert_close(right, torch.full_like(right, 0.5), rtol=0, atol=0.1)


def banana(bend):
    """z_1 ~ N(0, 1) and z_2 ~ N(bend z_1^2, 0.3): its integral is one."""

    def log_joint(z, cells):
        curve = bend[cells] * z[..., 0].square()
        return STANDARD.log_prob(z[..., 0]) + Normal(curve, 0.3).log_prob(z[..., 1])

    return log_joint


def far_start(n_cells, n_components=2, n_latent=2):
    side = torch.linspace(-1, 1, n_components, dtype=torch.float64)
    loc = side.view(1, -1, 1).expand(n_cells, -1, n_latent) - 2.0
    return MixturePosterior(loc, torch.full_like(loc, 0.1))


def test_banana():
    bend = torch.tensor([0.0, 0.1, 0.2, 0.6, 1.0], dtype=torch.float64)
    adapted = adapt(banana(bend), far_start(5, 4), generator=seeded(), n_draws=500)
    assert adapted.converged[:3].all()
    assert (adapted.log_likelihood.abs() < 0.15).all()
    assert (adapted.log_likelihood.abs() < 4.5 * adapted.standard_error).all()
    weights = adapted.log_weights.softmax(0)
    mean = torch.einsum("nb,nb->b", weights, adapted.draws[..., 1])  # E z_2 = bend E z_1^2
    assert ((mean - bend).abs() < 0.25 * (0.1 + bend)).all()


def test_the_estimate_is_unbiased():
    """Many copies of one cell are many repetitions; few final draws would show a bias."""
    n = 1500
    bend = torch.full((n,), 0.7, dtype=torch.float64)
    adapted = adapt(banana(bend), far_start(n), generator=seeded(), n_draws=100, n_final=25)
    ratio = adapted.log_likelihood.exp()  # the exact value is 1
    error = ratio.std().item() / math.sqrt(n)
    assert error < 0.04
    assert abs(ratio.mean().item() - 1) < 4 * error
    # So, nearly, are averages over every other draw, as none was selected.
    first = adapted.log_weights[::2].exp().mean(0)
    assert abs(first.mean().item() - 1) < 4 * first.std().item() / math.sqrt(n)


def test_standard_errors_are_the_spread():
    n = 500
    bend = torch.full((n,), 0.2, dtype=torch.float64)
    adapted = adapt(banana(bend), far_start(n), generator=seeded(), n_final=400)
    standardized = adapted.log_likelihood / adapted.standard_error
    # Below 1: the draws are more even than independent ones, whose error it is.
    assert 0.6 < standardized.std().item() < 1.1


def test_a_cell_does_not_depend_on_its_batch(normal):
    model = LinearGaussian(normal, 6, 4)
    start = model.start(2, width=0.2, distance=3.0)
    together = adapt(model.log_joint, start, generator=seeded(1))
    for b in range(3):
        own = MixturePosterior(start.component_loc[b : b + 1], start.component_scale[b : b + 1])

        def log_joint(z, cells, b=b):
            return model.log_joint(z, cells + b)

        alone = adapt(log_joint, own, generator=seeded(2 + b))
        error = alone.standard_error.hypot(together.standard_error[b : b + 1])
        difference = alone.log_likelihood - together.log_likelihood[b]
        assert difference.abs().item() < 4.5 * error.item()
        assert abs(alone.n_evaluations.item() - together.n_evaluations[b].item()) < 1500


def test_hard_cells_are_drawn_from_until_their_standard_error_is_small():
    bend = torch.tensor(4 * [0.0] + 8 * [0.7], dtype=torch.float64)
    counting = Counting(banana(bend), 12)
    few = adapt(banana(bend), far_start(12), generator=seeded(), n_final=200)
    adapted = adapt(counting, far_start(12), generator=seeded(), n_final=200, standard_error=0.045)
    assert adapted.n_evaluations.equal(counting.n_evaluations)
    assert adapted.draws.equal(few.draws)  # the draws that are returned are as many as before
    more = adapted.n_evaluations - few.n_evaluations
    assert (more >= 0).all()
    assert (more <= 7 * 200).all()
    assert (more % 50 == 0).all()
    assert more[4:].double().mean() > 100 + more[:4].max()
    enough = adapted.log_likelihood[more == 0]
    assert enough.equal(few.log_likelihood[more == 0])
    assert len(enough) >= 4
    assert few.standard_error[4:].median() > 0.07
    assert adapted.standard_error[4:].median() < 0.055
    assert (adapted.log_likelihood.abs() < 4.5 * adapted.standard_error).all()


def test_no_cell_gets_more_than_eight_times_the_draws():
    bend = torch.full((3,), 0.2, dtype=torch.float64)
    few, many = (
        adapt(banana(bend), far_start(3), generator=seeded(), n_final=100, standard_error=error)
        for error in (None, 1e-4)
    )
    assert (many.n_evaluations - few.n_evaluations == 7 * 100).all()
    ratio = few.standard_error / many.standard_error
    assert ((ratio / 8**0.5).log().abs() < 0.5).all()


def test_draws_for_the_standard_error_leave_the_estimate_unbiased():
    n = 1500
    bend = torch.full((n,), 0.7, dtype=torch.float64)
    adapted = adapt(
        banana(bend),
        far_start(n),
        generator=seeded(),
        n_draws=100,
        n_final=25,
        standard_error=0.12,
    )
    more = adapted.n_evaluations - adapted.n_evaluations.min()
    assert len(more.unique()) > 4
    ratio = adapted.log_likelihood.exp()
    assert abs(ratio.mean().item() - 1) < 4 * ratio.std().item() / math.sqrt(n)


class Counting:
    """A log-joint that keeps count of what it is asked for."""

    def __init__(self, log_joint, n_cells):
        self.log_joint = log_joint
        self.n_evaluations = torch.zeros(n_cells, dtype=torch.long)
        self.most_rows = 0

    def __call__(self, draws, cells):
        cost = 3 if draws.requires_grad else 1
        self.n_evaluations[cells] += cost * len(draws)
        self.most_rows = max(self.most_rows, draws.shape[0] * draws.shape[1])
        return self.log_joint(draws, cells)


def test_hard_cells_get_more_draws_and_easy_ones_no_more():
    bend = torch.tensor(4 * [0.0] + 8 * [1.0], dtype=torch.float64)
    counting = Counting(banana(bend), 12)
    adapted = adapt(counting, far_start(12), generator=seeded(), rows_per_call=200)
    assert adapted.n_evaluations.equal(counting.n_evaluations)
    hard = adapted.n_evaluations[4:].double().mean().item()
    assert hard > adapted.n_evaluations[:4].max().item() + 500
    assert counting.most_rows <= 200
    few = adapt(counting, far_start(12), generator=seeded(), max_generations=1)
    assert (few.n_evaluations <= adapted.n_evaluations).all()
    assert (few.n_evaluations == few.n_evaluations[0]).all()


def test_a_cell_stays_until_enough_of_its_draws_count(monkeypatch):
    bend = torch.full((6,), 0.3, dtype=torch.float64)

    def generations():
        adapted = adapt(banana(bend), far_start(6), generator=seeded(), max_generations=3)
        return adapted.n_evaluations

    as_it_is = generations()
    monkeypatch.setattr(adaptation, "_LEAST_SHARE", 1.0)
    never = generations()
    assert (never == never[0]).all()
    assert (as_it_is <= never).all()
    assert as_it_is.sum() < never.sum()
    monkeypatch.setattr(adaptation, "_FALL", 0.0)  # to nothing, after the first
    assert (generations() < never).any()
    monkeypatch.setattr(adaptation, "_LEAST_SHARE", 0.0)
    assert (generations() <= as_it_is).all()


def test_with_many_latents_fewer_draws_need_to_count(normal, monkeypatch):
    model = LinearGaussian(normal, 4, 20)
    start = model.start(1, width=0.5, distance=1.0)

    def evaluations():
        return adapt(
            model.log_joint, start, generator=seeded(), n_draws=200, max_generations=2
        ).n_evaluations

    monkeypatch.setattr(adaptation, "_LEAST_SHARE", 1.0)
    as_it_is = evaluations()
    monkeypatch.setattr(adaptation, "_LEAST_SHARE_TIMES_D", 20.0)
    assert (as_it_is == evaluations() - 250).all()


def test_the_first_generation_has_the_strictest_margin(monkeypatch):
    bend = torch.zeros(6, dtype=torch.float64)

    def evaluations():
        return adapt(banana(bend), far_start(6), generator=seeded(), n_draws=200).n_evaluations

    as_it_is = evaluations()
    monkeypatch.setattr(adaptation, "_MARGIN_AT_FIRST", math.inf)
    assert (evaluations() == as_it_is.min() + 250).all()


def test_the_draws_of_scores_count_in_the_first_proposal(monkeypatch):
    in_memory = []
    flattened = Memory.flattened_weights

    def remembering(self, least_ess):
        in_memory.append(len(self.draws))
        return flattened(self, least_ess)

    stepped, drawn_from = [], []
    step, add = adaptation.maximization_step, Memory.add

    def stepping(*arguments):
        stepped.append(step(*arguments))
        return stepped[-1]

    def adding(self, proposal, draws, log_joint):
        drawn_from.append(proposal)
        add(self, proposal, draws, log_joint)

    monkeypatch.setattr(adaptation, "maximization_step", stepping)
    monkeypatch.setattr(Memory, "add", adding)
    monkeypatch.setattr(Memory, "flattened_weights", remembering)
    start = far_start(2, n_latent=5)
    adapt(banana(torch.zeros(2)), start, generator=seeded(), n_draws=60, max_generations=1)
    # The start, five times 2 D draws with scores, and one generation.
    assert in_memory == [100, 150, 210]
    assert len(drawn_from) == 6
    assert drawn_from[-1] is stepped[0]


def test_cells_that_cannot_be_covered_are_flagged():
    """A density whose tails fall far more slowly than the proposal's."""

    def log_joint(z, cells):
        return -0.05 * torch.log1p(z.square().sum(-1)) - 1e-9 * z.square().sum(-1)

    adapted = adapt(log_joint, far_start(3), generator=seeded(), max_generations=1)
    assert not adapted.converged.any()
    assert adapted.log_likelihood.isfinite().all()


def test_zero_density_is_no_error():
    def log_joint(z, cells):
        return torch.where(z[..., 0] > 0, STANDARD.log_prob(z).sum(-1), -torch.inf)

    loc = torch.ones(5, 1, 2, dtype=torch.float64)
    adapted = adapt(log_joint, MixturePosterior(loc, loc), generator=seeded())
    assert ((adapted.log_likelihood - math.log(0.5)).abs() < 0.15).all()


def test_it_gives_what_the_generator_says_and_leaves_the_global_one_alone():
    bend = torch.tensor([0.3, 0.6], dtype=torch.float64)
    before = torch.random.get_rng_state()
    results = [adapt(banana(bend), far_start(2), generator=seeded(seed)) for seed in (0, 0, 1)]
    assert torch.random.get_rng_state().equal(before)
    assert results[0].log_weights.equal(results[1].log_weights)
    assert not results[0].log_weights.equal(results[2].log_weights)


def test_results_have_their_shapes_and_single_precision_reaches_the_model():
    seen = set()

    def log_joint(z, cells):
        seen.add(z.dtype)
        return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)

    loc = torch.zeros(3, 2, 4)
    adapted = adapt(log_joint, MixturePosterior(loc, loc + 0.5), generator=seeded(), n_final=100)
    assert seen == {torch.float32}
    assert adapted.draws.shape == (100, 3, 4)
    assert adapted.log_weights.shape == (100, 3)
    assert adapted.proposal.loc.shape == (3, 5, 4)
    for name in ("pareto_k", "log_likelihood", "standard_error", "converged", "n_evaluations"):
        assert getattr(adapted, name).shape == (3,), name
    assert (adapted.log_likelihood.abs() < 0.2).all()
    weights = adapted.log_weights + adapted.proposal.log_prob(adapted.draws)
    torch.testing.assert_close(weights, log_joint(adapted.draws, None).double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_draws": 10}, "n_draws must be at least 25, got 10"),
        ({"n_final": 10}, "n_final must be at least 25"),
        ({"max_generations": 0}, "max_generations must be at least 1"),
        ({"rows_per_call": 0}, "rows_per_call must be at least 1"),
        ({"standard_error": 0.0}, "standard_error must be above zero or None, got 0.0"),
        ({"dof": 1}, "dof must be an integer above 2"),
    ],
)
def test_bad_numbers_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        adapt(banana(torch.zeros(2, dtype=torch.float64)), far_start(2), **arguments)


@pytest.mark.parametrize(
    ("log_joint", "message"),
    [
        (lambda z, cells: z.sum(-1).sum(-1), r"must return the shape \(100, 3\)"),
        (lambda z, cells: z.sum(-1).detach(), "must be differentiable"),
        (lambda z, cells: z.sum(-1) + torch.where(cells == 1, -torch.inf, 0.0), r"at all.*\[1\]"),
        (lambda z, cells: z.sum(-1) + (cells == 2) * torch.nan, "NaN or infinity"),
        (lambda z, cells: z.sum(-1) + torch.where(cells == 2, torch.inf, 0.0), r"cells \[2\]"),
    ],
    ids=["shape", "no gradient", "zero everywhere", "nan", "infinity"],
)
def test_bad_log_joints_are_named(log_joint, message):
    with pytest.raises(ValueError, match=message):
        adapt(log_joint, far_start(3), generator=seeded())


def test_a_start_without_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"shape \(B, A, D\)"):
        adapt(banana, MixturePosterior(torch.zeros(2, 3), torch.ones(2, 3)))


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        adapt(banana(torch.zeros(2, dtype=torch.float64)), far_start(2))
