"""The last minibatch, and models on disk."""

import warnings

import numpy as np
import pytest
import scvi
import torch
from scvi.model import SCVI

from fitting import EARLY, SMALL, assert_same_state, fit, train
from mixscvi import MixSCVI


@pytest.mark.filterwarnings("ignore:Last batch will have a small size")
@pytest.mark.parametrize("n_components", [1, 3])
@pytest.mark.parametrize("kwargs", [{}, {"component_encoder": "amortized", "prior": "mog"}])
def test_a_last_minibatch_of_one_cell(n_components, kwargs, make_adata):
    adata = make_adata(n_obs=75)
    sizes = {"train_size": 65 / 75, "validation_size": 10 / 75, "batch_size": 32}
    model = fit(MixSCVI, adata, n_components=n_components, train_kwargs=sizes, **kwargs)
    assert len(model.train_indices) == 65
    assert model.trainer.global_step == 4
    assert np.isfinite(model.history["elbo_train"].to_numpy(dtype=float)).all()
    latent = model.get_latent_representation(batch_size=37)
    assert np.isfinite(latent).all()
    assert latent.shape == (75, 3)


def test_the_last_minibatch_is_looked_at_anew(make_adata):
    """A splitter may be asked for minibatches of other cells."""
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    model = MixSCVI(adata, n_components=2, **SMALL)
    splitter = model._data_splitter_cls(model.adata_manager, train_size=0.75, batch_size=32)
    splitter.setup()
    sizes = []
    for n_train in (65, 63):
        splitter.train_idx, splitter.n_train = np.arange(n_train), n_train
        sizes.append([len(batch["X"]) for batch in splitter.train_dataloader()])
    assert sizes == [[32, 32], [32, 31]]


@pytest.mark.filterwarnings("ignore:Last batch will have a small size")
def test_a_last_validation_minibatch_of_one_cell(make_adata):
    sizes = {"train_size": 39 / 72, "validation_size": 33 / 72, "batch_size": 32}
    model = fit(MixSCVI, make_adata(), n_components=3, train_kwargs={**sizes, **EARLY})
    assert len(model.validation_indices) == 33
    assert np.isfinite(model.history["elbo_validation"].to_numpy(dtype=float)).all()


def test_all_training_cells_are_used_otherwise(make_adata):
    sizes = {"train_size": 68 / 72, "validation_size": 4 / 72, "batch_size": 32}
    model = fit(MixSCVI, make_adata(), train_kwargs=sizes)
    assert model.trainer.global_step == 6


def test_save_and_overwrite(make_adata, tmp_path):
    adata = make_adata()
    model = fit(MixSCVI, adata, n_components=2)
    path = tmp_path / "deep" / "model"
    model.save(str(path))
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"dir_path .*model' already exists.*overwrite=True"):
        model.save(path)
    train(model, max_epochs=1)
    model.save(path, overwrite=True)
    assert (path / "notes.txt").read_text() == "mine"
    assert sorted(file.name for file in path.iterdir()) == ["model.pt", "notes.txt"]
    assert [file.name for file in path.parent.iterdir()] == ["model"]
    loaded = MixSCVI.load(path, adata=adata, accelerator="cpu")
    assert_same_state(loaded, model)
    model.save(path, overwrite=True, prefix="best_")
    loaded = MixSCVI.load(path, adata=adata, prefix="best_", accelerator="cpu")
    assert_same_state(loaded, model)


def test_a_saved_folder_has_the_usual_permissions(make_adata, tmp_path):
    model = fit(MixSCVI, make_adata(), n_components=2)
    model.save(tmp_path / "model")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_loaded_model_trains_on(make_adata, tmp_path):
    adata = make_adata()
    model = fit(MixSCVI, adata, n_components=3, prior="vamp", n_prior_components=4)
    model.save(tmp_path / "model")
    loaded = MixSCVI.load(tmp_path / "model", adata=adata, accelerator="cpu")
    for one in (model, loaded):
        scvi.settings.seed = 4
        train(one, max_epochs=1)
    assert_same_state(loaded, model)


def test_a_last_cell_trains_where_nothing_is_normalized(make_adata):
    """SCVI without batch norm takes a minibatch of one cell, so one component does."""
    adata = make_adata()
    train_kwargs = {
        "batch_size": 32,
        "datasplitter_kwargs": {
            "external_indexing": [np.arange(33), np.arange(33, adata.n_obs), np.arange(0)]
        },
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Last batch will have a small size")
        ours = fit(MixSCVI, adata, n_components=1, use_batch_norm="none", train_kwargs=train_kwargs)
        theirs = fit(SCVI, adata, use_batch_norm="none", train_kwargs=train_kwargs)
    got, expected = (model.history["elbo_train"].to_numpy(float) for model in (ours, theirs))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("n_components", [1, 2])
def test_checkpoints_that_are_none_of_this_training(n_components, make_adata, tmp_path):
    model = fit(MixSCVI, make_adata(), n_components=n_components)
    path = tmp_path / "last.ckpt"
    model.trainer.save_checkpoint(path)
    whole = torch.load(path, weights_only=False)
    other = MixSCVI(model.adata, n_components=3, **SMALL)
    with pytest.raises(ValueError, match=r"last\.ckpt' was tampered with, or is of another train"):
        train(other, ckpt_path=path)
    for contents in ({"weights": torch.ones(2)}, [1], {**whole, "state_dict": None}):
        torch.save(contents, path)
        with pytest.raises(ValueError, match=r"^ckpt_path='.*last\.ckpt' was tampered with"):
            train(MixSCVI(model.adata, n_components=n_components, **SMALL), ckpt_path=path)


def test_weights_that_are_no_numbers(make_adata, tmp_path):
    model = fit(MixSCVI, make_adata(), n_components=2)
    with torch.no_grad():
        model.module.px_r[3] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model)
    assert any(str(w.message).startswith("the trained model has") for w in caught)
    model.save(tmp_path, overwrite=True)
    with pytest.warns(UserWarning, match=r"model\.pt has .* weights that are NaN or infinite"):
        MixSCVI.load(tmp_path, model.adata)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda stored: stored.update(var_names=stored["var_names"][::-1]), r"var_names\[0\] is"),
        (lambda stored: stored["attr_dict"].update(is_trained_="no"), "is_trained_ is neither"),
    ],
)
def test_files_that_contradict_themselves(change, what, make_adata, tmp_path):
    model = fit(MixSCVI, make_adata(), n_components=2)
    model.save(tmp_path, overwrite=True)
    path = tmp_path / "model.pt"
    stored = torch.load(path, weights_only=False)
    change(stored)
    torch.save(stored, path)
    with pytest.raises(ValueError, match=rf"model\.pt .*{what}"):
        MixSCVI.load(tmp_path, model.adata)


@pytest.fixture(scope="module", params=[1, 2], ids=["A1", "A2"])
def model(request, make_adata):
    return fit(MixSCVI, make_adata(), n_components=request.param)


@pytest.mark.parametrize(
    ("given", "error", "what"),
    [
        ({"checkpoint_dir": 3}, TypeError, "checkpoint_dir must be a path, got 3"),
        ({"val_check_interval": 1_000}, ValueError, "val_check_interval=1000 must be a number of"),
        ({"val_check_interval": 2.5}, ValueError, "val_check_interval must be a finite number"),
    ],
)
def test_arguments_of_training(model, given, error, what):
    with pytest.raises(error, match=what):
        train(model, **given)


class NoModule:
    def train_dataloader(self):
        return []


@pytest.mark.parametrize("given", [NoModule(), 3, "folder", torch.nn.Linear(2, 2)])
def test_data_modules_that_are_none(model, given):
    with pytest.raises(TypeError, match="datamodule must be a LightningDataModule, got"):
        train(model, datamodule=given)
