"""Saving a model is one step: whatever interrupts it, one whole model is there."""

import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest

from fitting import assert_same_state, fit, rewrite
from mixscvi import MixSCVI
from mixscvi.model import files
from mixscvi.model.files import read_model


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def two_models(make_adata):
    one = fit(MixSCVI, make_adata(), n_components=2)
    other = fit(MixSCVI, make_adata(seed=1), n_components=2, seed=5)
    return one, other


def test_a_full_disk_is_named_and_leaves_the_old_model(two_models, tmp_path, monkeypatch):
    one, other = two_models
    target = tmp_path / "model"
    one.save(target, save_anndata=True)
    old = contents(target)

    def full(*args, **kwargs):
        raise OSError(28, "Can't write data")  # as HDF5 says it, without a name

    with monkeypatch.context() as patch:
        patch.setattr("anndata.io.write_h5ad", full)
        with pytest.raises(OSError, match="model could not be written, is the disk full"):
            other.save(target, save_anndata=True, overwrite=True)
    assert contents(target) == old
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("at", ["model", "data"])
def test_an_interrupted_save_leaves_the_old_model(at, two_models, tmp_path, monkeypatch):
    one, other = two_models
    target = tmp_path / "model"
    one.save(target, save_anndata=True)
    (target / "notes.txt").write_text("mine")
    old = contents(target)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if at == "model":
            patch.setattr(files, "to_plain", interrupted)
        else:
            patch.setattr("anndata.io.write_h5ad", interrupted)
        for path in (target, tmp_path / "new"):
            with pytest.raises(KeyboardInterrupt):
                other.save(path, overwrite=True, save_anndata=True)
    assert contents(target) == old
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    other.save(target, overwrite=True, save_anndata=True)
    assert (target / "notes.txt").read_text() == "mine"
    assert_same_state(MixSCVI.load(target, accelerator="cpu"), other)


def killed_at(step, save):
    """Save in a process that is killed at its `step`-th change of a file's place."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        return os.WIFSIGNALED(status)
    count = 0
    replace, rename = Path.replace, Path.rename

    def counting(move):
        def moved(self, to):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return move(self, to)

        return moved

    Path.replace, Path.rename = counting(replace), counting(rename)
    try:
        save()
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process of its own")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_killed_save_leaves_one_whole_model(step, two_models, tmp_path):
    one, other = two_models
    target = tmp_path / "model"
    one.save(target, save_anndata=True)
    killed = killed_at(step, lambda: other.save(target, overwrite=True, save_anndata=True))
    assert killed == (step < 3)
    expected = one if step == 1 else other
    loaded = MixSCVI.load(target, accelerator="cpu")
    assert_same_state(loaded, expected)
    np.testing.assert_array_equal(loaded.adata.X, expected.adata.X)
    other.save(target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = MixSCVI.load(target, accelerator="cpu")
    np.testing.assert_array_equal(loaded.adata.X, expected.adata.X)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process of its own")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_first_save_that_is_killed_leaves_nothing(two_models, tmp_path):
    one, _ = two_models
    assert killed_at(1, lambda: one.save(tmp_path / "model"))
    assert not (tmp_path / "model").exists()
    one.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_process_that_saves_is_left_alone(two_models, tmp_path):
    one, _ = two_models
    target = tmp_path / "model"
    with files.staged(target) as live:
        one.save(target)
        assert live.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_data_are_looked_for_beside_the_model_alone(two_models, tmp_path):
    one, other = two_models
    one.save(tmp_path / "model", save_anndata=True)
    other.save(tmp_path / "secret", save_anndata=True)
    rewrite(tmp_path / "model", lambda s: s["mixscvi"].update(data_id="../secret"))
    stored = read_model(tmp_path / "model")
    assert files.data_file(stored, None) == tmp_path / "model" / "adata.h5ad"
    with pytest.raises(ValueError, match="holds none"):
        MixSCVI.load(tmp_path / "model", adata=False).save(tmp_path / "x", save_anndata=True)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # Lightning's, when read
@pytest.mark.parametrize("n_components", [1, 2])
def test_a_trained_model_can_be_pickled(make_adata, n_components):
    model = fit(MixSCVI, make_adata(), n_components=n_components)
    again = pickle.loads(pickle.dumps(model))
    assert_same_state(again, model)
    latents = (one.get_latent_representation() for one in (again, model))
    np.testing.assert_array_equal(*latents)
