"""The loss against a naive double loop over draws and components."""

import pytest
import torch
from torch.distributions import kl_divergence

from mixscvi.mixture import MixturePosterior
from naive_module import (
    COVARIATES,
    N_BATCH,
    N_LABELS,
    gradients,
    in_double,
    make_module,
    make_tensors,
    naive_decode,
    naive_loss,
    naive_posterior,
)

LOSSES = {
    "plain": {},
    "amortized": {"component_encoder": "amortized"},
    "covariates": {**COVARIATES, "n_layers": 2},
    "3 samples": {"n_samples": 3},
    "one component, siwae": {"n_components": 1, "n_samples": 3, "objective": "siwae"},
    "library": {"use_observed_lib_size": False, "n_batch": N_BATCH},
    "library, 2 samples": {"use_observed_lib_size": False, "n_samples": 2},
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
    if module.mixture.n_sampled_components < module.n_components:
        chosen = [2, 0]
        monkeypatch.setattr(
            type(module.mixture.estimator), "choose", lambda *_: torch.tensor(chosen)
        )
    drawn = {}
    stratified = MixturePosterior.rsample_stratified

    def remember(self, *args, **kwargs):
        drawn["z0"] = stratified(self, *args, **kwargs)
        return drawn["z0"]

    monkeypatch.setattr(MixturePosterior, "rsample_stratified", remember)
    inference, generative, losses = module(tensors, loss_kwargs={"kl_weight": kl_weight})

    loc, scale = naive_posterior(module, tensors)
    noise = ((drawn["z0"] - loc[:, chosen]) / scale[:, chosen]).detach()
    assert noise.shape == (module.mixture.n_samples, 5, len(chosen), 2)
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
