"""Importance draws and what is made of them, against naive densities."""

from types import SimpleNamespace

import pytest
import torch
from scvi import REGISTRY_KEYS
from torch.distributions import Normal

from mixscvi.mixture import MixturePosterior
from mixscvi.module import ImportanceSampling
from naive_module import (
    COVARIATES,
    N_BATCH,
    in_double,
    make_module,
    make_tensors,
    naive_decode,
    naive_flow,
    naive_mixture,
    naive_prior,
)

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
    stratified, library = MixturePosterior.rsample_stratified, ImportanceSampling._library_draws

    def rsample_stratified(self, n_samples=1, components=None, generator=None):
        record.z0.append(stratified(self, n_samples, components, generator))
        record.component.append(components)
        return record.z0[-1]

    def library_draws(self, *args):
        drawn = library(self, *args)
        record.library.append(drawn[0])
        return drawn

    monkeypatch.setattr(MixturePosterior, "rsample_stratified", rsample_stratified)
    monkeypatch.setattr(ImportanceSampling, "_library_draws", library_draws)
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
        encoded = module.encode(**module._get_inference_input(tensors))
    prior = naive_prior(module)
    for i, a in enumerate(component.tolist()):
        point = z0[:, i]
        z, log_det = naive_flow(module, point)
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
    torch.testing.assert_close(marginal("iw_miselbo"), log_w.exp().mean(0).log().mean(-1))
    assert (marginal("iw_miselbo") < marginal("siwae")).all()
    torch.manual_seed(3)
    mean = module.marginal_ll(tensors, 60, return_mean=True)
    assert mean == pytest.approx(marginal("siwae").mean().item())
