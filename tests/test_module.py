"""The module against naive computations, one component, one draw and one cell at a time."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scvi import REGISTRY_KEYS
from scvi.distributions._utils import DistributionConcatenator, subset_distribution
from scvi.module import VAE
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from mixscvi.mixture import MixturePosterior
from mixscvi.module import FactorizedMixture, MixVAE, PseudoCells

N_GENES, N_BATCH, N_LABELS, N_CATS, N_CONT = 9, 2, 3, [3, 4], 2
COVARIATES = {
    "n_batch": N_BATCH,
    "n_labels": N_LABELS,
    "n_continuous_cov": N_CONT,
    "n_cats_per_cov": N_CATS,
    "encode_covariates": True,
}


def make_tensors(module, n_cells=7, *, seed=0):
    """A minibatch with what the module was made for and nothing else."""
    dtype = next(module.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    rate = 4 * torch.rand(n_cells, N_GENES, generator=generator)
    x = torch.poisson(rate, generator=generator)
    x[:, 0] += 1

    def category(n):
        return torch.randint(max(n, 1), (n_cells, 1), generator=generator)

    tensors = {
        REGISTRY_KEYS.X_KEY: x.to(dtype),
        REGISTRY_KEYS.BATCH_KEY: category(module.n_batch),
        REGISTRY_KEYS.LABELS_KEY: category(module.n_labels),
    }
    if module.encode_covariates:
        continuous = torch.randn(n_cells, N_CONT, generator=generator)
        tensors[REGISTRY_KEYS.CONT_COVS_KEY] = continuous.to(dtype)
        tensors[REGISTRY_KEYS.CAT_COVS_KEY] = torch.cat([category(n) for n in N_CATS], dim=1)
    if module.use_size_factor_key:
        factor = 1 + torch.rand(n_cells, 1, generator=generator)
        tensors[REGISTRY_KEYS.SIZE_FACTOR_KEY] = factor.to(dtype)
    return tensors


def make_module(*, seed=0, **kwargs):
    torch.manual_seed(seed)
    defaults = {"n_components": 3, "n_latent": 2, "n_hidden": 6, "n_prior_components": 4}
    if not kwargs.get("use_observed_lib_size", True):
        n_batch = kwargs.get("n_batch", 1)
        defaults["library_log_means"] = np.full((1, n_batch), 2.5)
        defaults["library_log_vars"] = np.full((1, n_batch), 0.4)
    module = MixVAE(N_GENES, **{**defaults, **kwargs})
    if kwargs.get("n_flow_steps"):
        spread_out(module.flow)
    return module


def in_double(module):
    """The module in evaluation mode and double precision, for tight comparisons."""
    module = module.double().eval()
    if not module.use_observed_lib_size:
        # scvi-tools multiplies these two by a one-hot matrix that is always in single precision.
        module.library_log_means = module.library_log_means.float()
        module.library_log_vars = module.library_log_vars.float()
    return module


def spread_out(flow):
    """Move a flow well away from where it starts."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def take(tensors, cells):
    return {name: values[cells] for name, values in tensors.items()}


def standard_normal(n_latent, dtype=torch.float64):
    return Independent(Normal(torch.zeros(n_latent, dtype=dtype), 1.0), 1)


def naive_posterior(module, tensors):
    """The components' parameters, from one call of the encoder per component: `(B, A, D)`."""
    dense, categories = module._encoder_input(**module._get_inference_input(tensors))
    parts = [
        module.z_encoder(dense, *categories, components=torch.tensor([a]))
        for a in range(module.n_components)
    ]
    loc = torch.cat([part.component_loc for part in parts], dim=1)
    scale = torch.cat([part.component_scale for part in parts], dim=1)
    return loc, scale


def naive_mixture(loc, scale):
    weights = Categorical(torch.ones(loc.shape[-2], dtype=loc.dtype))
    weights = weights.expand(loc.shape[:-2])
    return MixtureSameFamily(weights, Independent(Normal(loc, scale), 1))


def naive_prior(module):
    if hasattr(module.prior, "pseudo_inputs"):
        training = module.z_encoder.training
        module.z_encoder.eval()
        dense, *categories = module.prior.pseudo_inputs()
        posterior = module.z_encoder(dense, *categories)
        module.z_encoder.train(training)
        return naive_mixture(
            posterior.component_loc.flatten(0, 1), posterior.component_scale.flatten(0, 1)
        )
    if hasattr(module.prior, "logits"):
        prior = module.prior
        components = Independent(Normal(prior.loc, prior.log_scale.exp()), 1)
        return MixtureSameFamily(Categorical(logits=prior.logits), components)
    dtype = next(module.parameters()).dtype
    return standard_normal(module.n_latent, dtype)


def naive_flow(module, z0):
    """f(z0) and log |det|, the latter from the whole Jacobian of one point after another."""
    if module.flow is None:
        return z0, torch.zeros(z0.shape[:-1], dtype=z0.dtype)
    log_dets = [
        torch.autograd.functional.jacobian(
            lambda point: module.flow(point)[0], point, create_graph=True
        )
        .det()
        .abs()
        .log()
        for point in z0
    ]
    return module.flow(z0)[0], torch.stack(log_dets)


def naive_decode(module, tensors, z, library):
    """log p(x | z) of one draw `(B, D)` per cell, by scvi-tools' decoder and likelihood."""
    inputs = module._get_generative_input(
        tensors, {"z": module.z_encoder.z_transformation(z), "library": library, "qz": None}
    )
    px = VAE.generative(module, **inputs)["px"]
    return px.log_prob(tensors[REGISTRY_KEYS.X_KEY]).sum(-1)


def naive_loss(module, tensors, noise, library, kl_weight, chosen):
    """The loss from a double loop over draws and components, with the same noise."""
    loc, scale = naive_posterior(module, tensors)
    mixture, prior = naive_mixture(loc, scale), naive_prior(module)
    rows = []
    for layer in range(noise.shape[0]):
        for s, a in enumerate(chosen):
            z0 = loc[:, a] + scale[:, a] * noise[layer, :, s]
            z, log_det = naive_flow(module, z0)
            log_q = mixture.log_prob(z0) - log_det
            log_px = naive_decode(module, tensors, z, library)
            rows.append(log_px + kl_weight * (prior.log_prob(z) - log_q))
    log_w = torch.stack(rows).unflatten(0, (noise.shape[0], len(chosen)))
    if module.objective == "siwae":
        bound = log_w.flatten(0, 1).logsumexp(0) - math.log(noise.shape[0] * len(chosen))
    else:
        per_component = log_w.logsumexp(0) - math.log(noise.shape[0])
        bound = per_component.mean(0)
    return -bound


def gradients(loss, module):
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    values = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True, retain_graph=True)
    return dict(zip([name for name, _ in named], values, strict=True))


LOSSES = {
    "plain": {},
    "amortized": {"component_encoder": "amortized"},
    "covariates": {**COVARIATES, "n_layers": 2},
    "siwae": {"objective": "siwae"},
    "3 samples": {"n_samples": 3},
    "3 samples, siwae": {"n_samples": 3, "objective": "siwae"},
    "library": {"use_observed_lib_size": False, "n_batch": N_BATCH},
    "library, siwae": {"use_observed_lib_size": False, "objective": "siwae", "n_samples": 2},
    "ln": {"latent_distribution": "ln"},
    "mog": {"prior": "mog"},
    "vamp": {"prior": "vamp", **COVARIATES},
    "flow": {"n_flow_steps": 2},
    "flow, mog, 2 samples": {"n_flow_steps": 2, "prior": "mog", "n_samples": 2},
    "vamp, flow, amortized": {
        "prior": "vamp",
        "n_flow_steps": 1,
        "component_encoder": "amortized",
    },
    "gene-cell": {"dispersion": "gene-cell", "gene_likelihood": "nb"},
    "nb": {"gene_likelihood": "nb"},
    "poisson": {"gene_likelihood": "poisson"},
    "normal": {"gene_likelihood": "normal"},
    "size factor": {"use_size_factor_key": True},
    "some_to_all": {"estimator": "some_to_all", "n_sampled_components": 2},
}


@pytest.mark.parametrize("kl_weight", [0.3, 1.0])
@pytest.mark.parametrize("kwargs", LOSSES.values(), ids=LOSSES)
def test_loss_is_the_naive_double_loop(kwargs, kl_weight, monkeypatch):
    module = in_double(make_module(**kwargs))
    tensors = make_tensors(module, 5)
    chosen = list(range(module.n_components))
    if module.n_sampled_components < module.n_components:
        chosen = [2, 0]
        monkeypatch.setattr(type(module.estimator), "choose", lambda *_: torch.tensor(chosen))
    drawn = {}
    stratified = MixturePosterior.rsample_stratified

    def remember(self, *args, **kwargs):
        drawn["z0"] = stratified(self, *args, **kwargs)
        return drawn["z0"]

    monkeypatch.setattr(MixturePosterior, "rsample_stratified", remember)
    inference, generative, losses = module(tensors, loss_kwargs={"kl_weight": kl_weight})

    loc, scale = naive_posterior(module, tensors)
    noise = ((drawn["z0"] - loc[:, chosen]) / scale[:, chosen]).detach()
    assert noise.shape == (module.n_samples, 5, len(chosen), 2)
    assert noise.std() > 0.3
    torch.testing.assert_close(inference["qz"].component_loc, loc)
    per_cell = naive_loss(module, tensors, noise, inference["library"], kl_weight, chosen)
    negative_bound = naive_loss(module, tensors, noise, inference["library"], 1.0, chosen)
    if not module.use_observed_lib_size:
        kl_library = kl_divergence(inference["ql"], generative["pl"]).sum(1)
        assert kl_library.min() > 0
        per_cell, negative_bound = per_cell + kl_library, negative_bound + kl_library

    torch.testing.assert_close(losses.loss, per_cell.mean(), rtol=1e-10, atol=1e-10)
    reported = losses.reconstruction_loss["reconstruction_loss"]
    reported = reported + sum(losses.kl_local.values())
    torch.testing.assert_close(reported, negative_bound, rtol=1e-10, atol=1e-9)

    ours, expected = gradients(losses.loss, module), gradients(per_cell.mean(), module)
    for name, gradient in ours.items():
        if gradient is None or expected[name] is None:
            other = expected[name] if gradient is None else gradient
            assert other is None or other.abs().max() == 0, name
            continue
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("dispersion", ["gene-batch", "gene-label"])
@pytest.mark.parametrize("gene_likelihood", ["zinb", "nb"])
def test_dispersion_is_that_of_the_cell(gene_likelihood, dispersion):
    module = make_module(
        dispersion=dispersion, gene_likelihood=gene_likelihood, n_batch=N_BATCH, n_labels=N_LABELS
    ).eval()
    with torch.no_grad():
        module.px_r.normal_(0, 2)
    tensors = make_tensors(module, 6)
    inference, _, losses = module(tensors)
    log_px = [
        naive_decode(module, tensors, inference["z"][0, :, a], inference["library"])
        for a in range(3)
    ]
    expected = -torch.stack(log_px).mean(0)
    got = losses.reconstruction_loss["reconstruction_loss"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_generative_decodes_many_draws_as_one_at_a_time():
    module = make_module(
        **COVARIATES,
        batch_representation="embedding",
        gene_likelihood="zinb",
        dispersion="gene-cell",
        use_size_factor_key=True,
    ).eval()
    tensors = make_tensors(module, 4)
    z, library = torch.randn(3, 4, 5, 2), torch.randn(3, 4, 5, 1)
    inputs = module._get_generative_input(tensors, {"z": z, "library": library})
    px = module.generative(**inputs)["px"]
    assert px.mu.shape == (3, 4, 5, N_GENES)
    for layer, s in itertools.product(range(3), range(5)):
        one = module._get_generative_input(
            tensors, {"z": z[layer, :, s], "library": library[layer, :, s]}
        )
        alone = VAE.generative(module, **one)["px"]
        for name in ("mu", "theta", "zi_logits", "scale"):
            got = getattr(px, name)[layer, :, s]
            torch.testing.assert_close(got, getattr(alone, name), rtol=1e-4, atol=1e-5)


# --- the distribution that scvi-tools sees


def factorized(n_cells=6, n_components=4, n_latent=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (n_cells, n_components, n_latent)
    loc = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    return FactorizedMixture(loc, scale)


def test_factorized_log_prob_sums_to_the_joint():
    q = factorized()
    z = 2 * torch.randn(5, 6, 3, dtype=torch.float64)
    reference = naive_mixture(q.component_loc, q.component_scale).log_prob(z)
    assert q.log_prob(z).shape == z.shape
    torch.testing.assert_close(q.log_prob(z).sum(-1), reference, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q.joint().log_prob(z), reference, rtol=1e-12, atol=1e-12)


def test_factorized_terms_are_conditionals():
    """Each term, as a function of its own coordinate, is a normalised density."""
    q = factorized(n_cells=1)
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    z = torch.randn(3, dtype=torch.float64)
    for d in range(3):
        points = z.repeat(len(grid), 1)
        points[:, d] = grid
        density = q.log_prob(points[:, None])[:, 0, d].exp()
        torch.testing.assert_close(torch.trapezoid(density, grid).item(), 1.0, rtol=1e-6, atol=0)


def test_factorized_log_prob_has_gradients():
    q = factorized()
    loc, scale = q.component_loc.requires_grad_(), q.component_scale.requires_grad_()
    z = torch.randn(6, 3, dtype=torch.float64)
    ours = torch.autograd.grad(q.log_prob(z).sum(), (loc, scale))
    reference = torch.autograd.grad(naive_mixture(loc, scale).log_prob(z).sum(), (loc, scale))
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-10)


def test_factorized_moments_are_those_of_the_mixture():
    q = factorized()
    reference = naive_mixture(q.component_loc, q.component_scale)
    torch.testing.assert_close(q.loc, reference.mean)
    torch.testing.assert_close(q.scale, reference.variance.sqrt())
    draws = q.sample((40_000,))
    assert draws.shape == (40_000, 6, 3)
    error = (draws.mean(0) - q.loc) / (q.scale / 200)
    assert error.abs().max() < 5
    torch.testing.assert_close(draws.std(0), q.scale, rtol=0.03, atol=0)


def test_factorized_survives_scvi_tools_subsets_and_concatenation():
    q = factorized()
    part = subset_distribution(q, torch.tensor([4, 1]), 0)
    z = torch.randn(2, 3, dtype=torch.float64)
    expected = naive_mixture(q.component_loc[[4, 1]], q.component_scale[[4, 1]]).log_prob(z)
    torch.testing.assert_close(part.log_prob(z).sum(-1), expected)
    store = DistributionConcatenator()
    store.store_distribution(subset_distribution(q, torch.arange(4), 0))
    store.store_distribution(subset_distribution(q, torch.arange(4, 6), 0))
    joined = store.get_concatenated_distributions(axis=0)
    torch.testing.assert_close(joined.component_loc, q.component_loc)
    torch.testing.assert_close(joined.component_scale, q.component_scale)


# --- importance sampling

PROPOSALS = {
    "plain": {},
    "A=1": {"n_components": 1},
    "A=1, mog": {"n_components": 1, "prior": "mog"},
    "covariates": {**COVARIATES, "dispersion": "gene-cell"},
    "library": {"use_observed_lib_size": False, "n_batch": N_BATCH},
    "A=1, library": {"n_components": 1, "use_observed_lib_size": False},
    "ln": {"latent_distribution": "ln"},
    "A=1, ln": {"n_components": 1, "latent_distribution": "ln"},
    "mog": {"prior": "mog"},
    "vamp": {"prior": "vamp"},
    "flow": {"n_flow_steps": 2},
    "nb": {"gene_likelihood": "nb"},
    "poisson": {"gene_likelihood": "poisson"},
    "normal": {"gene_likelihood": "normal"},
    "size factor": {"use_size_factor_key": True},
    "some_to_some": {"estimator": "some_to_some", "n_sampled_components": 1},
}


@pytest.fixture
def recorded(monkeypatch):
    """All stratified draws, and all draws of the library size, that are made from here on."""
    record = SimpleNamespace(z0=[], component=[], library=[])
    stratified, library = MixturePosterior.rsample_stratified, MixVAE._library_draws

    def rsample_stratified(self, n_samples=1, components=None, generator=None):
        record.z0.append(stratified(self, n_samples, components, generator))
        record.component.append(components)
        return record.z0[-1]

    def library_draws(self, *args):
        drawn = library(self, *args)
        record.library.append(drawn[0])
        return drawn

    monkeypatch.setattr(MixturePosterior, "rsample_stratified", rsample_stratified)
    monkeypatch.setattr(MixVAE, "_library_draws", library_draws)
    return record


@pytest.mark.parametrize("kwargs", PROPOSALS.values(), ids=PROPOSALS)
def test_importance_draws_are_the_naive_densities(kwargs, recorded):
    module = in_double(make_module(**kwargs))
    tensors = make_tensors(module, 4)
    n_samples, n_components = 3, module.n_components
    draws = module.importance_draws(tensors, n_samples, 4)
    assert draws.log_joint.shape == (n_samples, 4, n_components)

    z0 = torch.cat(recorded.z0, dim=2)[0].clone()  # (B, L * A, D)
    component = torch.cat(recorded.component).clone()
    assert component.bincount().tolist() == [n_samples] * n_components
    with torch.no_grad():
        posterior = module.posterior(tensors)
        loc, scale = posterior.component_loc.clone(), posterior.component_scale.clone()
        encoded = module._encode(**module._get_inference_input(tensors))
    prior = standard_normal(2) if module.is_scvi else naive_prior(module)
    for i, a in enumerate(component.tolist()):
        point = z0[:, i]
        z, log_det = (point, 0.0) if module.is_scvi else naive_flow(module, point)
        log_joint = prior.log_prob(z)
        library = encoded.library
        if not module.use_observed_lib_size:
            library = torch.cat(recorded.library, dim=2)[0, :, i].clone()
            means, variances = module._compute_local_library_params(
                tensors[REGISTRY_KEYS.BATCH_KEY]
            )
            log_pl = Normal(means, variances.sqrt()).log_prob(library)
            log_joint = log_joint + (log_pl - encoded.ql.log_prob(library)).sum(-1)
        log_joint = log_joint + naive_decode(module, tensors, z, library)
        own = Normal(loc[:, a], scale[:, a]).log_prob(point).sum(-1) - log_det
        mixture = naive_mixture(loc, scale).log_prob(point) - log_det
        layer = i // n_components
        for got, expected in zip(draws, (log_joint, own, mixture), strict=True):
            torch.testing.assert_close(got[layer, :, a], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(draws.log_weights, draws.log_joint - draws.log_mixture)


@pytest.mark.parametrize("kwargs", [{}, {"n_components": 1}, {"n_flow_steps": 2, "prior": "vamp"}])
@pytest.mark.parametrize("per_pass", [1, 4, 5, 7, 1000])
def test_importance_draws_do_not_depend_on_the_pass(kwargs, per_pass, monkeypatch):
    module = in_double(make_module(**kwargs))
    tensors = make_tensors(module, 4)
    n_draws = 5 * module.n_components
    noise = torch.randn(1, 4, n_draws, 2, dtype=torch.float64)

    def evaluate(draws_per_pass):
        position = 0

        def from_noise(self, n_samples, components):
            nonlocal position
            start, position = position, position + len(components)
            loc, scale = self.component_loc[:, components], self.component_scale[:, components]
            return loc + scale * noise[:, :, start:position]

        monkeypatch.setattr(MixturePosterior, "rsample_stratified", from_noise)
        draws = module.importance_draws(tensors, 5, draws_per_pass)
        assert position == n_draws
        return draws

    for got, expected in zip(evaluate(per_pass), evaluate(None), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("n_components", [1, 3])
def test_the_cells_are_encoded_once(n_components, monkeypatch):
    module = make_module(n_components=n_components).eval()
    calls = []
    module.z_encoder.register_forward_hook(lambda *_: calls.append(1))
    module.importance_draws(make_tensors(module, 4), 10, 2)
    assert len(calls) == 1


def test_paper_form_is_at_most_siwae_and_both_have_their_formulas():
    module = make_module().eval()
    tensors = make_tensors(module, 6)

    def marginal(form):
        torch.manual_seed(3)
        return module.marginal_ll(tensors, 60, form=form)

    torch.manual_seed(3)
    log_w = module.importance_draws(tensors, 20).log_weights
    torch.testing.assert_close(marginal("siwae"), log_w.exp().mean((0, -1)).log())
    torch.testing.assert_close(marginal("paper"), log_w.exp().mean(0).log().mean(-1))
    assert (marginal("paper") < marginal("siwae")).all()
    torch.manual_seed(3)
    mean = module.marginal_ll(tensors, 60, return_mean=True)
    assert mean == pytest.approx(marginal("siwae").mean().item())


def test_posterior_minus_prior_scores_every_point_under_every_cell():
    module = make_module(n_flow_steps=2, prior="mog").double().eval()
    tensors = make_tensors(module, 4)
    qz = module.posterior(tensors)
    qz = FactorizedMixture(qz.component_loc.clone(), qz.component_scale.clone())
    z0 = torch.randn(6, 2, dtype=torch.float64)
    z, log_det = naive_flow(module, z0)
    z, log_det = z.detach(), log_det.detach()
    got = module.posterior_minus_prior(qz, z[:, None])
    mixture = naive_mixture(qz.component_loc, qz.component_scale)
    shift = standard_normal(2).log_prob(z) - naive_prior(module).log_prob(z) - log_det
    expected = mixture.log_prob(z0[:, None].expand(6, 4, 2)) + shift[:, None]
    torch.testing.assert_close(got, expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("latent_distribution", ["normal", "ln"])
def test_latent_moments_are_those_behind_the_flow(latent_distribution):
    module = make_module(n_flow_steps=2, latent_distribution=latent_distribution).eval()
    qz = module.posterior(make_tensors(module, 3))
    mean, variance = module.latent_moments(qz, 30_000)
    draws = module._plain_draws(qz, 30_000)["z"]
    assert draws.shape == (30_000, 3, 2)
    error = (mean - draws.mean(0)) / (draws.std(0) / math.sqrt(15_000))
    assert error.abs().max() < 5
    squares = (draws - draws.mean(0)).square()
    error = (variance - squares.mean(0)) / (squares.std(0) / math.sqrt(15_000))
    assert error.abs().max() < 5
    again, _ = module.latent_moments(qz, 30_000)
    assert torch.equal(mean, again)


# --- pseudo-cells


@pytest.mark.parametrize("likelihood", ["zinb", "normal"])
def test_pseudo_cells_start_as_real_cells(likelihood):
    module = make_module(prior="vamp", gene_likelihood=likelihood, **COVARIATES)
    tensors = make_tensors(module, 4)
    if likelihood == "normal":
        tensors[REGISTRY_KEYS.X_KEY][:, 1] = -0.5
    module.initialise_pseudo_cells(tensors)
    dense, batch, *covariates = module.prior.pseudo_inputs()
    expected = torch.cat(
        [tensors[REGISTRY_KEYS.X_KEY].log1p(), tensors[REGISTRY_KEYS.CONT_COVS_KEY]], dim=1
    )
    torch.testing.assert_close(dense, expected, rtol=0, atol=0.006)
    assert torch.equal(batch.argmax(-1), tensors[REGISTRY_KEYS.BATCH_KEY][:, 0])
    for i, covariate in enumerate(covariates):
        assert torch.equal(covariate.argmax(-1), tensors[REGISTRY_KEYS.CAT_COVS_KEY][:, i])
        torch.testing.assert_close(covariate.sum(-1), torch.ones(4))
        assert covariate.amax(-1).min() > 0.8


def test_pseudo_expression_is_never_negative():
    pseudo = PseudoCells(5, 3, 4, [2], non_negative=True)
    with torch.no_grad():
        pseudo.dense.fill_(-1.0)
    dense, _ = pseudo()
    assert (dense[:, :3] >= 0).all()
    assert (dense[:, 3] == -1).all()


def test_categories_are_indices_or_weights():
    module = make_module(**COVARIATES).eval()
    tensors = make_tensors(module, 5)
    dense, categories = module._encoder_input(**module._get_inference_input(tensors))
    sizes = [N_BATCH, *N_CATS]
    weights = [
        torch.nn.functional.one_hot(c[:, 0], n).float()
        for c, n in zip(categories, sizes, strict=True)
    ]
    by_index = module.z_encoder(dense, *categories)
    by_weight = module.z_encoder(dense, *weights)
    torch.testing.assert_close(by_index.component_loc, by_weight.component_loc)
    other = module.z_encoder(dense, 1 - categories[0], *categories[1:])
    assert (by_index.component_loc != other.component_loc).any()


# --- the contract that every combination keeps

ENCODERS = ("separate", "amortized")
ESTIMATORS = ("all_to_all", "some_to_all", "some_to_some")
PRIORS = ("normal", "mog", "vamp")
FLOW_STEPS = (0, 2)
COMBINATIONS = list(itertools.product(ENCODERS, ESTIMATORS, PRIORS, FLOW_STEPS))


@pytest.fixture(params=COMBINATIONS, ids=lambda combination: "-".join(map(str, combination)))
def combination(request):
    encoder, estimator, prior, n_flow_steps = request.param
    return {
        "component_encoder": encoder,
        "estimator": estimator,
        "n_sampled_components": None if estimator == "all_to_all" else 2,
        "prior": prior,
        "n_flow_steps": n_flow_steps,
        "gene_likelihood": "nb",
        **COVARIATES,
    }


def never_trained_by_scvi(name, module):
    """Parameters that scvi-tools makes and does not use in this configuration."""
    return (
        (name.startswith("l_encoder") and module.use_observed_lib_size)
        or (name.startswith("decoder.px_r_decoder") and module.dispersion != "gene-cell")
        or (name.startswith("decoder.px_dropout_decoder") and module.gene_likelihood != "zinb")
    )


def train_steps(module, tensors, n_steps, *, seed=1):
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses, reached = [], set()
    for _ in range(n_steps):
        optimizer.zero_grad()
        _, _, losses_of_step = module(tensors)
        losses_of_step.loss.backward()
        for name, parameter in module.named_parameters():
            if parameter.grad is not None and parameter.grad.abs().max() > 0:
                reached.add(name)
        optimizer.step()
        losses.append(losses_of_step.loss.item())
    return losses, reached


def test_contract_training(combination):
    module = make_module(**combination).train()
    tensors = make_tensors(module, 8)
    if combination["prior"] == "vamp":
        module.initialise_pseudo_cells(take(tensors, slice(4)))
    losses, reached = train_steps(module, tensors, 12)
    assert np.isfinite(losses).all()
    expected = {
        name for name, _ in module.named_parameters() if not never_trained_by_scvi(name, module)
    }
    assert expected - reached == set()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])

    again = make_module(**combination).train()
    if combination["prior"] == "vamp":
        again.initialise_pseudo_cells(take(tensors, slice(4)))
    assert train_steps(again, tensors, 12)[0] == losses
    for name, value in again.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


def test_contract_every_component_is_trained(combination):
    """Each component's own parameters move, also where a step samples but two of them."""
    module = make_module(**combination).train()
    start = {name: p.detach().clone() for name, p in module.z_encoder.named_parameters()}
    train_steps(module, make_tensors(module, 8), 12)
    for name, parameter in module.z_encoder.named_parameters():
        if parameter.shape[0] == module.n_components:
            moved = (parameter - start[name]).flatten(1).abs().amax(1)
            assert (moved > 0).all(), name


def test_contract_evaluation(combination):
    """What a cell gets does not depend on the cells beside it."""
    module = make_module(**combination).train()
    tensors = make_tensors(module, 8)
    train_steps(module, tensors, 3)
    module.eval()
    together = module.posterior(tensors)
    assert together.component_loc.shape == (8, 3, 2)
    z = torch.randn(8, 2)
    library = tensors[REGISTRY_KEYS.X_KEY].sum(1, keepdim=True).log()

    def decode(cells):
        inputs = module._get_generative_input(
            take(tensors, cells), {"z": z[cells], "library": library[cells]}
        )
        return module.generative(**inputs)["px"].mu

    for i in range(8):
        cell = slice(i, i + 1)
        alone = module.posterior(take(tensors, cell))
        torch.testing.assert_close(
            alone.component_loc, together.component_loc[cell], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            alone.component_scale, together.component_scale[cell], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(decode(cell), decode(slice(None))[cell], rtol=1e-4, atol=1e-5)
    shuffled = module.posterior(take(tensors, torch.arange(7, -1, -1)))
    torch.testing.assert_close(shuffled.component_loc.flip(0), together.component_loc)


def test_contract_state_dict(combination, tmp_path):
    module = make_module(**combination).train()
    tensors = make_tensors(module, 8)
    train_steps(module, tensors, 3)
    module.eval()
    torch.save(module.state_dict(), tmp_path / "module.pt")
    other = make_module(**combination, seed=5).eval()
    assert not torch.equal(
        other.posterior(tensors).component_loc, module.posterior(tensors).component_loc
    )
    other.load_state_dict(torch.load(tmp_path / "module.pt"))
    assert torch.equal(
        other.posterior(tensors).component_loc, module.posterior(tensors).component_loc
    )

    def evaluate(any_module):
        torch.manual_seed(2)
        return any_module.marginal_ll(tensors, 30)

    assert evaluate(module).isfinite().all()
    assert torch.equal(evaluate(module), evaluate(other))


DEVICE_CASES = {
    "-".join(map(str, c)): {
        "component_encoder": c[0],
        "estimator": c[1],
        "n_sampled_components": None if c[1] == "all_to_all" else 2,
        "prior": c[2],
        "n_flow_steps": c[3],
    }
    for c in COMBINATIONS
} | {
    "zinb, library, gene-batch": {
        "gene_likelihood": "zinb",
        "use_observed_lib_size": False,
        "dispersion": "gene-batch",
    },
    "poisson, embedding": {"gene_likelihood": "poisson", "batch_representation": "embedding"},
    "normal, gene-label, siwae": {
        "gene_likelihood": "normal",
        "dispersion": "gene-label",
        "objective": "siwae",
        "n_samples": 2,
    },
    "gene-cell, ln": {"dispersion": "gene-cell", "latent_distribution": "ln"},
}


@pytest.fixture(autouse=True)
def unvalidated(monkeypatch):
    """A fake has no values for scvi-tools' distributions to check, if another test turned it on."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)


def loss_on_fakes(module, *, device="meta", left_behind=()):
    """Run the loss on fakes on another device, some parameters left on the CPU.

    "meta" is another device than the CPU to every operation, and takes gradients. On fakes of
    "cuda" a build of torch without it aborts, in batch normalisation's training and wherever
    gradients are recorded, so those run the loss alone.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def fake(value, device=device):
        empty = torch.empty(value.shape, dtype=value.dtype, device=device)
        return torch.nn.Parameter(empty) if isinstance(value, torch.nn.Parameter) else empty

    parts = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors = make_tensors(module, 6)
    shape_env = ShapeEnv(allow_dynamic_output_shape_ops=True)
    with FakeTensorMode(shape_env=shape_env):
        parts = {
            name: fake(value, "cpu" if name in left_behind else device)
            for name, value in parts.items()
        }
        tensors = {name: fake(value) for name, value in tensors.items()}
        with torch.set_grad_enabled(device == "meta"):
            _, _, losses = torch.func.functional_call(module, parts, (tensors,))
        if device == "meta":
            losses.loss.backward()
    gradients = {name: part.grad for name, part in parts.items() if part.grad is not None}
    return losses, gradients


@pytest.mark.parametrize(
    ("name", "training"),
    [(name, True) for name in DEVICE_CASES]
    + [(name, False) for name in DEVICE_CASES if "," in name or name.endswith("vamp-2")],
)
def test_loss_keeps_to_one_device(name, training):
    kwargs = DEVICE_CASES[name]
    module = make_module(**{"gene_likelihood": "nb", **COVARIATES, **kwargs}).train(training)
    losses, gradients = loss_on_fakes(module)
    assert any(name.startswith("z_encoder") for name in gradients)
    assert {gradient.device.type for gradient in gradients.values()} == {"meta"}
    assert losses.loss.device.type == "meta"
    assert losses.loss.shape == ()
    assert losses.reconstruction_loss["reconstruction_loss"].shape == (6,)
    for term in losses.kl_local.values():
        assert term.device.type == "meta"
        assert term.shape == (6,)


@pytest.mark.parametrize("name", DEVICE_CASES)
def test_loss_runs_on_cuda_fakes(name):
    kwargs = DEVICE_CASES[name]
    module = make_module(**{"gene_likelihood": "zinb", **COVARIATES, **kwargs}).eval()
    losses, _ = loss_on_fakes(module, device="cuda")
    assert losses.loss.device.type == "cuda"
    assert losses.reconstruction_loss["reconstruction_loss"].shape == (6,)
    assert {term.device.type for term in losses.kl_local.values()} == {"cuda"}


@pytest.mark.parametrize("name", ["prior.loc", "prior.log_scale", "px_r"])
def test_fakes_tell_mixed_devices(name):
    module = make_module(prior="mog", **COVARIATES)
    with pytest.raises(RuntimeError, match="device"):
        loss_on_fakes(module, left_behind=(name,))
