"""Training that is killed and goes on ends with the weights of one that was not interrupted."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import anndata
import numpy as np
import pytest
import scvi
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from scvi.train import SaveCheckpoint

import killed_training
from fitting import assert_same_history, assert_same_state
from killed_training import CASES, TRAINED, make_model, train
from mixscvi import MixSCVI
from mixscvi.checkpoint_io import AtomicCheckpointIO
from mixscvi.model.identity import differences, training_identity


@pytest.fixture(autouse=True)
def quiet():
    """scvi-tools announces every semi-supervised training."""
    verbosity = scvi.settings.verbosity
    scvi.settings.verbosity = 40
    yield
    scvi.settings.verbosity = verbosity


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of trainings that were killed in their sixth epoch."""
    folder = tmp_path_factory.mktemp("killed")
    program = Path(killed_training.__file__)
    subprocess.run(
        [sys.executable, str(program), str(folder)],
        check=True,
        # As many threads as here, whatever other tests did to the environment: sums round by them.
        env=os.environ
        | {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_is_never_interrupted(name, killed, tmp_path, capsys):
    model_kwargs, train_kwargs = CASES[name]
    whole = train(make_model(**model_kwargs), tmp_path, **train_kwargs)
    after = torch.rand(3), np.random.rand(3)
    resumed = make_model(**model_kwargs)
    capsys.readouterr()
    train(resumed, killed / name, **train_kwargs)
    assert "training goes on after 4 of 7 epochs" in capsys.readouterr().out
    assert_same_state(resumed, whole)
    assert_same_history(resumed, whole)
    assert [file.name for file in (killed / name).iterdir()] == ["training.ckpt"]
    np.testing.assert_array_equal(resumed.train_indices, whole.train_indices)
    assert (torch.rand(3) == after[0]).all()
    assert (np.random.rand(3) == after[1]).all()


def trained(folder, *, max_epochs=3, **train_kwargs):
    kwargs = {"max_epochs": max_epochs, "check_val_every_n_epoch": 1, **train_kwargs}
    return train(make_model(n_components=2), folder, **kwargs)


def test_what_has_ended_is_restored_and_can_go_on(tmp_path, capsys):
    first = trained(tmp_path / "a")
    capsys.readouterr()
    restored = trained(tmp_path / "a")
    assert "finished after 3 epochs" in capsys.readouterr().out
    assert_same_state(restored, first)
    assert_same_history(restored, first)
    longer = trained(tmp_path / "a", max_epochs=5)
    assert_same_state(longer, trained(tmp_path / "b", max_epochs=5))
    with pytest.raises(ValueError, match="max_epochs must be at least 5, .* got 4"):
        trained(tmp_path / "a", max_epochs=4)


def test_early_stopping_stays_stopped(tmp_path, capsys):
    stopping = {"early_stopping": True, "early_stopping_patience": 1, "max_epochs": 20}
    stopping["early_stopping_min_delta"] = 1e9
    first = trained(tmp_path, **stopping)
    assert len(first.history["elbo_train"]) == 2
    restored = trained(tmp_path, **stopping)
    assert "this training stopped after 2 epochs" in capsys.readouterr().out
    assert_same_state(restored, first)
    assert_same_history(restored, first)


def test_interrupted_by_the_user_and_called_again(tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(loss):
        if model.module.training and len(seen) == 14:
            raise Interrupted
        seen.append(loss)

    seen, model = [], make_model(n_components=2)
    hook = model.module.register_forward_hook(lambda *_: interrupt(None))
    kwargs = {"max_epochs": 5, "check_val_every_n_epoch": 1}
    with pytest.raises(Interrupted):
        train(model, tmp_path / "a", **kwargs)
    hook.remove()
    train(model, tmp_path / "a", **kwargs)
    assert_same_state(model, trained(tmp_path / "b", max_epochs=5))


def test_without_a_seed_it_goes_on_as_it_began(tmp_path, monkeypatch):
    monkeypatch.setattr(scvi.settings, "_seed", None)

    def model(seed):
        made = make_model(n_components=2)
        monkeypatch.setattr(scvi.settings, "_seed", None)
        torch.manual_seed(2**40 + seed)  # as torch seeds itself
        with torch.no_grad():
            next(made.module.parameters()).add_(seed)
        return made

    first = train(model(1), tmp_path, max_epochs=4)
    longer = train(model(2), tmp_path, max_epochs=5)
    assert len(longer.history["elbo_train"]) == 5
    np.testing.assert_array_equal(longer.train_indices, first.train_indices)


def test_labels_chosen_in_an_epoch_are_those_of_a_training_not_interrupted(tmp_path):
    """A second training would choose others: they are drawn from numpy's random numbers."""
    kwargs = {"n_samples_per_label": 6, "check_val_every_n_epoch": 1}
    whole = train(make_model(labeled=True), tmp_path / "a", **kwargs)
    part = make_model(labeled=True)
    train(part, tmp_path / "b", **kwargs | {"max_epochs": 3})
    np.random.seed(5)
    resumed = make_model(labeled=True)
    train(resumed, tmp_path / "b", **kwargs)
    assert_same_state(resumed, whole)
    assert_same_history(resumed, whole)
    other = make_model(labeled=True)
    with pytest.raises(ValueError, match=r"train\(n_samples_per_label=\) is 6 there and 5 here"):
        train(other, tmp_path / "b", **kwargs | {"n_samples_per_label": 5})
    other.adata.obs["_scvi_labels"] = 0
    with pytest.raises(ValueError, match="data: labels is "):
        train(other, tmp_path / "b", **kwargs)


def _with_one_count_changed(model):
    model.adata.X[5, 3] += 1


def _with_one_weight_changed(model):
    with torch.no_grad():
        model.module.decoder.px_scale_decoder[0].bias[0] += 1


@pytest.mark.parametrize(
    ("change", "kwargs", "named"),
    [
        (_with_one_count_changed, {}, "data: X"),
        (_with_one_weight_changed, {}, "the starting weights"),
        (None, {"seed": 1}, "scvi.settings.seed is 0 there and 1 here"),
        (None, {"n_hidden": 13}, r"model\['n_hidden'\] is 12 there and 13 here"),
        (None, {"batch_size": 8}, r"train\(batch_size=\) is 16 there and 8 here"),
        (None, {"plan_kwargs": {"lr": 1e-2}}, r"train\(plan_kwargs=\)\['lr'\] is not given there"),
        (None, {"train_size": 0.5}, r"train\(train_size=\) is 0.75 there and 0.5 here"),
    ],
)
def test_checkpoints_of_other_trainings_are_refused(change, kwargs, named, tmp_path):
    trained(tmp_path)
    of_model = {k: kwargs.pop(k) for k in ("seed", "n_hidden") if k in kwargs}
    model = make_model(n_components=2, **of_model)
    if change is not None:
        change(model)
    with pytest.raises(ValueError, match=named) as refused:
        train(model, tmp_path, max_epochs=3, check_val_every_n_epoch=1, **kwargs)
    assert "training.ckpt is of another training" in str(refused.value)


def test_a_second_training_is_another_one(tmp_path):
    model = trained(tmp_path)
    with pytest.raises(ValueError, match="epochs trained before is 0 there and 3 here"):
        train(model, tmp_path, max_epochs=3, check_val_every_n_epoch=1)


class _Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the payload ran')",))


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def _damaged(path):
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
        values = archive.read(largest)
    content = bytearray(path.read_bytes())
    content[content.index(values) + len(values) // 2] ^= 255  # between records lie bytes unused
    path.write_bytes(content)


def _with_payload(path):
    torch.save(torch.load(path, weights_only=True) | {"epoch": _Payload()}, path)


def _of_something_else(path):
    torch.save({"weights": torch.ones(2)}, path)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_truncated, "is truncated, or no checkpoint"),
        (_damaged, "is damaged at its record"),
        (_with_payload, "holds Python objects"),
        (_of_something_else, "is not a checkpoint of a training"),
    ],
)
def test_spoiled_files_are_named(spoil, named, tmp_path):
    trained(tmp_path)
    spoil(tmp_path / "training.ckpt")
    with pytest.raises(ValueError, match=f"training.ckpt {named}"):
        trained(tmp_path)


def _without(*path):
    def spoil(values):
        for name in path[:-1]:
            values = values[name]
        del values[path[-1]]

    return spoil


def _with_other(value, *path):
    def spoil(values):
        for name in path[:-1]:
            values = values[name]
        values[path[-1]] = value

    return spoil


def _with_moments(change):
    def spoil(values):
        for state in values["optimizer_states"][0]["state"].values():
            state.update({name: change(state[name]) for name in ("exp_avg", "exp_avg_sq")})

    return spoil


OURS = ("mixscvi", "values")
OPTIONS = ("optimizer_states", 0, "param_groups", 0)
COUNTED = (*OURS, "loops", "fit_loop", "epoch_progress")
TAMPERED = {
    # With the strides of their parameters: the kernel would write beyond their ends.
    "smaller moments": (
        _with_moments(lambda value: torch.zeros((1, *value.shape[1:]))),
        "exp_avg of an optimizer must be dense, real and of shape",
    ),
    "moments that are none": (_with_moments(lambda _: "x"), "exp_avg of an optimizer must be a"),
    "betas": (_with_other((0.9, 0.9, 0.9), *OPTIONS, "betas"), "betas of an optimizer must be"),
    "eps": (_with_other([1], *OPTIONS, "eps"), "eps of an optimizer must be like"),
    "lr": (_with_other(float("nan"), *OPTIONS, "lr"), "lr of an optimizer must be like"),
    "amsgrad": (_with_other(True, *OPTIONS, "amsgrad"), "optimizer lacks max_exp_avg_sq"),
    "fused": (_with_other("x", *OPTIONS, "fused"), "fused of an optimizer must be like True"),
    "epochs of loops": (
        _with_other("x", *COUNTED, "total", "completed"),
        "epoch_progress.total.completed must be a number of things, got 'x'",
    ),
    "fewer than none": (
        _with_other(-1, *COUNTED, "current", "ready"),
        "epoch_progress.current.ready must be a number of things, got -1",
    ),
    "no identity": (_without(*OURS, "identity"), "KeyError: 'it lacks identity'"),
    "no loops": (_without(*OURS, "loops"), "it lacks loops"),
    "epochs a text": (_with_other("3", *OURS, "epochs"), "TypeError: epochs is '3'"),
    "a flag of several": (_with_other(torch.ones(3), *OURS, "stopped"), "TypeError: stopped is"),
    "a version of several": (_with_other(torch.ones(3), "mixscvi", "format"), "RuntimeError"),
    "split a number": (_with_other(3, *OURS, "split"), "TypeError"),
    "no random numbers": (_with_other([], *OURS, "random"), "IndexError"),
    "no weights": (_without("state_dict"), "training cannot go on .*KeyError: 'state_dict'"),
    "other weights": (
        lambda values: values["state_dict"].update({"module.px_r": torch.ones(3)}),
        "training cannot go on .*size mismatch for module.px_r",
    ),
    "no optimizer": (_with_other([], "optimizer_states"), "it has 0 optimizer_states, expected 1"),
    "another optimizer": (
        _with_other([], "optimizer_states", 0, "param_groups"),
        "training cannot go on",
    ),
}


@pytest.mark.parametrize(("spoil", "named"), TAMPERED.values(), ids=TAMPERED)
def test_tampered_files_are_named(spoil, named, tmp_path):
    trained(tmp_path)
    path = tmp_path / "training.ckpt"
    stored = torch.load(path, weights_only=True)
    spoil(stored)
    torch.save(stored, path)
    with pytest.raises(ValueError, match=f"training.ckpt .*tampered with.*{named}"):
        trained(tmp_path, max_epochs=4)


def test_errors_of_the_training_itself_are_left_alone(tmp_path):
    trained(tmp_path)
    model = make_model(n_components=2)
    model.module.register_forward_hook(lambda *_: {}["nothing"])
    with pytest.raises(KeyError, match="nothing") as found:
        train(model, tmp_path, max_epochs=4, check_val_every_n_epoch=1)
    (note,) = found.value.__notes__
    assert f"training went on from {tmp_path / 'training.ckpt'}, which may be damaged" in note
    model = make_model(n_components=2)
    model.module.register_forward_hook(lambda *_: {}["nothing"])
    with pytest.raises(KeyError, match="nothing") as found:
        train(model, tmp_path / "anew", max_epochs=4, check_val_every_n_epoch=1)
    assert not hasattr(found.value, "__notes__")


class OwnAdam(torch.optim.Adam):
    """Somebody's own: with an option that is a text, and a count for each parameter."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.defaults["mode"] = "fast"

    def step(self, closure=None):
        loss = super().step(closure)
        for state in self.state.values():
            state["count"] = state.get("count", 0) + 1
        return loss


def in_groups(parameters):
    first, *others = parameters
    return torch.optim.Adam([{"params": [first], "foreach": False}, {"params": others}], lr=0.01)


def with_tensors(parameters):
    betas = torch.tensor(0.9), torch.tensor(0.999)
    return torch.optim.Adam(parameters, betas=betas, foreach=False)


def with_numpy(parameters):
    return torch.optim.Adam(parameters, lr=np.array(0.01), amsgrad=np.bool_(True))


HONEST = {
    "numpy": {"lr": np.float64(0.01), "weight_decay": np.int64(0)},
    "extended": {"lr": np.longdouble(0.01)},
    "numpy's own": {"optimizer": "Custom", "optimizer_creator": with_numpy},
    "tensors": {"optimizer": "Custom", "optimizer_creator": with_tensors},
    "own": {"optimizer": "Custom", "optimizer_creator": lambda p: OwnAdam(p, lr=0.01)},
    "groups": {"optimizer": "Custom", "optimizer_creator": in_groups},
}


@pytest.mark.parametrize("plan", HONEST.values(), ids=HONEST)
def test_optimizers_that_are_given_back(plan, tmp_path):
    options = {"plan_kwargs": plan, "early_stopping": True}
    options["early_stopping_patience"] = np.int64(30)
    whole = make_model(n_components=2)
    train(whole, tmp_path / "whole", max_epochs=np.int64(4), batch_size=np.int64(16), **options)
    options["batch_size"] = 16
    train(make_model(n_components=2), tmp_path / "part", max_epochs=2, **options)
    resumed = make_model(n_components=2)
    train(resumed, tmp_path / "part", max_epochs=4, **options)
    assert_same_state(resumed, whole)


@pytest.mark.parametrize("patience", [float("inf"), 2.0])
def test_patience_may_be_any_number(patience, tmp_path):
    def options():  # a callback is of one training
        callback = EarlyStopping("elbo_validation", patience=patience)
        return {"callbacks": [callback], "check_val_every_n_epoch": 1}

    whole = make_model(n_components=2)
    train(whole, tmp_path / "whole", max_epochs=4, **options())
    train(make_model(n_components=2), tmp_path / "part", max_epochs=2, **options())
    resumed = make_model(n_components=2)
    train(resumed, tmp_path / "part", max_epochs=4, **options())
    assert_same_state(resumed, whole)


def test_early_stopping_that_remembers_no_number_is_named(tmp_path):
    options = {"early_stopping": True, "early_stopping_patience": 50}
    trained(tmp_path, **options)
    path = tmp_path / "training.ckpt"
    stored = torch.load(path, weights_only=True)
    (theirs,) = (v for key, v in stored["callbacks"].items() if "Stopping" in key)
    theirs["best_score"] = None
    torch.save(stored, path)
    with pytest.raises(ValueError, match="training.ckpt .*best_score of early stopping must be"):
        trained(tmp_path, max_epochs=4, **options)
    usual = {name: kwarg for name, kwarg in TRAINED.items() if name != "checkpoint_every"}
    with pytest.raises(ValueError, match="ckpt_path.*best_score of early stopping must be"):
        make_model(n_components=2).train(**{**usual, "max_epochs": 4, "ckpt_path": path, **options})


def test_smaller_moments_of_a_checkpoint_of_lightning_are_named(tmp_path):
    usual = {name: kwarg for name, kwarg in TRAINED.items() if name != "checkpoint_every"}
    trained(tmp_path)
    path = tmp_path / "training.ckpt"
    stored = torch.load(path, weights_only=True)
    _with_moments(lambda value: torch.zeros((1, *value.shape[1:])))(stored)
    torch.save(stored, path)
    with pytest.raises(ValueError, match="ckpt_path=.*exp_avg of an optimizer must be dense"):
        make_model(n_components=2).train(**{**usual, "max_epochs": 4, "ckpt_path": path})


def test_misuse_is_named(tmp_path):
    model = make_model(n_components=2)
    with pytest.raises(ValueError, match="checkpoint_every=2 needs checkpoint_dir"):
        train(model, None)
    with pytest.raises(ValueError, match="checkpoint_every"):
        train(model, tmp_path, checkpoint_every=0)
    with pytest.raises(ValueError, match="ckpt_path='x', got both"):
        train(model, tmp_path, ckpt_path="x")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="is a file: choose a folder"):
        train(model, file)


def test_checkpoints_change_nothing(tmp_path):
    model = make_model(n_components=2)
    options = {k: v for k, v in killed_training.TRAINED.items() if k != "checkpoint_every"}
    model.train(**options, check_val_every_n_epoch=1)
    assert_same_state(trained(tmp_path, max_epochs=7), model)


def test_data_on_disk_are_told_apart_by_some_of_their_cells(tmp_path, make_adata):
    path = tmp_path / "cells.h5ad"
    make_adata(sparse=True).write_h5ad(path)

    def identity():
        adata = anndata.read_h5ad(path, backed="r")
        MixSCVI.setup_anndata(adata)
        found = training_identity(MixSCVI(adata, n_components=2), {}, None)
        adata.file.close()
        return found

    first = identity()
    assert differences(first, identity()) == []
    changed = make_adata(sparse=True)
    changed.X[5, 3] += 1
    changed.write_h5ad(path)
    (difference,) = differences(first, identity())
    assert difference.startswith("data: X is ")


REFUSED = {
    "precision": ({"precision": "64-true"}, "precision='64-true' would go on from others"),
    "reloaded": ({"reload_dataloaders_every_n_epochs": 2}, "reload_dataloaders_every_n_epochs=2"),
    "averages": (
        {"callbacks": [StochasticWeightAveraging(1e-3)]},
        "StochasticWeightAveraging are in no checkpoint",
    ),
}


@pytest.mark.parametrize(("kwargs", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_could_not_be_resumed_is_refused(kwargs, expected, tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match=expected):
        train(model, tmp_path / "run", **kwargs)
    assert not (tmp_path / "run").exists()


def test_folders_that_cannot_be_written_to_are_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("it trains"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="checkpoint_dir must be a folder"):
        train(make_model(), tmp_path / "file" / "below")

    def refuse(*_, **__):
        raise PermissionError("read-only file system")

    monkeypatch.setattr("mixscvi.model.checkpoints.write_beside", refuse)
    with pytest.raises(OSError, match="checkpoint_dir .* cannot be written to: read-only"):
        train(make_model(), tmp_path / "run")


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    checkpoints, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    checkpoints.save_checkpoint({"a": 1}, path)

    def fail(_, beside):
        Path(beside).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"last\.ckpt could not be written, is the disk full"):
        checkpoints.save_checkpoint({"a": 2}, path)
    assert checkpoints.load_checkpoint(path) == {"a": 1}
    assert [*tmp_path.iterdir()] == [path]


class Payload:
    """What a crafted file holds: unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")
@pytest.mark.parametrize("given", ["checkpoint_dir", "ckpt_path"])
def test_a_checkpoint_cannot_send_a_callback_to_other_files(given, tmp_path):
    """scvi-tools' SaveCheckpoint reads the best model with pickle, and deletes what it was."""

    def keep_the_best():
        folder = str(tmp_path / "best")
        return SaveCheckpoint(dirpath=folder, monitor="elbo_validation", load_best_on_end=True)

    options = {"check_val_every_n_epoch": 1}
    train(make_model(), tmp_path / "run", callbacks=[keep_the_best()], max_epochs=2, **options)
    path = tmp_path / "run" / "training.ckpt"
    state = torch.load(path, weights_only=True)
    (theirs,) = (value for key, value in state["callbacks"].items() if "SaveCheckpoint" in key)
    (tmp_path / "sent").mkdir()
    torch.save(Payload(tmp_path / "ran"), tmp_path / "sent" / "model.pt")
    theirs["best_model_path"] = str(tmp_path / "sent")
    theirs["best_model_score"] = theirs["current_score"] = torch.tensor(-1e9)
    torch.save(state, path)
    usual = {name: kwarg for name, kwarg in TRAINED.items() if name != "checkpoint_every"}
    kwargs = {**usual, **options, "max_epochs": 4, given: path.parent}
    if given == "ckpt_path":
        kwargs[given] = path
    with pytest.raises(ValueError, match="sent', which is not in .*, the folder of SaveCheckpoint"):
        make_model().train(callbacks=[keep_the_best()], **kwargs)
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "sent" / "model.pt").exists()
