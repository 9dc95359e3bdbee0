"""Dead components are found after any training, and nobody uses their latents unwarned."""

import warnings

import numpy as np
import pytest
import scvi
import torch
from scvi.dataloaders import DataSplitter

from fitting import BATCH, COVARIATES, LEARN, SMALL, WORKING, fit, seeded, train
from mixscvi import MixSCVI

DEAD = "components are dead, of n_components=3: "
STILL = {"max_epochs": 1, "plan_kwargs": {"lr": 0.0}}
FAR = 60.0


def poison(model, component):
    """Move a component's mean far away from everything."""
    heads = [
        parameter
        for name, parameter in model.module.z_encoder.named_parameters()
        if name.endswith("bias") and "mean" in name
    ]
    assert len(heads) == 1
    with torch.no_grad():
        heads[0].reshape(model.module.n_components, -1)[component] += FAR


def deaths_told_of(function, *args, **kwargs):
    """Warnings of dead components; others are left to the filters of the test session."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=".*components are dead")
        function(*args, **kwargs)
    return [warning for warning in caught if "components are dead" in str(warning.message)]


def fit_with_dead(adata, component=1, **kwargs):
    """A model that trained well, but for one component, and then an epoch without a change."""
    model = fit(MixSCVI, adata, BATCH, n_components=3, train_kwargs=LEARN, **kwargs)
    assert model.dead_components_ == {}
    poison(model, component)
    (warning,) = deaths_told_of(train, model, **STILL)
    assert str(warning.message).startswith(f"{DEAD}{component} (in ")
    return model


@pytest.mark.parametrize("kwargs", WORKING.values(), ids=WORKING)
@pytest.mark.parametrize("likelihood", ["fused", "reference"])
def test_a_dead_component_is_named(kwargs, likelihood, make_adata):
    model = fit_with_dead(make_adata(), likelihood=likelihood, **kwargs)
    assert list(model.dead_components_) == [1]
    assert model.dead_components_[1] > 0.9


def test_whoever_takes_latents_is_warned_once(make_adata, tmp_path):
    adata = make_adata()
    model = fit_with_dead(adata)
    model.save(tmp_path / "model")
    loaded = MixSCVI.load(tmp_path / "model", adata, accelerator="cpu")
    assert loaded.dead_components_ == model.dead_components_
    for any_model, kwargs in ((model, {}), (loaded, {"representation": "components"})):
        with pytest.warns(UserWarning, match="1 .in 100% of the cells") as warned:
            any_model.get_latent_representation(**kwargs)
        assert len(warned) == 1
        assert warned[0].filename == __file__
        assert not deaths_told_of(any_model.get_latent_representation, **kwargs)
    poison_undone = -FAR
    with torch.no_grad():
        for name, parameter in model.module.z_encoder.named_parameters():
            if name.endswith("bias") and "mean" in name:
                parameter.reshape(3, -1)[1] += poison_undone
    train(model, **STILL)
    assert model.dead_components_ == {}


@pytest.mark.parametrize("max_epochs", [1, 5])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"n_components": 1},
        {"component_encoder": "amortized", "n_components": 30},
        {"estimator": "some_to_some"},
        {"use_observed_lib_size": False},
        {"gene_likelihood": "normal"},
        {"n_samples": 3},
    ],
)
def test_no_alarm_without_a_death(kwargs, max_epochs, make_adata):
    model = fit(
        MixSCVI, make_adata(), COVARIATES, train_kwargs={"max_epochs": max_epochs}, **kwargs
    )
    assert model.dead_components_ == {}


def test_random_numbers_are_what_they_would_be_without(make_adata, monkeypatch):
    adata, following = make_adata(), []
    for skipped in (False, True):
        with monkeypatch.context() as patch:
            if skipped:
                patch.setattr(MixSCVI, "_find_dead_components", lambda *_: {})
            fit(MixSCVI, adata, n_components=2)
        following.append((torch.rand(3), np.random.random(3)))
    for one, other in zip(*following, strict=True):
        np.testing.assert_array_equal(one, other)


def test_training_on_a_data_module(make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata, **BATCH)
    scvi.settings.seed = 0
    model = MixSCVI(adata, n_components=3, **SMALL)
    train(model, **LEARN)
    poison(model, 2)
    manager = model.get_anndata_manager(adata, required=True)
    splitter = DataSplitter(manager, train_size=0.75, batch_size=16)
    (warning,) = deaths_told_of(
        model.train,
        datamodule=splitter,
        accelerator="cpu",
        enable_progress_bar=False,
        logger=None,
        **STILL,
    )
    assert str(warning.message).startswith(f"{DEAD}2 ")
    assert list(model.dead_components_) == [2]


def test_queries_are_looked_at_too(make_adata, tmp_path):
    model = fit_with_dead(make_adata())
    query = make_adata(batches=("b7",), seed=3)
    mapped = MixSCVI.load_query_data(query, model, accelerator="cpu")
    assert deaths_told_of(train, mapped, **STILL)
    with pytest.warns(UserWarning, match="Do not cluster"):
        seeded(mapped.get_latent_representation)
