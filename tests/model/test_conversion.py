"""Trained models of scvi-tools as mixtures of one component."""

import numpy as np
import pytest
import scvi
import torch
from scvi.model import SCVI

from fitting import COVARIATES, LEARN, SMALL, fit, seeded
from mixscvi import MixSCVI

MODELS = {
    "plain": ({}, {}),
    "covariates": (COVARIATES, {"encode_covariates": True}),
    "size factors": ({"size_factor_key": "factor"}, {"gene_likelihood": "nb"}),
    "layer, labels": (
        {"layer": "counts", "labels_key": "label"},
        {"dispersion": "gene-label", "n_layers": 2},
    ),
    "dispersion by batch": ({"batch_key": "batch"}, {"dispersion": "gene-batch"}),
    "nb": ({"batch_key": "batch"}, {"gene_likelihood": "nb"}),
    "poisson": ({}, {"gene_likelihood": "poisson"}),
    "ln": ({}, {"latent_distribution": "ln"}),
    "modeled library": ({"batch_key": "batch"}, {"use_observed_lib_size": False}),
    "batch embeddings": (COVARIATES, {"batch_representation": "embedding"}),
}


def prepare(make_adata, name, **train_kwargs):
    setup, kwargs = MODELS[name]
    adata = make_adata(layer=setup.get("layer"))
    return fit(SCVI, adata, setup, train_kwargs=train_kwargs or None, **kwargs)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_is_the_model(name, saved, make_adata, tmp_path):
    model = prepare(make_adata, name)
    expected = seeded(model.get_latent_representation)
    elbo = seeded(model.get_elbo, return_mean=False)
    codes = model.adata.obs["_scvi_batch"].to_numpy().copy()
    if saved:
        model.save(tmp_path / "scvi", save_anndata=True)
        model = SCVI.load(tmp_path / "scvi", accelerator="cpu")
    mixture = MixSCVI.from_scvi_model(model)
    assert mixture.adata is model.adata
    assert mixture.is_trained
    assert mixture.module.n_components == 1
    assert not mixture.module.training
    np.testing.assert_array_equal(mixture.adata.obs["_scvi_batch"], codes)
    for converted in (mixture, model):
        latent = seeded(converted.get_latent_representation)
        np.testing.assert_array_equal(latent, expected)
        np.testing.assert_allclose(
            seeded(converted.get_elbo, return_mean=False), elbo, rtol=1e-4, atol=1e-3
        )
    assert mixture.history.keys() == model.history.keys()
    np.testing.assert_array_equal(mixture.history["elbo_train"], model.history["elbo_train"])
    for split in ("train_indices", "validation_indices", "test_indices"):
        np.testing.assert_array_equal(getattr(mixture, split), getattr(model, split))
    cells = {"indices": [1, 2]}
    assert np.isfinite(mixture.get_marginal_ll(**cells))
    assert np.isfinite(mixture.get_posterior_diagnostics(**cells)["log_likelihood"]).all()
    assert np.isfinite(mixture.get_component_diagnostics(**cells).elbo).all()
    assert np.isfinite(mixture.get_adapted_posterior(**cells).log_likelihood).all()
    mixture.save(tmp_path / "mixture")
    loaded = MixSCVI.load(tmp_path / "mixture", adata=mixture.adata, accelerator="cpu")
    np.testing.assert_array_equal(seeded(loaded.get_latent_representation), expected)


def test_likelihoods_are_those_of_the_model(make_adata):
    model = prepare(make_adata, "covariates", **LEARN)
    mixture = MixSCVI.from_scvi_model(model)
    encoder, error = seeded(
        mixture.get_marginal_ll, n_mc_samples=4000, return_mean=False, return_std_error=True
    )
    theirs = seeded(model.get_marginal_ll, n_mc_samples=4000, return_mean=False, seed=2)
    covered = (mixture.get_posterior_diagnostics()["pareto_k"] < 0.5).to_numpy(copy=True)
    assert covered.sum() > 5
    assert (abs(encoder - theirs) < 6 * 2**0.5 * error + 1e-2)[covered].all()
    table = mixture.get_posterior_diagnostics(proposal="adapted")
    assert (table["pareto_k"] < 0.7).mean() > 0.9


def test_categories_keep_their_codes(make_adata):
    """The model knows a batch that its data no longer hold."""
    model = prepare(make_adata, "covariates")
    fewer = model.adata[model.adata.obs["batch"] == "b1"].copy()
    del fewer.uns["_scvi_uuid"], fewer.uns["_scvi_manager_uuid"]
    fewer.obs["batch"] = fewer.obs["batch"].astype(str)
    SCVI.setup_anndata(fewer, source_registry=model.registry, **COVARIATES)
    kept = SCVI(fewer, **SMALL, **MODELS["covariates"][1])
    kept.module.load_state_dict(model.module.state_dict())
    kept.is_trained_ = True
    kept.module.eval()
    expected = kept.get_normalized_expression(return_numpy=True, n_samples=50).mean(0)
    mixture = MixSCVI.from_scvi_model(kept)
    assert (fewer.obs["_scvi_batch"] == 1).all()
    got = mixture.get_normalized_expression(return_numpy=True, n_samples=50).mean(0)
    np.testing.assert_allclose(got, expected, rtol=0.1)


def test_both_models_go_their_own_way(make_adata):
    model = prepare(make_adata, "covariates")
    mixture = MixSCVI.from_scvi_model(model)
    state = {name: value.clone() for name, value in mixture.module.state_dict().items()}
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=None)
    assert all(torch.equal(v, state[n]) for n, v in mixture.module.state_dict().items())
    assert any(not torch.equal(v, state[n]) for n, v in model.module.state_dict().items())
    mixture.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=None)
    assert np.isfinite(mixture.get_marginal_ll(n_mc_samples=30))


def test_mapped_queries_can_be_converted(make_adata):
    reference = prepare(make_adata, "covariates")
    query = make_adata(n_obs=40, seed=3, batches=("new",))
    mapped = SCVI.load_query_data(query, reference, accelerator="cpu")
    mapped.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=None)
    mixture = MixSCVI.from_scvi_model(mapped)
    assert (query.obs["_scvi_batch"] == 2).all()
    np.testing.assert_array_equal(
        mixture.get_latent_representation(), mapped.get_latent_representation()
    )


def test_counts_are_needed(make_adata):
    model = prepare(make_adata, "plain")
    expected = model.get_latent_representation()
    mean, variance = model.get_latent_representation(return_dist=True)
    model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = mean, variance
    model.minify_adata("latent_posterior_parameters_with_counts")
    mixture = MixSCVI.from_scvi_model(model)
    assert np.isfinite(mixture.get_marginal_ll(proposal="adapted", indices=[0, 1]))
    np.testing.assert_allclose(mixture.get_latent_representation(), expected, rtol=1e-5)

    model = prepare(make_adata, "plain")
    model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = mean, variance
    model.minify_adata()
    with pytest.raises(ValueError, match="minified without counts"):
        MixSCVI.from_scvi_model(model)


def test_other_models_are_refused(make_adata):
    adata = make_adata()
    SCVI.setup_anndata(adata)
    with pytest.raises(RuntimeError, match="not trained"):
        MixSCVI.from_scvi_model(SCVI(adata, **SMALL))
    mixture = fit(MixSCVI, adata, n_components=1)
    with pytest.raises(TypeError, match=r"scvi\.module\.VAE, got MixSCVI with FusedVAE"):
        MixSCVI.from_scvi_model(mixture)
    with pytest.raises(TypeError, match=r"must be a scvi\.model\.SCVI, got AnnData"):
        MixSCVI.from_scvi_model(adata)
    scvi.model.LinearSCVI.setup_anndata(adata)
    with pytest.raises(TypeError, match="got LinearSCVI"):
        MixSCVI.from_scvi_model(scvi.model.LinearSCVI(adata, n_latent=2))
