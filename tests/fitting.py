"""How the tests of MixSCVI train small models and compare them."""

import numpy as np
import pandas as pd
import scvi
import torch

SMALL = {"n_hidden": 12, "n_latent": 3}


COVARIATES = {
    "batch_key": "batch",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age", "depth"],
}


BATCH = {"batch_key": "batch"}


def train(model, **kwargs):
    defaults = {"max_epochs": 2, "batch_size": 32, "train_size": 0.75}
    model.train(**{**defaults, **kwargs}, accelerator="cpu", enable_progress_bar=False, logger=None)
    return model


def fit(cls, adata, setup=None, *, seed=0, train_kwargs=None, **model_kwargs):
    """Register, make and train a model from one seed."""
    cls.setup_anndata(adata, **(setup or {}))
    scvi.settings.seed = seed
    model = cls(adata, **{**SMALL, **model_kwargs})
    return train(model, **(train_kwargs or {}))


def seeded(function, *args, seed=1, **kwargs):
    scvi.settings.seed = seed
    return function(*args, **kwargs)


def assert_same_history(one, other):
    assert set(one.history) == set(other.history)
    assert {"elbo_train", "elbo_validation", "validation_loss"} <= set(one.history)
    for key, values in one.history.items():
        assert np.isfinite(values.to_numpy(dtype=float)).all(), key
        pd.testing.assert_frame_equal(values, other.history[key], check_exact=True)


def assert_same_state(one, other):
    expected = other.module.state_dict()
    assert list(one.module.state_dict()) == list(expected)
    for name, value in one.module.state_dict().items():
        assert torch.equal(value, expected[name]), f"{name}: {value} is not {expected[name]}"


EARLY = {"early_stopping": True, "early_stopping_patience": 5}


LEARN = {"max_epochs": 20, "plan_kwargs": {"lr": 2e-2, "n_epochs_kl_warmup": 1}}


WORKING = {
    "three components": {},
    "mog, flow": {"prior": "mog", "n_flow_steps": 1},
    "vamp": {"prior": "vamp", "n_prior_components": 5},
}


def rewrite(folder, change):
    """Change the plain contents of a model's file."""
    stored = torch.load(folder / "model.pt", weights_only=True)
    change(stored)
    torch.save(stored, folder / "model.pt")
