"""Adapted posteriors of real cells against quadrature over two latent dimensions."""

import copy

import numpy as np
import pytest
import torch
from scvi import REGISTRY_KEYS
from scvi.module import VAE
from torch.distributions import Normal

from fitting import fit, seeded
from mixscvi import MixSCVI, datasets


@torch.no_grad()
def quadrature(model, cell):
    """log p(x), posterior mean and standard deviations of one cell, with scvi-tools' likelihood."""
    module = copy.deepcopy(model.module).double().eval()
    tensors = next(iter(model._make_data_loader(adata=model.adata, indices=[cell], batch_size=1)))
    counts = tensors[REGISTRY_KEYS.X_KEY].double()

    def log_joint(z):
        library = counts.sum().log().expand(len(z), 1)
        px = VAE.generative(module, z, library, torch.zeros(len(z), 1, dtype=torch.long))["px"]
        return px.log_prob(counts).sum(-1) + Normal(0.0, 1.0).log_prob(z).sum(-1)

    def grid(low, high, n=150):
        axes = [
            torch.linspace(*ends, n, dtype=torch.float64) for ends in zip(low, high, strict=True)
        ]
        area = ((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])).item()
        return torch.cartesian_prod(*axes), area

    z, _ = grid([-6.0, -6.0], [6.0, 6.0])  # coarse, to find where the posterior is
    kept = z[(coarse := log_joint(z)) > coarse.max() - 25]
    z, area = grid((kept.amin(0) - 0.1).tolist(), (kept.amax(0) + 0.1).tolist())
    values = log_joint(z)
    weights = values.softmax(0)
    mean = weights @ z
    log_likelihood = values.logsumexp(0).item() + np.log(area)
    return log_likelihood, mean.numpy(), (weights @ (z - mean).square()).sqrt().numpy()


@pytest.mark.parametrize("n_components", [1, 3])
def test_real_cells_with_two_latents(n_components):
    adata = datasets.pbmc68k()[:, :150].copy()
    adata = adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()
    learn = {"max_epochs": 15, "batch_size": 128, "plan_kwargs": {"n_epochs_kl_warmup": 5}}
    model = fit(MixSCVI, adata, n_components=n_components, n_latent=2, train_kwargs=learn)
    cells = list(model.validation_indices[:12])
    posterior = seeded(
        model.get_adapted_posterior, indices=cells, n_mc_samples=8000, n_draws=4000, progress=False
    )
    trusted = [row for row in range(len(cells)) if posterior.pareto_k[row] < 0.7]
    assert len(trusted) >= 8  # a decoder's kinks leave some posteriors far from any mixture
    for row in trusted:
        log_likelihood, mean, sd = quadrature(model, cells[row])
        error = posterior.standard_error[row]
        assert abs(posterior.log_likelihood[row] - log_likelihood) < 5 * error + 2e-3
        draws = posterior.draws[:, row]
        # 4000 resampled draws, of at least 1000 effective ones: 0.04 standard deviations.
        assert (abs(draws.mean(0) - mean) < 0.16 * sd).all()
        np.testing.assert_allclose(draws.std(0), sd, rtol=0.15)
