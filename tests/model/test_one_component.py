"""One component is SCVI: to rounding, and on request to the bit. Three are read like it."""

import math

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scvi.model import SCVI

from fitting import (
    BATCH,
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

# name: arguments of the data, of setup_anndata, and of the model
CONFIGURATIONS = {
    "zinb, dense": ({}, {}, {}),
    "zinb, gene-batch, sparse": ({"sparse": True}, BATCH, {"dispersion": "gene-batch"}),
    "zinb, gene-cell, 2 layers": ({}, BATCH, {"dispersion": "gene-cell", "n_layers": 2}),
    "zinb, gene-label": ({}, {"labels_key": "label"}, {"dispersion": "gene-label"}),
    "nb, batch": ({"sparse": True}, BATCH, {"gene_likelihood": "nb"}),
    "nb, gene-cell": ({}, {}, {"gene_likelihood": "nb", "dispersion": "gene-cell"}),
    "nb, gene-label, sparse": (
        {"sparse": True},
        {"labels_key": "label", **BATCH},
        {"gene_likelihood": "nb", "dispersion": "gene-label"},
    ),
    "poisson, sparse layer": (
        {"sparse": True, "layer": "counts"},
        {"layer": "counts"},
        {"gene_likelihood": "poisson"},
    ),
    "normal, dense layer": ({"layer": "raw"}, {"layer": "raw"}, {"gene_likelihood": "normal"}),
    "normal, gene-batch": ({}, BATCH, {"gene_likelihood": "normal", "dispersion": "gene-batch"}),
    "covariates": ({}, COVARIATES, {}),
    "encoded covariates": ({}, COVARIATES, {"encode_covariates": True}),
    "encoded covariates, 2 layers": (
        {"sparse": True},
        COVARIATES,
        {"encode_covariates": True, "n_layers": 2, "gene_likelihood": "nb"},
    ),
    "covariates at the first layer": (
        {},
        COVARIATES,
        {"encode_covariates": True, "n_layers": 2, "deeply_inject_covariates": False},
    ),
    "size factor": ({}, {"size_factor_key": "factor", **BATCH}, {"gene_likelihood": "nb"}),
    "modeled library": ({}, {}, {"use_observed_lib_size": False}),
    "modeled library, covariates": (
        {"sparse": True},
        COVARIATES,
        {"use_observed_lib_size": False, "encode_covariates": True, "gene_likelihood": "nb"},
    ),
    "ln": ({}, {}, {"latent_distribution": "ln"}),
    "ln, modeled library": (
        {},
        BATCH,
        {"latent_distribution": "ln", "use_observed_lib_size": False},
    ),
    "embedding": ({}, BATCH, {"batch_representation": "embedding"}),
    "embedding, encoded covariates": (
        {},
        COVARIATES,
        {"batch_representation": "embedding", "encode_covariates": True, "n_layers": 2},
    ),
    "layer norm": (
        {},
        BATCH,
        {"use_batch_norm": "none", "use_layer_norm": "both", "n_layers": 2},
    ),
    "raw inputs, softplus": (
        {},
        {},
        {
            "log_variational": False,
            "var_activation": torch.nn.functional.softplus,
            "dropout_rate": 0.0,
        },
    ),
}


def as_arrays(result):
    """Whatever a method returns, as a list of arrays."""
    if isinstance(result, dict):
        return [array for value in result.values() for array in as_arrays(value)]
    if isinstance(result, (tuple, list)):
        return [array for value in result for array in as_arrays(value)]
    return [np.asarray(result.todense() if hasattr(result, "todense") else result)]


@pytest.fixture(params=CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def configuration(request):
    return request.param


def test_one_component_is_scvi(configuration, make_adata):
    data, setup, kwargs = configuration
    adata = make_adata(**data)
    kwargs = {**kwargs, "train_kwargs": EARLY}
    ours = fit(MixSCVI, adata, setup, n_components=1, likelihood="reference", **kwargs)
    theirs = fit(SCVI, adata, setup, **kwargs)

    assert_same_history(ours, theirs)
    assert_same_state(ours, theirs)

    def same(name, *args, **kwargs):
        got = seeded(getattr(ours, name), *args, **kwargs)
        expected = seeded(getattr(theirs, name), *args, **kwargs)
        assert type(got) is type(expected)
        for a, b in zip(as_arrays(got), as_arrays(expected), strict=True):
            assert np.array_equal(a, b), name
            assert np.isfinite(a).all(), name

    same("get_latent_representation")
    same("get_latent_representation", give_mean=False)
    same("get_latent_representation", return_dist=True)
    same("get_elbo")
    same("get_elbo", return_mean=False)
    same("get_reconstruction_error", return_mean=False)
    same("get_normalized_expression", return_numpy=True)
    if "batch_representation" not in kwargs:  # several draws are more than SCVI can do there
        same("get_normalized_expression", return_numpy=True, n_samples=3)
        same("get_normalized_expression", n_samples=2, return_mean=False, library_size="latent")
        same("posterior_predictive_sample", n_samples=3, indices=[4, 1, 7])
    same("get_latent_library_size", give_mean=not kwargs.get("use_observed_lib_size", True))
    same("posterior_predictive_sample", n_samples=1)


def test_one_component_is_scvi_to_rounding(configuration, make_adata):
    """By default, step by step: the same minibatches, dropout and noise, so the same updates."""
    data, setup, kwargs = configuration
    adata = make_adata(**data)
    kwargs = {**kwargs, "train_kwargs": {**EARLY, "max_epochs": 4}}
    ours = fit(MixSCVI, adata, setup, n_components=1, **kwargs)
    theirs = fit(SCVI, adata, setup, **kwargs)
    assert set(ours.history) == set(theirs.history)
    for key, values in ours.history.items():
        expected = theirs.history[key]
        assert values.index.equals(expected.index)
        got, expected = (frame.to_numpy(dtype=float) for frame in (values, expected))
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-5, err_msg=key)
    state = theirs.module.state_dict()
    assert list(ours.module.state_dict()) == list(state)
    for name, value in ours.module.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-4, atol=2e-5, msg=name)

    def same(name, *args, **kwargs):
        got = seeded(getattr(ours, name), *args, **kwargs)
        expected = seeded(getattr(theirs, name), *args, **kwargs)
        assert type(got) is type(expected)
        for a, b in zip(as_arrays(got), as_arrays(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4, err_msg=name)

    same("get_latent_representation")
    same("get_latent_representation", give_mean=False)
    same("get_elbo", return_mean=False)
    same("get_reconstruction_error", return_mean=False)
    same("get_normalized_expression", return_numpy=True)


@pytest.mark.parametrize("n_components", [1, 3])
def test_several_draws_with_an_embedded_batch(n_components, make_adata):
    kwargs = {"n_components": n_components, "batch_representation": "embedding"}
    model = fit(MixSCVI, make_adata(), BATCH, **kwargs)
    expression = model.get_normalized_expression(n_samples=3, return_mean=False)
    assert expression.shape == (3, 72, 20)
    np.testing.assert_allclose(expression.sum(-1), 1, rtol=1e-4)


def test_one_component_is_scvi_where_users_continue(make_adata, tmp_path):
    # Of data of their own: whoever comes second registers them anew, with random numbers.
    ours, theirs = (fit(cls, make_adata(), BATCH) for cls in (_OneComponent, SCVI))
    scvi.settings.seed = 3
    train(ours, max_epochs=1)
    theirs.module.train()  # SCVI's second training is in evaluation mode
    scvi.settings.seed = 3
    train(theirs, max_epochs=1)
    assert_same_state(ours, theirs)

    def tables(model):
        frame = seeded(model.differential_expression, groupby="label", mode="change", silent=True)
        return frame.drop(columns=[name for name in frame if frame[name].dtype == object])

    pd.testing.assert_frame_equal(tables(ours), tables(theirs), check_exact=True)
    theirs.save(tmp_path / "scvi")
    ours.save(tmp_path / "ours")
    ours = _OneComponent.load(tmp_path / "ours", adata=make_adata())
    theirs = SCVI.load(tmp_path / "scvi", adata=make_adata())
    assert_same_state(ours, theirs)
    for model in (ours, theirs):
        mean, variance = model.get_latent_representation(return_dist=True)
        model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = mean, variance
        model.minify_adata()
    latents = [model.get_latent_representation() for model in (ours, theirs)]
    assert np.array_equal(*latents)


class _OneComponent(MixSCVI):
    def __init__(self, adata=None, **kwargs):
        super().__init__(adata, n_components=1, likelihood="reference", **kwargs)
        self.init_params_ = self._get_init_params(locals())


def test_three_components(configuration, make_adata, tmp_path):
    data, setup, kwargs = configuration
    adata = make_adata(**data)
    model = fit(MixSCVI, adata, setup, n_components=3, train_kwargs=EARLY, **kwargs)
    n, d = adata.n_obs, SMALL["n_latent"]

    assert len(model.history["elbo_validation"]) == 2
    for key, values in model.history.items():
        assert np.isfinite(values.to_numpy(dtype=float)).all(), key
    assert model.trainer.early_stopping_callback.monitor == "elbo_validation"

    loc, scale = model.get_latent_mixture()
    assert loc.shape == scale.shape == (n, 3, d)
    assert (scale > 0).all()
    assert np.ptp(loc, axis=1).min() > 0
    latents = {
        name: model.get_latent_representation(representation=name)
        for name in ("mean", "components", "parameters")
    }
    np.testing.assert_array_equal(latents["components"], loc.reshape(n, 3 * d))
    expected = np.concatenate([latents["components"], (scale**2).reshape(n, 3 * d)], axis=1)
    np.testing.assert_allclose(latents["parameters"], expected, rtol=1e-6)
    mean, variance = model.get_latent_representation(return_dist=True)
    np.testing.assert_allclose(mean, loc.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, (scale**2).mean(1) + loc.var(1), rtol=1e-4, atol=1e-5)
    if kwargs.get("latent_distribution") == "ln":
        np.testing.assert_allclose(latents["mean"].sum(1), 1, rtol=1e-4)
    else:
        np.testing.assert_array_equal(latents["mean"], mean)
    one_draw = model.get_latent_representation(give_mean=False)
    assert one_draw.shape == (n, d)
    assert (one_draw != latents["mean"]).any()

    elbo = seeded(model.get_elbo, return_mean=False)
    error = seeded(model.get_reconstruction_error, return_mean=False)
    error = error["reconstruction_loss"] if isinstance(error, dict) else error
    log_likelihood = seeded(model.get_marginal_ll, return_mean=False, n_mc_samples=300)
    for values in (elbo, error, log_likelihood):
        assert values.shape == (n,)
        assert np.isfinite(np.asarray(values)).all()
    assert float(seeded(model.get_elbo)) == pytest.approx(np.asarray(elbo).mean(), rel=1e-4)
    # The bound is a single draw for each component of each cell.
    gap = log_likelihood.numpy() - np.asarray(elbo)
    assert gap.mean() > -3 * gap.std() / math.sqrt(n)

    expression = model.get_normalized_expression(n_samples=4, return_numpy=True)
    assert expression.shape == adata.shape
    if "size_factor_key" not in setup:
        np.testing.assert_allclose(expression.sum(1), 1, rtol=1e-3)
    assert model.posterior_predictive_sample(n_samples=2).shape == (*adata.shape, 2)

    model.save(tmp_path / "model")
    loaded = MixSCVI.load(tmp_path / "model", adata=adata, accelerator="cpu")
    assert_same_state(loaded, model)
    assert loaded.module.n_components == 3
    np.testing.assert_array_equal(loaded.get_latent_representation(), latents["mean"])


def test_early_stopping_stops(make_adata):
    stop = {"early_stopping": True, "early_stopping_patience": 2, "max_epochs": 30}
    stop["early_stopping_min_delta"] = 1e9
    model = fit(MixSCVI, make_adata(), train_kwargs=stop)
    assert len(model.history["elbo_validation"]) == 3
    assert model.is_trained


def test_training_improves_the_bound(make_adata):
    plan = {"lr": 1e-2, "n_epochs_kl_warmup": 1}
    model = fit(MixSCVI, make_adata(), train_kwargs={"max_epochs": 40, "plan_kwargs": plan})
    history = model.history["elbo_train"].to_numpy(dtype=float).ravel()
    assert history[-1] < history[0] - 5
    assert np.mean(model.get_marginal_ll()) > np.mean(np.asarray(model.get_elbo()))
