"""Latents and diagnostics: per cell, whatever else is in the batch."""

import math

import numpy as np
import pytest

from fitting import COVARIATES, fit, seeded
from mixscvi import MixSCVI


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"component_encoder": "amortized"}, {"prior": "vamp", "n_prior_components": 5}],
    ids=["separate", "amortized", "vamp"],
)
def test_latents_do_not_depend_on_the_batch_size(kwargs, make_adata):
    adata = make_adata()
    model = fit(MixSCVI, adata, COVARIATES, n_components=3, encode_covariates=True, **kwargs)
    for representation in ("mean", "components", "parameters"):
        alone, together = (
            model.get_latent_representation(batch_size=size, representation=representation)
            for size in (1, 64)
        )
        np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)
    some = model.get_latent_representation(indices=[5, 2])
    np.testing.assert_allclose(some, model.get_latent_representation()[[5, 2]], atol=1e-5)
    new = make_adata()
    np.testing.assert_allclose(
        model.get_latent_representation(new), model.get_latent_representation(), atol=1e-6
    )


def test_latents_behind_a_flow_repeat(make_adata):
    model = fit(MixSCVI, make_adata(), n_flow_steps=2)
    one, other = (
        model.get_latent_representation(batch_size=size, mc_samples=2_000) for size in (24, 72)
    )
    again = model.get_latent_representation(batch_size=24, mc_samples=2_000)
    np.testing.assert_array_equal(one, again)
    draws = np.mean(
        [seeded(model.get_latent_representation, give_mean=False, seed=i) for i in range(100)],
        axis=0,
    )
    _, variance = model.get_latent_representation(return_dist=True, mc_samples=2_000)
    assert (abs(one - other) < 6 * np.sqrt(variance / 1000)).all()
    assert (abs(draws - one) < 6 * np.sqrt(variance / 100)).all()


def test_own_dataloader(make_adata):
    adata = make_adata()
    model = fit(MixSCVI, adata, n_components=3)
    loader = model._make_data_loader(adata=adata, batch_size=20)
    latent = model.get_latent_representation(batch_size=20)
    np.testing.assert_array_equal(model.get_latent_representation(dataloader=loader), latent)
    mixture = model.get_latent_mixture(dataloader=loader)
    np.testing.assert_array_equal(mixture.loc, model.get_latent_mixture(batch_size=20).loc)
    values = seeded(model.get_marginal_ll, dataloader=loader, n_mc_samples=30)
    assert values == seeded(model.get_marginal_ll, batch_size=20, n_mc_samples=30)
    with pytest.raises(ValueError, match="dataloader"):
        model.get_latent_mixture(adata, dataloader=loader)


@pytest.mark.parametrize("kwargs", [{}, {"n_components": 1}, {"n_flow_steps": 1, "prior": "mog"}])
def test_diagnostics(kwargs, make_adata):
    adata = make_adata()
    model = fit(MixSCVI, adata, **{"n_components": 3, **kwargs})
    n_components = model.module.n_components
    cells = [7, 0, 5]
    table = seeded(model.get_posterior_diagnostics, indices=cells, n_mc_samples=600)
    assert list(table.index) == ["cell7", "cell0", "cell5"]
    assert np.isfinite(table.to_numpy()).all()
    divergence = table["jensen_shannon_divergence"]
    assert (divergence >= -0.1).all()
    assert (divergence <= math.log(n_components) + 1e-5).all()
    assert table["effective_sample_size"].between(1, 600.1).all()
    expected = seeded(model.get_marginal_ll, indices=cells, n_mc_samples=600, return_mean=False)
    np.testing.assert_allclose(table["log_likelihood"], expected, rtol=1e-5)
    assert (table["miselbo"] <= table["log_likelihood"]).all()

    parts = seeded(model.get_component_diagnostics, indices=cells, n_mc_samples=600)
    assert parts.elbo.shape == parts.specialization.shape == (3, n_components)
    np.testing.assert_allclose(
        (parts.elbo + parts.specialization).mean(1), table["miselbo"], rtol=1e-5
    )
    np.testing.assert_allclose(parts.specialization.mean(1), divergence, rtol=1e-4, atol=1e-5)
    everyone = model.get_posterior_diagnostics(n_mc_samples=90, batch_size=50)
    assert list(everyone.index) == list(adata.obs_names)
    units = model.get_active_units()
    assert units.shape == (3,)
    variance = model.get_latent_representation().var(0)
    np.testing.assert_array_equal(units, variance > 0.01)


def test_boolean_and_array_indices(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2)
    chosen = np.array([4, 9, 60])
    table = model.get_posterior_diagnostics(indices=chosen, n_mc_samples=60)
    assert list(table.index) == ["cell4", "cell9", "cell60"]
    mixture = model.get_latent_mixture()
    part = model.get_latent_mixture(indices=chosen)
    np.testing.assert_allclose(part.loc, mixture.loc[chosen], rtol=1e-4, atol=1e-5)
    mask = np.isin(np.arange(72), chosen)
    np.testing.assert_array_equal(model.get_latent_mixture(indices=mask).loc, part.loc)
    masked = model.get_posterior_diagnostics(indices=mask, n_mc_samples=60)
    assert list(masked.index) == list(table.index)


def test_latents_under_a_flow_do_not_depend_on_the_batch(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2, n_flow_steps=2)
    whole = model.get_latent_representation(mc_samples=200)
    alone = model.get_latent_representation(indices=[5], mc_samples=200)
    np.testing.assert_allclose(alone[0], whole[5], rtol=1e-4, atol=1e-5)
    _, variance = model.get_latent_representation(return_dist=True, mc_samples=200)
    assert (variance > 0).all()
