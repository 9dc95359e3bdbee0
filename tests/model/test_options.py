"""Every option trains, repeats, reloads, and starts where it should."""

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy.sparse import issparse

from fitting import (
    COVARIATES,
    EARLY,
    SMALL,
    assert_same_history,
    assert_same_state,
    fit,
    seeded,
    train,
)
from mixscvi import MixSCVI
from mixscvi.mixture import GaussianMixture

OPTIONS = {
    "some_to_all, 1": {"estimator": "some_to_all", "n_sampled_components": 1},
    "some_to_all, 2": {"estimator": "some_to_all", "n_sampled_components": 2},
    "some_to_some, 1": {"estimator": "some_to_some", "n_sampled_components": 1},
    "some_to_some, 2": {"estimator": "some_to_some", "n_sampled_components": 2},
    "amortized": {"component_encoder": "amortized", "n_components": 6},
    "amortized, some_to_some": {
        "component_encoder": "amortized",
        "estimator": "some_to_some",
        "n_sampled_components": 1,
        "n_layers": 2,
    },
    "mog": {"prior": "mog", "n_prior_components": 5},
    "vamp": {"prior": "vamp", "n_prior_components": 7, "encode_covariates": True},
    "vamp, embedding": {
        "prior": "vamp",
        "n_prior_components": 7,
        "encode_covariates": True,
        "batch_representation": "embedding",
    },
    "flow": {"n_flow_steps": 2},
    "flow, vamp": {"n_flow_steps": 1, "prior": "vamp", "n_prior_components": 5},
    "flow, modeled library": {"n_flow_steps": 1, "use_observed_lib_size": False},
    "2 samples": {"n_samples": 2},
    "siwae": {"n_components": 1, "n_samples": 2, "objective": "siwae"},
    "one component, mog": {"n_components": 1, "prior": "mog"},
    "one component, flow": {"n_components": 1, "n_flow_steps": 2},
    "one component, 2 samples": {"n_components": 1, "n_samples": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_train_repeat_and_reload(options, make_adata, tmp_path):
    adata = make_adata()
    kwargs = {"n_components": 3, **options}
    model = fit(MixSCVI, adata, COVARIATES, train_kwargs=EARLY, **kwargs)
    again = fit(MixSCVI, adata, COVARIATES, train_kwargs=EARLY, **kwargs)
    assert_same_history(model, again)
    assert_same_state(model, again)
    latent = model.get_latent_representation(mc_samples=300)
    assert latent.shape == (adata.n_obs, 3)
    np.testing.assert_array_equal(latent, again.get_latent_representation(mc_samples=300))
    other = fit(MixSCVI, adata, COVARIATES, seed=5, **kwargs)
    assert (latent != other.get_latent_representation(mc_samples=300)).any()

    def evaluate(any_model):
        return [
            seeded(any_model.get_marginal_ll, n_mc_samples=60),
            float(seeded(any_model.get_elbo)),
            seeded(any_model.get_normalized_expression, n_samples=2, return_numpy=True).sum(),
        ]

    results = evaluate(model)
    assert np.isfinite(results).all()
    model.save(tmp_path / "model")
    loaded = MixSCVI.load(tmp_path / "model", adata=adata, accelerator="cpu")
    assert_same_state(loaded, model)
    np.testing.assert_array_equal(loaded.get_latent_representation(mc_samples=300), latent)
    assert evaluate(loaded) == results
    name = next(iter(options))
    assert loaded.init_params_["non_kwargs"][name] == options[name]


def nearest_cells(model):
    """The cell that each pseudo-cell is, and the codes of its covariates."""
    adata = model.adata
    with torch.no_grad():
        dense, batch, donor = model.module.prior.pseudo_inputs()
    counts = adata.X.toarray() if issparse(adata.X) else adata.X
    real = np.concatenate([np.log1p(counts), adata.obs[["age", "depth"]].to_numpy()], axis=1)
    distance = abs(dense.numpy()[:, None] - real[None]).max(-1)
    assert distance.min(1).max() < 0.01
    return distance.argmin(1), batch.argmax(1), donor.argmax(1)


def vamp_of(adata, **kwargs):
    MixSCVI.setup_anndata(adata, **COVARIATES)
    scvi.settings.seed = 0
    return MixSCVI(adata, prior="vamp", encode_covariates=True, **SMALL, **kwargs)


NOTHING_LEARNED = {"max_epochs": 1, "plan_kwargs": {"lr": 0.0}}


@pytest.mark.parametrize("n_pseudo", [9, 40], ids=["of one minibatch", "of two"])
@pytest.mark.parametrize("sparse", [False, True])
def test_pseudo_cells_start_as_distinct_training_cells(sparse, n_pseudo, make_adata):
    adata = make_adata(sparse=sparse)
    model = train(vamp_of(adata, n_prior_components=n_pseudo), **NOTHING_LEARNED)
    nearest, batch, donor = nearest_cells(model)
    assert len(set(nearest)) == n_pseudo <= len(model.train_indices)
    assert set(nearest) <= set(model.train_indices)
    for codes, name in ((batch, "batch"), (donor, "donor")):
        np.testing.assert_array_equal(codes, pd.Categorical(adata.obs[name]).codes[nearest])


def test_pseudo_cells_start_in_the_first_training_alone(make_adata, tmp_path):
    adata = make_adata()
    untrained = vamp_of(adata, n_prior_components=9)
    untrained.save(tmp_path / "untrained")
    model = train(MixSCVI.load(tmp_path / "untrained", adata=adata), **NOTHING_LEARNED)
    start, *_ = nearest_cells(model)
    assert set(start) <= set(model.train_indices)
    model.save(tmp_path / "model")
    for again in (model, MixSCVI.load(tmp_path / "model", adata=adata)):
        train(again, **NOTHING_LEARNED)
        np.testing.assert_array_equal(nearest_cells(again)[0], start)
    query = MixSCVI.load_query_data(adata.copy(), tmp_path / "model")
    train(query, **NOTHING_LEARNED)
    np.testing.assert_array_equal(nearest_cells(query)[0], start)


def test_frozen_pseudo_cells_stay_as_they_are(make_adata, tmp_path):
    adata = make_adata()
    vamp_of(adata, n_prior_components=9).save(tmp_path / "untrained")
    query = MixSCVI.load_query_data(adata.copy(), tmp_path / "untrained")
    before = query.module.prior.pseudo_inputs.dense.clone()
    assert not query.module.prior.pseudo_inputs.dense.requires_grad
    train(query, **NOTHING_LEARNED)
    assert torch.equal(query.module.prior.pseudo_inputs.dense, before)


def test_a_vamp_model_meets_fewer_cells_than_pseudo_cells(make_adata, tmp_path):
    adata = make_adata()
    model = fit(MixSCVI, adata, n_components=2, prior="vamp", n_prior_components=40)
    model.save(tmp_path / "model")
    few = adata[:20].copy()
    loaded = MixSCVI.load(tmp_path / "model", adata=few)
    np.testing.assert_array_equal(
        loaded.get_latent_representation(), model.get_latent_representation(few)
    )
    fresh = vamp_of(few, n_prior_components=40)
    train(fresh, **NOTHING_LEARNED)
    start = fresh.module.prior.pseudo_inputs()[0]
    assert torch.cdist(start, start).fill_diagonal_(1).min() > 1e-3


def test_a_prior_object_is_copied_and_must_fit(make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    prior = GaussianMixture(n_latent=SMALL.get("n_latent", 10), n_components=3)
    model = MixSCVI(adata, n_components=2, prior=prior, **SMALL)
    assert model.module.prior is not prior
    with pytest.raises(ValueError, match=r"prior must have event shape .* got \(1,\)"):
        MixSCVI(adata, n_components=2, prior=GaussianMixture(1, 3), **SMALL)
    with pytest.raises(ValueError, match=r"or an instance of mixscvi.mixture.Prior"):
        MixSCVI(adata, n_components=2, prior=GaussianMixture, **SMALL)


@pytest.mark.parametrize("estimator", ["some_to_all", "some_to_some"])
def test_some_components_are_one_unless_said_otherwise(estimator, make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    model = MixSCVI(adata, n_components=50, estimator=estimator, **SMALL)
    assert model.module.mixture.n_sampled_components == 1
    tensors = next(iter(model._make_data_loader(adata=adata, batch_size=8)))
    inference, _, _ = model.module.train()(tensors)
    assert inference["z"].shape[2] == 1
    assert MixSCVI(adata, n_components=5, **SMALL).module.mixture.n_sampled_components == 5


def test_a_vamp_prior_takes_a_covariate_with_one_category(make_adata):
    adata = make_adata()
    setup = {"categorical_covariate_keys": ["donor"]}
    kwargs = {"prior": "vamp", "n_prior_components": 5, "encode_covariates": True}
    model = fit(MixSCVI, adata, setup, n_components=2, **kwargs)
    _, batch, donor = model.module.prior.pseudo_inputs()
    assert batch.shape == (5, 1)
    assert donor.shape == (5, 3)
    query = make_adata(n_obs=30, seed=2)
    query.obs["donor"] = "another"
    mapped = MixSCVI.load_query_data(query, model)
    assert mapped.module.prior.pseudo_inputs()[2].isfinite().all()
    assert (mapped.module.prior.pseudo_inputs()[2][:, 3] == 0).all()
