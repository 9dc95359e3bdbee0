"""The lean training plan gives the updates and the history of scvi-tools' own."""

import numpy as np
import pytest
import torch
from scvi.train import TrainingPlan

from fitting import fit
from mixscvi import MixSCVI
from mixscvi.model.training import LeanTrainingPlan

PLANS = {
    "defaults": {},
    "warm-up in epochs": {"plan_kwargs": {"n_epochs_kl_warmup": 2}},
    "warm-up in steps": {"plan_kwargs": {"n_epochs_kl_warmup": None, "n_steps_kl_warmup": 3}},
    "AdamW": {"plan_kwargs": {"optimizer": "AdamW", "weight_decay": 0.1}},
    "every step": {"plan_kwargs": {"on_step": True}},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.5},
    "plateau": {"plan_kwargs": {"reduce_lr_on_plateau": True, "lr_patience": 1}},
    "stopped within an epoch": {"max_steps": 3},
    "logged often": {"log_every_n_steps": 1},
}


class _WithTheirPlan(MixSCVI):
    _training_plan_cls = TrainingPlan


@pytest.mark.parametrize("kwargs", PLANS.values(), ids=PLANS)
def test_history_and_weights_are_those_of_scvi_tools_plan(kwargs, make_adata):
    adata = make_adata()
    train_kwargs = {"max_epochs": 4, "check_val_every_n_epoch": 1, **kwargs}
    ours = fit(MixSCVI, adata, n_components=2, train_kwargs=train_kwargs)
    theirs = fit(_WithTheirPlan, adata, n_components=2, train_kwargs=train_kwargs)
    assert type(ours.trainer.lightning_module) is LeanTrainingPlan
    assert type(theirs.trainer.lightning_module) is TrainingPlan
    assert set(ours.history) == set(theirs.history)
    for key, values in ours.history.items():
        expected = theirs.history[key]
        assert values.index.equals(expected.index), key
        got, expected = (frame.to_numpy(dtype=float) for frame in (values, expected))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=key)
    state = theirs.module.state_dict()
    for name, value in ours.module.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5, msg=name)


def test_optimizers_of_the_users_own(make_adata):
    plan = {"optimizer": "Custom", "optimizer_creator": lambda p: torch.optim.SGD(p, lr=1e-6)}
    model = fit(MixSCVI, make_adata(), n_components=2, train_kwargs={"plan_kwargs": plan})
    assert type(model.trainer.optimizers[0]) is torch.optim.SGD


def test_adam_is_fused(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2)
    (optimizer,) = model.trainer.optimizers
    assert optimizer.defaults["fused"]


@pytest.mark.filterwarnings("ignore:Extra tracked metrics")  # scvi-tools 1.5 says so of its own
def test_autotune_payload_is_kept(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2, extra_payload_autotune=True)
    assert np.isfinite(model.history["elbo_train"].to_numpy(dtype=float)).all()


@pytest.mark.parametrize("n_components", [1, 3])
@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_weights_come_back_in_single_precision(precision, n_components, make_adata):
    """Lightning leaves them as it trained them, in which methods could not use them."""
    model = fit(
        MixSCVI,
        make_adata(),
        n_components=n_components,
        train_kwargs={"max_epochs": 1, "precision": precision},
    )
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(float(model.get_elbo()))
