"""Adapted posteriors of real cells against quadrature over two latent dimensions."""

import copy

import numpy as np
import pytest
import torch
from scvi import REGISTRY_KEYS
from scvi.module import VAE

from fitting import fit, seeded
from mixscvi import MixSCVI, datasets
from naive_module import naive_prior


@torch.no_grad()
def quadrature(model, cell):
    """log p(x), posterior mean and covariance of one cell, with scvi-tools' likelihood.

    The integral is over z: neither the encoder nor the flow takes part.
    """
    module = copy.deepcopy(model.module).double().eval()
    tensors = next(iter(model._make_data_loader(adata=model.adata, indices=[cell], batch_size=1)))
    counts = tensors[REGISTRY_KEYS.X_KEY].double()
    prior = naive_prior(module)

    def log_joint(z):
        library = counts.sum().log().expand(len(z), 1)
        px = VAE.generative(module, z, library, torch.zeros(len(z), 1, dtype=torch.long))["px"]
        return px.log_prob(counts).sum(-1) + prior.log_prob(z)

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
    covariance = (z - mean).mT @ (weights[:, None] * (z - mean))
    return log_likelihood, mean.numpy(), covariance.numpy()


def real_counts():
    """150 genes of real cells."""
    adata = datasets.pbmc68k()[:, :150].copy()
    return adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()


LEARN = {"max_epochs": 15, "batch_size": 128, "plan_kwargs": {"n_epochs_kl_warmup": 5}}


@pytest.mark.parametrize("n_components", [1, 3])
def test_real_cells_with_two_latents(n_components):
    model = fit(MixSCVI, real_counts(), n_components=n_components, n_latent=2, train_kwargs=LEARN)
    cells = list(model.validation_indices[:12])
    posterior = seeded(
        model.get_adapted_posterior, indices=cells, n_mc_samples=8000, n_draws=4000, progress=False
    )
    trusted = [row for row in range(len(cells)) if posterior.pareto_k[row] < 0.7]
    assert len(trusted) >= 8  # a decoder's kinks leave some posteriors far from any mixture
    for row in trusted:
        log_likelihood, mean, covariance = quadrature(model, cells[row])
        sd = np.sqrt(np.diag(covariance))
        error = posterior.standard_error[row]
        assert abs(posterior.log_likelihood[row] - log_likelihood) < 5 * error + 2e-3
        draws = posterior.draws[:, row]
        # 4000 resampled draws, of at least 1000 effective ones: 0.04 standard deviations.
        assert (abs(draws.mean(0) - mean) < 0.16 * sd).all()
        np.testing.assert_allclose(draws.std(0), sd, rtol=0.15)


@pytest.mark.parametrize("prior", ["normal", "mog"])
def test_real_cells_behind_a_trained_flow(prior):
    """In double precision, with the decoder's usual width: every cell, and all second moments."""
    model = fit(
        MixSCVI,
        real_counts(),
        n_components=2,
        n_latent=2,
        n_hidden=128,
        n_flow_steps=2,
        prior=prior,
        train_kwargs=LEARN,
    )
    cells = list(model.validation_indices[:8])
    tensors = next(iter(model._make_data_loader(model.adata, indices=cells, batch_size=8)))
    tensors[REGISTRY_KEYS.X_KEY] = tensors[REGISTRY_KEYS.X_KEY].double()
    module = copy.deepcopy(model.module).double().eval()
    adapted = module.adapt(tensors, torch.Generator().manual_seed(0), n_final=10_000)
    assert adapted.converged.sum() >= 7
    z = module.adapted_latents(adapted.draws).numpy()
    weights = adapted.log_weights.softmax(0).numpy()
    spread = z.reshape(-1, 2).std(0)
    assert (abs(z - adapted.draws.numpy()).mean((0, 1)) > 0.1 * spread).any()  # a flow that moves
    for row in np.flatnonzero(adapted.converged):
        log_likelihood, mean, covariance = quadrature(model, cells[row])
        error = adapted.standard_error[row].item()
        assert error < 0.05
        assert abs(adapted.log_likelihood[row].item() - log_likelihood) < 4.5 * error
        # Averages under normalized weights have the error of their weighted deviations.
        w, deviation = weights[:, row], z[:, row] - mean
        assert (abs(w @ deviation) < 4.5 * np.sqrt(w**2 @ deviation**2)).all()
        products = np.einsum("nd,ne->nde", deviation, deviation) - covariance
        errors = np.sqrt(np.einsum("n,nde->de", w**2, products**2))
        # A thousandth of the mass, far away, is met by few draws, and their errors do not tell.
        sd = np.sqrt(np.diag(covariance))
        bound = 4.5 * errors + 0.1 * np.outer(sd, sd)
        assert (abs(np.einsum("n,nde->de", w, products)) < bound).all()
