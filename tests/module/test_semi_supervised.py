"""Labels below z: p(z) against quadrature, the loss against loops, every combination trained."""

import math

import numpy as np
import pytest
import torch
from scvi import REGISTRY_KEYS
from scvi.module import SCANVAE
from torch.distributions import Normal, kl_divergence

from mixscvi.mixture import siwae
from mixscvi.module import FusedSCANVAE, LabelPrior, MixSCANVAE, MixtureOptions, ScviSCANVAE
from naive_module import (
    COVARIATES,
    N_GENES,
    N_LABELS,
    in_double,
    make_tensors,
    naive_decode,
    naive_mixture,
    naive_posterior,
    spread_out,
    take,
)

SIZES = {"n_latent": 2, "n_hidden": 6, "gene_likelihood": "nb"}
COMBINATIONS = {
    "all-to-all": {},
    "some-to-all, amortized": {"estimator": "some_to_all", "component_encoder": "amortized"},
    "some-to-some, 2 of 3": {"estimator": "some_to_some", "n_sampled_components": 2},
    "flow": {"n_flow_steps": 1},
    "2 samples": {"n_samples": 2},
    "one component, flow": {"n_components": 1, "n_flow_steps": 1},
    "reference": {"likelihood": "reference"},
}


def make_module(cls=MixSCANVAE, *, seed=0, mixture=None, **kwargs):
    torch.manual_seed(seed)
    options = {}
    if cls is MixSCANVAE:
        options["mixture"] = MixtureOptions(**{"n_components": 3, **(mixture or {})})
    module = cls(N_GENES, **{**SIZES, **COVARIATES, **options, **kwargs})
    if options and module.flow is not None:
        spread_out(module.flow)
    return module


def labeled(tensors):
    return {"labelled_tensors": take(tensors, slice(0, 5)), "classification_ratio": 50}


@pytest.fixture(params=COMBINATIONS.values(), ids=COMBINATIONS)
def combination(request):
    return {"mixture": request.param}


def below_by_quadrature(module, z):
    """log p(z) of `(N, 1)` by the rectangle rule over u."""
    step = 0.02
    u = torch.arange(-9.0, 9.0, step, dtype=torch.float64)[:, None]
    total = 0.0
    for label in range(N_LABELS):
        one_hot = torch.eye(N_LABELS, dtype=torch.float64)[[label]].expand(len(u), -1)
        mean, variance = module.decoder_z1_z2(u, one_hot)
        joint = Normal(mean, variance.sqrt()).log_prob(z.T) + Normal(0.0, 1.0).log_prob(u)
        total = total + module.y_prior[0, label] * joint.exp().sum(0) * step
    return total.log()


@torch.no_grad()
def test_prior_against_quadrature():
    module = in_double(make_module(n_latent=1, y_prior=torch.tensor([[0.2, 0.5, 0.3]])))
    for parameter in (*module.encoder_z2_z1.parameters(), *module.decoder_z1_z2.parameters()):
        parameter.mul_(1.5)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = below_by_quadrature(module, z)
    assert exact.std() > 0.1
    torch.manual_seed(1)
    got = LabelPrior(module, n_draws=20_000).log_prob(z)
    torch.testing.assert_close(got, exact, rtol=0, atol=0.05)
    # A few draws are unbiased as a density, so on average too low as its logarithm.
    few = torch.stack([LabelPrior(module, n_draws=1).log_prob(z) for _ in range(4000)])
    torch.testing.assert_close(few.exp().mean(0).log(), exact, rtol=0, atol=0.1)
    assert (few.mean(0) < exact).all()

    draws = LabelPrior(module).sample((40_000,))
    assert draws.shape == (40_000, 1)
    grid = torch.arange(-12.0, 12.0, 0.05, dtype=torch.float64)[:, None]
    density = below_by_quadrature(module, grid).exp()
    assert density.sum() * 0.05 == pytest.approx(1, abs=2e-3)
    below = (density * (grid[:, 0] < 0.1)).sum() * 0.05
    assert (draws < 0.1).double().mean() == pytest.approx(below.item(), abs=0.02)


def test_prior_takes_any_shape_and_gradients():
    module = in_double(make_module())
    z = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    log_prob = module.prior_distribution().log_prob(z)
    assert log_prob.shape == (4, 3)
    log_prob.sum().backward()
    assert z.grad.abs().min() > 0


def naive_loss(module, tensors, z, log_q, below, kl_weight):
    """The loss, one draw and label at a time."""
    losses = []
    for cell in range(z.shape[1]):
        row = take(tensors, slice(cell, cell + 1))
        library = row[REGISTRY_KEYS.X_KEY].sum(1, keepdim=True).log()
        log_weights = []
        for sample in range(z.shape[0]):
            for component in range(z.shape[2]):
                draw = z[sample, cell, component][None]
                value = naive_decode(module, row, draw, library).sum()
                value = value - log_q[sample, cell, component]
                probabilities = module.classifier(draw).softmax(-1)[0]
                for label in range(N_LABELS):
                    log_pz, log_ratio, kl_u = (
                        part.view(*z.shape[:-1], N_LABELS)[sample, cell, component, label]
                        for part in below
                    )
                    p = probabilities[label]
                    kl = kl_u if module.mixture.n_samples == 1 else -log_ratio
                    value = value + p * log_pz
                    value = value - kl_weight * p * (kl + p.log() + math.log(N_LABELS))
                log_weights.append(value)
        log_weights = torch.stack(log_weights).view(z.shape[0], z.shape[2])
        losses.append((log_weights.logsumexp(0) - math.log(len(log_weights))).mean())
    return -torch.stack(losses).mean()


@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_loss_against_loops(combination, kl_weight, monkeypatch):
    module = in_double(make_module(**combination))
    tensors = make_tensors(module)
    seen = []
    original = LabelPrior.below

    def spied(prior, z):
        seen.append(original(prior, z))
        return seen[-1]

    monkeypatch.setattr(LabelPrior, "below", spied)
    inference, _, losses = module(tensors, loss_kwargs={"kl_weight": kl_weight})
    z = inference["untransformed_z"]
    loc, scale = naive_posterior(module, tensors)
    if module.flow is None:
        log_q = naive_mixture(loc[:, None], scale[:, None]).log_prob(z)
        if module.mixture.estimator != "some_to_some":
            torch.testing.assert_close(inference["log_qz"], log_q)
    (below,) = seen
    expected = naive_loss(module, tensors, z, inference["log_qz"], below, kl_weight)
    torch.testing.assert_close(losses.loss, expected)
    bound = losses.reconstruction_loss["reconstruction_loss"] + sum(losses.kl_local.values())
    if kl_weight == 1.0:
        torch.testing.assert_close(bound.mean(), expected)


def test_below_is_what_scanvi_computes():
    """Each label's terms, from scvi-tools' networks one label at a time."""
    module = in_double(make_module())
    with torch.no_grad():
        module.encoder_z2_z1.var_encoder.weight.zero_()
        module.encoder_z2_z1.var_encoder.bias.fill_(-40)  # as good as no noise: sd 0.01
    z = torch.randn(5, 2, dtype=torch.float64)
    below = LabelPrior(module).below(z)
    for label in range(N_LABELS):
        one_hot = torch.eye(N_LABELS, dtype=torch.float64)[[label]].expand(5, -1)
        qu, _ = module.encoder_z2_z1(z, one_hot)
        mean, variance = module.decoder_z1_z2(qu.loc, one_hot)
        log_pz = Normal(mean, variance.sqrt()).log_prob(z).sum(-1)
        torch.testing.assert_close(below.log_pz[:, label], log_pz, rtol=0, atol=0.3)
        standard = Normal(torch.zeros_like(qu.loc), torch.ones_like(qu.loc))
        torch.testing.assert_close(
            below.kl_u[:, label], kl_divergence(qu, standard).sum(-1), rtol=1e-12, atol=0
        )


# A flow that was not trained would leave the proposal too far away.
@pytest.mark.parametrize("name", [name for name in COMBINATIONS if "flow" not in name])
@torch.no_grad()
def test_importance_sampling_is_above_the_bound_and_agrees_with_quadrature(name):
    module = in_double(make_module(n_latent=1, mixture=COMBINATIONS[name]))
    tensors = make_tensors(module)
    log_px = torch.stack(
        [siwae(module.importance_draws(tensors, 4000).log_weights) for _ in range(2)]
    )
    torch.testing.assert_close(*log_px, rtol=0, atol=0.1)
    step = 0.02
    grid = torch.arange(-9.0, 9.0, step, dtype=torch.float64)[:, None]
    log_pz = below_by_quadrature(module, grid)
    for cell in range(7):
        rows = {name: values[cell].expand(len(grid), -1) for name, values in tensors.items()}
        library = rows[REGISTRY_KEYS.X_KEY].sum(1, keepdim=True).log()
        exact = (log_pz + naive_decode(module, rows, grid, library)).logsumexp(0) + math.log(step)
        torch.testing.assert_close(log_px[:, cell].mean(), exact, rtol=0, atol=0.1)
    bounds = torch.stack([-module(tensors)[2].loss for _ in range(200)])
    assert bounds.mean() < log_px.mean() + 3 * bounds.std() / math.sqrt(200)


def test_adaptation_agrees_with_importance_sampling():
    module = in_double(make_module(n_latent=1))
    tensors = make_tensors(module)
    torch.manual_seed(0)
    adapted = module.adapt(tensors, n_final=4000)
    reference = siwae(module.importance_draws(tensors, 8000).log_weights)
    torch.testing.assert_close(adapted.log_likelihood, reference, rtol=0, atol=0.1)


def steps(module, tensors, n_steps, *, seed=1):
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses, reached = [], set()
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss = module(tensors, loss_kwargs=labeled(tensors))[2].loss
        loss.backward()
        reached |= {
            name
            for name, parameter in module.named_parameters()
            if parameter.grad is not None and parameter.grad.abs().max() > 0
        }
        optimizer.step()
        losses.append(loss.item())
    return losses, reached


def test_training(combination):
    module = make_module(**combination).train()
    tensors = make_tensors(module, 8)
    losses, reached = steps(module, tensors, 12)
    assert np.isfinite(losses).all()
    unused = ("l_encoder", "decoder.px_r_decoder", "decoder.px_dropout_decoder", "y_prior")
    learned = {name for name, _ in module.named_parameters() if not name.startswith(unused)}
    assert learned - reached == set()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    again = make_module(**combination).train()
    assert steps(again, tensors, 12)[0] == losses


def test_classification_is_of_every_component():
    module = in_double(make_module())
    tensors = make_tensors(module)
    loss, labels, logits = module.classification_loss(tensors)
    loc, _ = naive_posterior(module, tensors)
    losses, probabilities = [], []
    for component in range(3):
        scores = module.classifier(loc[:, component])
        losses.append(torch.nn.functional.cross_entropy(scores, labels.view(-1)))
        probabilities.append(scores.softmax(-1))
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    mean = torch.stack(probabilities).mean(0)
    torch.testing.assert_close(logits.exp(), mean)
    classified = module.classify(**module._get_inference_input(tensors))
    torch.testing.assert_close(classified.softmax(-1), mean)
    # Jensen: the average of cross-entropies is above that of the average.
    assert loss >= torch.nn.functional.nll_loss(mean.log(), labels.view(-1))


def test_classification_of_draws():
    module = in_double(make_module())
    tensors = make_tensors(module)
    inputs = module._get_inference_input(tensors)
    torch.manual_seed(0)
    draws = torch.stack(
        [module.classify(**inputs, use_posterior_mean=False).softmax(-1) for _ in range(3000)]
    )
    assert draws.std(0).min() > 0
    posterior = module.encode(**inputs).posterior
    expected = module.log_labels(posterior.rsample_stratified(3000)).exp().mean((0, 2))
    torch.testing.assert_close(draws.mean(0), expected, rtol=0, atol=0.02)


def test_classifier_of_probabilities():
    module = in_double(make_module(classifier_parameters={"logits": False}))
    tensors = make_tensors(module)
    classified = module.classify(**module._get_inference_input(tensors))
    torch.testing.assert_close(classified.sum(-1), torch.ones(7, dtype=torch.float64))
    assert torch.isfinite(module(tensors, loss_kwargs=labeled(tensors))[2].loss)


@pytest.mark.parametrize("cls", [ScviSCANVAE, FusedSCANVAE])
def test_one_component_is_scvi_tools_module(cls):
    ours, theirs = make_module(cls), make_module(SCANVAE)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    tensors = make_tensors(ours)
    losses = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        losses.append(module.train()(tensors, loss_kwargs=labeled(tensors))[2].loss)
        losses[-1].backward()
    if cls is ScviSCANVAE:
        assert torch.equal(*losses)
    torch.testing.assert_close(*losses)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


@torch.no_grad()
def test_one_component_of_ours_has_scanvi_s_loss():
    """The mixture's loss with one component against scvi-tools', in expectation."""
    theirs = in_double(make_module(ScviSCANVAE, dropout_rate=0.0))
    ours = in_double(make_module(mixture={"n_components": 1}, dropout_rate=0.0))
    shared = {n: v for n, v in theirs.state_dict().items() if not n.startswith("z_encoder")}
    ours.load_state_dict(shared, strict=False)
    tensors = make_tensors(ours)
    ours._encode_components = theirs._encode_components
    values = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        losses = [
            module(tensors, loss_kwargs={"kl_weight": 0.4} | labeled(tensors))[2].loss
            for _ in range(3000)
        ]
        values.append(torch.stack(losses))
    error = math.sqrt(sum(value.var().item() for value in values) / 3000)
    assert abs(values[0].mean() - values[1].mean()).item() < 4 * error
    assert error < 0.1


@pytest.mark.parametrize("cls", [MixSCANVAE, ScviSCANVAE, FusedSCANVAE])
def test_cells_without_labels_have_no_cross_entropy(cls):
    """A data module's minibatches come with all cells for labeled."""
    module = in_double(make_module(cls))
    tensors = make_tensors(module)
    tensors["labels"][2:5] = N_LABELS
    known = torch.tensor([0, 1, 5, 6])
    losses = module(tensors, loss_kwargs={"labelled_tensors": tensors, "classification_ratio": 3})
    expected, labels, _ = module.classification_loss(take(tensors, known))
    torch.testing.assert_close(losses[2].classification_loss, expected)
    assert torch.equal(losses[2].true_labels, labels)
    tensors["labels"][:] = N_LABELS
    losses = module(tensors, loss_kwargs={"labelled_tensors": tensors, "classification_ratio": 3})
    assert losses[2].classification_loss is None
