import pytest
import torch

from mixscvi.mixture import effective_sample_size
from mixscvi.mixture.population import Memory, maximization_step, tail_index
from mixscvi.mixture.student_mixture import StudentMixture


@pytest.fixture
def make_proposal(normal):
    def make(n_cells=2, n_components=3, n_latent=2):
        tril = torch.eye(n_latent, dtype=torch.float64).expand(n_cells, n_components, -1, -1)
        loc = normal(n_cells, n_components, n_latent)
        return StudentMixture(normal(n_cells, n_components).softmax(-1), loc, tril, 6)

    return make


@pytest.fixture
def three_generations(make_proposal, generator, normal):
    proposals = [make_proposal() for _ in range(3)]
    draws = [q.sample((n,), generator) for q, n in zip(proposals, (30, 50, 40), strict=True)]
    log_joint = [-z.square().sum(-1) for z in draws]
    memory = Memory(proposals[0], draws[0], log_joint[0])
    for generation in zip(proposals[1:], draws[1:], log_joint[1:], strict=True):
        memory.add(*generation)
    return proposals, memory


def test_weights_are_against_all_proposals(three_generations):
    proposals, memory = three_generations
    z = torch.cat([memory.draws[:30], memory.draws[30:80], memory.draws[80:]])
    density = sum(n * q.log_prob(z).exp() for n, q in zip((30, 50, 40), proposals, strict=True))
    weights = (-z.square().sum(-1)).exp() / density
    torch.testing.assert_close(memory.flattened_weights(1.0), weights / weights.sum(0))


def test_densities_by_component_are_those_of_the_newest_proposal(three_generations):
    proposals, memory = three_generations
    expected = proposals[-1].component_log_prob(memory.draws)
    torch.testing.assert_close(memory.by_component, expected)
    memory.keep(torch.tensor([1]))
    torch.testing.assert_close(memory.by_component, expected[:, 1:])


def test_cells_that_are_kept_keep_their_weights(three_generations):
    _, memory = three_generations
    before = memory.flattened_weights(100.0), memory.newest_tail_index()
    memory.keep(torch.tensor([1]))
    torch.testing.assert_close(memory.flattened_weights(100.0), before[0][:, 1:])
    torch.testing.assert_close(memory.newest_tail_index(), before[1][1:])


def test_generations_of_the_cells_that_stay_are_weighed_as_without_the_others(
    make_proposal, three_generations, generator
):
    proposals, memory = three_generations
    rows = torch.tensor([1])
    alone = None
    for q, z in zip(proposals, memory.draws.split((30, 50, 40)), strict=True):
        generation = q.select(rows), z[:, rows], -z[:, rows].square().sum(-1)
        if alone is None:
            alone = Memory(*generation)
        else:
            alone.add(*generation)
    memory.keep(rows)
    newest = make_proposal(n_cells=1)
    draws = newest.sample((60,), generator)
    for of_cells in (memory, alone):
        of_cells.add(newest, draws, -draws.square().sum(-1))
    torch.testing.assert_close(memory.flattened_weights(100.0), alone.flattened_weights(100.0))
    torch.testing.assert_close(memory.newest_tail_index(), alone.newest_tail_index())


def test_the_relative_variance_is_of_the_newest_weights(three_generations):
    proposals, memory = three_generations
    weights = (memory.log_joint[80:] - proposals[-1].log_prob(memory.draws[80:])).exp()
    expected = weights.var(0, correction=0) / weights.mean(0).square()
    torch.testing.assert_close(memory.newest_relative_variance(), expected)


def test_the_relative_variance_of_no_weights_is_infinite(make_proposal, generator):
    q = make_proposal()
    z = q.sample((40,), generator)
    memory = Memory(q, z, q.log_prob(z))
    nowhere = torch.full((40, 2), -torch.inf, dtype=torch.float64)
    nowhere[:, 0] = 0.0
    memory.add(q, z, nowhere)
    variance = memory.newest_relative_variance()
    assert variance[0].isfinite()
    assert variance[1] == torch.inf


def test_the_effective_share_is_of_all_weights(three_generations):
    _, memory = three_generations
    weights = memory.flattened_weights(1.0)  # as they are
    torch.testing.assert_close(memory.effective_share(), 1 / weights.square().sum(0) / 120)


@pytest.mark.parametrize("spread", [0.1, 10.0, 1e9])
def test_weights_are_flattened_until_enough_draws_count(make_proposal, normal, spread):
    q = make_proposal()
    draws = normal(200, 2, 2)
    log_joint = q.log_prob(draws) + spread * normal(200, 2)
    log_joint[:50, 0] = -torch.inf
    weights = Memory(q, draws, log_joint).flattened_weights(60.0)
    ess = effective_sample_size(weights.log().mT)
    torch.testing.assert_close(weights.sum(0), torch.ones_like(ess))
    assert (weights[:50, 0] == 0).all()
    assert (ess >= 60 - 1e-6).all()
    if spread > 1:
        assert (ess < 66).all()


def test_a_few_draws_above_zero_are_flattened_to_half_their_number(make_proposal, normal):
    q = make_proposal(1)
    log_joint = torch.full((200, 1), -torch.inf, dtype=torch.float64)
    log_joint[:10] = 100 * normal(10, 1)
    weights = Memory(q, normal(200, 1, 2), log_joint).flattened_weights(60.0)
    assert effective_sample_size(weights.log().mT).item() >= 5 - 1e-6
    assert (weights[10:] == 0).all()


def test_the_start_finds_what_the_newest_proposal_left_behind(generator):
    """Two modes; the newest proposal sits on one and alone knows nothing of the other."""
    one = torch.ones(1, 1, dtype=torch.float64)

    def gaussian(loc, scale):
        return StudentMixture(one, loc * one[..., None], scale * one[..., None, None], None)

    left, right, wide = gaussian(-20.0, 1.0), gaussian(20.0, 1.0), gaussian(0.0, 15.0)

    def log_joint(z):
        return torch.logaddexp(left.log_prob(z), right.log_prob(z))

    start = wide.sample((100,), generator)
    draws = right.sample((300,), generator)
    alone = Memory(right, draws, log_joint(draws))
    memory = Memory(wide, start, log_joint(start))
    memory.add(right, draws, log_joint(draws))
    assert alone.newest_tail_index().item() < 0.5
    assert memory.newest_tail_index().item() > 0.7


def test_tail_index_of_no_weights_is_infinite(normal):
    log_weights = normal(100, 2)
    log_weights[:, 0] = -torch.inf
    k = tail_index(log_weights)
    assert k[0] == torch.inf
    assert k[1].isfinite()


def test_the_maximization_step_is_a_loop(make_proposal, normal):
    q = make_proposal()
    z = normal(90, 2, 2)
    weights = normal(90, 2).softmax(0)
    new = maximization_step(q, z, weights)
    share = q.component_log_prob(z).softmax(-1)
    prior = 3  # parameters of a covariance of two dimensions
    for b in range(2):
        alphas = []
        for k in range(3):
            w = weights[:, b] * share[:, b, k]
            alphas.append(w.sum().clamp_min(0.02))
            n = w.sum() ** 2 / w.square().sum()
            loc = (w[:, None] * z[:, b]).sum(0) / w.sum()
            scatter = torch.zeros(2, 2, dtype=torch.float64)
            for i in range(90):
                scatter += w[i] / w.sum() * (z[i, b] - loc).outer(z[i, b] - loc)
            expected = (prior * torch.eye(2, dtype=torch.float64) + n * scatter) / (prior + n)
            torch.testing.assert_close(new.loc[b, k], loc)
            tril = new.scale_tril[b, k]
            torch.testing.assert_close(tril @ tril.T, expected, rtol=1e-7, atol=1e-7)
        total = torch.stack(alphas)
        torch.testing.assert_close(new.weights[b], total / total.sum())


def test_repeated_steps_lower_the_inclusive_divergence(make_proposal, generator):
    """On a fixed sample of the target the cross-entropy falls with every step."""
    target, q = make_proposal(1), make_proposal(1)
    z = target.sample((5000,), generator)
    weights = torch.full((5000, 1), 1 / 5000, dtype=torch.float64)
    scores = []
    for _ in range(6):
        scores.append(q.log_prob(z).mean().item())
        q = StudentMixture(*_gaussian(maximization_step(_as_gaussian(q), z, weights)), None)
    assert scores[1:] == sorted(scores[1:])


def _gaussian(q):
    return q.weights, q.loc, q.scale_tril


def _as_gaussian(q):
    return StudentMixture(*_gaussian(q), None)


def test_a_component_without_draws_stays(make_proposal, normal):
    q = make_proposal(1)
    loc = q.loc.clone()
    loc[0, 2] = 1e6
    q = StudentMixture(q.weights, loc, q.scale_tril, None)
    new = maximization_step(q, normal(90, 1, 2), torch.full((90, 1), 1 / 90, dtype=torch.float64))
    torch.testing.assert_close(new.loc[0, 2], loc[0, 2])
    torch.testing.assert_close(new.scale_tril[0, 2], q.scale_tril[0, 2])
    assert new.weights[0, 2] == pytest.approx(0.02, rel=0.05)
