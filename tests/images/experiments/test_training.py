import csv
import json
import sys
import warnings
from dataclasses import replace

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator

from image_runs import of_version_1
from mixscvi.images import ImageData, MixtureConfig, RunConfig, build, load_run, train
from mixscvi.images.experiments.training import ImageTraining, _Recorder
from mixscvi.images.experiments.weights import weights_hash
from mixscvi.images.files import content_hash


@pytest.fixture(scope="module")
def data() -> ImageData:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 130)
    images = 0.1 + 0.8 * (np.arange(6)[:, None] < 3) * np.ones((6, 6))
    gray = np.where(labels[:, None, None] == 1, images, 1 - images)
    return ImageData.from_arrays(gray, labels, n_validation=20, n_test=10)


def config_of(preset="vanilla", n_components=3, *, max_epochs=4, **kwargs) -> RunConfig:
    return RunConfig.from_preset(
        preset,
        budget="smoke",
        n_components=n_components,
        training={"max_epochs": max_epochs, "warmup_epochs": min(2, max_epochs)},
        **kwargs,
    )


def weights(path):
    return torch.load(path, weights_only=True)


class Killed(RuntimeError):
    """Raised instead of a kill."""


@pytest.mark.parametrize(
    ("preset", "kwargs"),
    [
        ("vanilla", {"estimator": "some_to_all", "n_sampled": 2}),
        ("composite", {"component_encoder": "shifted"}),
    ],
)
@pytest.mark.parametrize("when", ["on_train_epoch_start", "training_step", "on_train_epoch_end"])
@pytest.mark.usefixtures("first_layer")
def test_resumed_is_uninterrupted(tmp_path, data, monkeypatch, preset, kwargs, when):
    config = config_of(preset, **kwargs)
    train(config, tmp_path / "whole", data=data)

    owner = _Recorder if when == "on_train_epoch_end" else ImageTraining
    original = getattr(owner, when)

    def kill_in_the_third_epoch(self, *args):
        module = self if owner is ImageTraining else args[1]
        if module.current_epoch == 2 and (when != "training_step" or args[1] == 1):
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(owner, when, kill_in_the_third_epoch)
    with pytest.raises(Killed):
        train(config, tmp_path / "killed", data=data)
    monkeypatch.undo()
    assert not (tmp_path / "killed" / "summary.json").exists()
    train(config, tmp_path / "killed", data=data, resume=True)

    for name in ("log.csv", "summary.json", "config.json"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()
    whole, killed = weights(tmp_path / "whole/best.pt"), weights(tmp_path / "killed/best.pt")
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    last = [weights(tmp_path / run / "last.ckpt")["state_dict"] for run in ("whole", "killed")]
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])


@pytest.mark.parametrize("preset", ["vanilla", "hierarchical"])
@pytest.mark.usefixtures("first_layer")
def test_runs_of_earlier_versions_are_read_and_resumed(tmp_path, data, monkeypatch, preset):
    config = config_of(preset, max_epochs=2)
    whole = train(config, tmp_path / "whole", data=data)
    end_of_epoch = _Recorder.on_train_epoch_end

    def kill_in_the_second_epoch(self, trainer, pl_module):
        if pl_module.current_epoch == 1 and self.folder.name == "run":
            raise Killed
        end_of_epoch(self, trainer, pl_module)

    monkeypatch.setattr(_Recorder, "on_train_epoch_end", kill_in_the_second_epoch)
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        train(config, folder, data=data)
    monkeypatch.undo()

    checkpoint = weights(folder / "last.ckpt")
    moments = checkpoint["optimizer_states"][0]["state"]
    for i, (name, _) in enumerate(build(config, data.image_shape).named_parameters()):
        if name.endswith("trunk.layers.0.weight"):
            for key in ("exp_avg", "exp_avg_sq"):
                moments[i][key] = moments[i][key].permute(2, 0, 1).contiguous()
    of_version_1(checkpoint["state_dict"])
    torch.save(checkpoint, folder / "last.ckpt")
    resumed = train(config, folder, data=data, resume=True)
    assert weights_hash(resumed) == weights_hash(whole)
    moments = weights(folder / "last.ckpt")["optimizer_states"][0]["state"]
    for i, parameter in enumerate(whole.parameters()):
        assert moments[i]["exp_avg"].shape == moments[i]["exp_avg_sq"].shape == parameter.shape
    assert (folder / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()

    best = of_version_1(weights(folder / "best.pt"))
    torch.save(best, folder / "best.pt")
    _, loaded = load_run(folder)
    for ours, theirs in zip(loaded.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    # An evaluation of these weights is still known to be of them.
    assert weights_hash(loaded) == content_hash(*(value.numpy() for value in best.values()))


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the payload ran')",))


@pytest.mark.parametrize("spoil", ["truncated", "holds Python objects"])
def test_spoiled_checkpoints_are_named_and_run_nothing(tmp_path, data, spoil):
    config = config_of(max_epochs=1)
    train(config, tmp_path, data=data)
    (tmp_path / "summary.json").unlink()
    last = tmp_path / "last.ckpt"
    if spoil == "truncated":
        last.write_bytes(last.read_bytes()[:-100])
    else:
        torch.save(weights(last) | {"epoch": Payload()}, last)
    with pytest.raises(ValueError, match=f"last.ckpt .*{spoil}"):
        train(config, tmp_path, data=data, resume=True)


def test_training_improves_and_is_logged(tmp_path, data):
    config = config_of(max_epochs=30)
    config = replace(config, training=replace(config.training, learning_rate=1e-2))
    model = train(config, tmp_path, data=data)
    assert not model.training
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["kl_weight"]) for row in rows[:3]] == [0.5, 1.0, 1.0]
    bounds = [float(row["validation_bound"]) for row in rows]
    assert max(bounds) > bounds[0] + 5
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best_validation_bound"] == max(bounds)
    assert summary["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert sum(summary["parameters"].values()) == 2 * summary["parameters"]["total"]
    assert not list(tmp_path.glob("*partial*"))


def test_early_stopping_counts_from_the_end_of_the_warm_up(tmp_path, data):
    config = config_of(max_epochs=50)
    training = replace(config.training, learning_rate=0.0, patience=3, warmup_epochs=5)
    train(replace(config, training=training), tmp_path, data=data)
    # The bound of epoch 5 is the best; three epochs follow.
    assert json.loads((tmp_path / "summary.json").read_text())["epochs"] == 8


def test_a_run_that_was_stopped_early_does_not_go_on(tmp_path, data):
    """Killed between its last epoch and its summary."""
    config = config_of(max_epochs=50)
    training = replace(config.training, learning_rate=0.0, patience=3, warmup_epochs=5)
    config = replace(config, training=training)
    train(config, tmp_path, data=data)
    names = ("summary.json", "log.csv")
    whole = [(tmp_path / name).read_text() for name in names]
    (tmp_path / "summary.json").unlink()
    train(config, tmp_path, data=data, resume=True)
    assert [(tmp_path / name).read_text() for name in names] == whole


def test_a_run_without_a_finite_bound_is_not_finished(tmp_path, data):
    config = config_of(max_epochs=1)
    config = replace(config, training=replace(config.training, learning_rate=float("inf")))
    with pytest.raises(FloatingPointError, match="never finite: lower the learning rate"):
        train(config, tmp_path, data=data)
    assert not (tmp_path / "summary.json").exists()


def test_the_kl_weight_rises_to_one_and_does_not_touch_the_validation(tmp_path, data, monkeypatch):
    """Every bound of a run, as it is asked for."""
    seen = []
    original = ImageTraining.bound

    def bound(self, x, *, beta=1.0, **kwargs):
        seen.append((self.training, beta))
        return original(self, x, beta=beta, **kwargs)

    monkeypatch.setattr(ImageTraining, "bound", bound)
    config = config_of(max_epochs=6)
    train(replace(config, training=replace(config.training, warmup_epochs=4)), tmp_path, data=data)
    assert list(dict.fromkeys(beta for training, beta in seen if training)) == [0.25, 0.5, 0.75, 1]
    assert {beta for training, beta in seen if not training} == {1.0}


def test_a_training_within_the_warm_up_is_warned_of(tmp_path, data):
    config = config_of(max_epochs=1)
    config = replace(config, training=replace(config.training, warmup_epochs=4))
    with pytest.warns(UserWarning, match="1 epochs ends within the warm-up.*4 epochs"):
        train(config, tmp_path, data=data)
    with warnings.catch_warnings():  # nor is one that is refused
        warnings.simplefilter("error")
        with pytest.raises(FileExistsError):
            train(config, tmp_path, data=data)
    (row,) = csv.DictReader((tmp_path / "log.csv").read_text().splitlines())
    assert float(row["kl_weight"]) == 0.25


def test_big_iwae_is_trained_by_the_importance_weighted_bound(data):
    config = config_of(n_components=5, objective="iwae")
    training = ImageTraining(build(config, data.image_shape), config, data)
    x, generator = data.validation[:4], torch.Generator()
    actual = training.bound(x, beta=0.5, generator=generator.manual_seed(1))
    draws = training.model.draw(x, 5, generator=generator.manual_seed(1))
    assert draws.z.shape[:3] == (5, 4, 1)
    log_likelihood = training.model.decoder.log_prob(x, draws.z)
    log_weights = log_likelihood + 0.5 * (draws.log_prior - draws.own_log_prob)
    expected = log_weights.double().squeeze(-1).exp().mean(0).log().float()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("control", [{"objective": "iwae"}, {"ensemble": True}])
def test_controls_resume_as_uninterrupted(tmp_path, data, monkeypatch, control):
    config = config_of("composite", **control)
    train(config, tmp_path / "whole", data=data)
    original = ImageTraining.training_step

    def kill_in_the_third_epoch(self, *args):
        if self.current_epoch == 2 and self.config == config:
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(ImageTraining, "training_step", kill_in_the_third_epoch)
    with pytest.raises(Killed):
        train(config, tmp_path / "killed", data=data)
    monkeypatch.undo()
    train(config, tmp_path / "killed", data=data, resume=True)
    whole, killed = weights(tmp_path / "whole/best.pt"), weights(tmp_path / "killed/best.pt")
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_a_run_is_never_overwritten(tmp_path, data):
    config = config_of(max_epochs=1)
    train(config, tmp_path, data=data)
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="finished run"):
            train(config, tmp_path, data=data, resume=resume)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(FileExistsError, match="unfinished run: resume it"):
        train(config, tmp_path, data=data)
    with pytest.raises(ValueError, match="another configuration"):
        train(replace(config, seed=1), tmp_path, data=data, resume=True)


@pytest.mark.usefixtures("first_layer")
def test_same_seed_same_run(tmp_path, data):
    config = config_of(max_epochs=2)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)  # the global generator has no say
        train(replace(config, seed=seed), tmp_path / name, data=data)
    a, b, c = ((tmp_path / name / "log.csv").read_text() for name in "abc")
    assert a == b and a != c


def test_weights_of_another_model_are_refused(tmp_path, data):
    train(config_of(max_epochs=1), tmp_path, data=data)
    best = weights(tmp_path / "best.pt")
    name = "encoder.trunk.layers.0.weight"
    torch.save(best | {name: best[name].permute(1, 2, 0)}, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="best.pt does not fit the model.*another version"):
        load_run(tmp_path)


def test_weights_by_feature_are_updated_where_they_lie(data, monkeypatch):
    """By the fused kernel, which would copy what is not contiguous."""
    config, seen = config_of(), []
    training = ImageTraining(build(config, data.image_shape), config, data)
    optimizer = training.configure_optimizers()
    adam = sys.modules["torch.optim.adam"]
    monkeypatch.setattr(adam, "_fused_adam", lambda *lists, **kwargs: seen.extend(lists[:3]))
    training.bound(data.validation).mean().backward()
    optimizer.step()
    assert not training.model.encoder.trunk.layers[0].weight.is_contiguous()
    assert len(seen) == 3 and all(tensor.is_contiguous() for part in seen for tensor in part)


def test_load_run_needs_a_finished_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        load_run(tmp_path)


def test_vamp_prior_starts_at_training_images(tmp_path, data):
    config = config_of("vamp", max_epochs=1)
    config = replace(config, training=replace(config.training, learning_rate=0.0))
    pseudo = train(config, tmp_path, data=data).prior.pseudo_inputs()
    distance = (pseudo[:, None] - (0.05 + 0.9 * data.train[None])).abs().amax((-3, -2, -1))
    assert distance.amin(1).max() < 1e-5


@pytest.mark.parametrize("preset", ["vanilla", "composite"])
def test_ensemble_trains_components_against_a_frozen_decoder(tmp_path, data, preset):
    config = config_of(preset, n_components=2, max_epochs=2, ensemble=True)
    model = train(config, tmp_path, data=data)
    _, alone = load_run(tmp_path / "alone")
    for name in ("decoder", "prior", "lower_prior", "flows"):
        part, frozen = getattr(model, name), getattr(alone, name)
        if part is not None:
            for ours, theirs in zip(part.parameters(), frozen.parameters(), strict=True):
                assert torch.equal(ours, theirs)
    start = build(config, data.image_shape)
    for ours, theirs in zip(model.encoder.parameters(), start.encoder.parameters(), strict=True):
        assert not torch.equal(ours, theirs)


def test_components_of_an_ensemble_do_not_learn_from_each_other(data):
    config = config_of(n_components=2, ensemble=True)
    model = build(config, data.image_shape)
    training = ImageTraining(model, config, data)
    x = data.validation

    def gradient() -> torch.Tensor:
        model.zero_grad()
        training.bound(x, generator=torch.Generator().manual_seed(0)).mean().backward()
        return model.encoder.heads.mean.weight.grad[0].clone()

    before = gradient()
    with torch.no_grad():
        for layer in (*model.encoder.trunk.layers, *model.encoder.heads.children()):
            layer.weight[1].add_(1)
            layer.bias[1] += 1
    torch.testing.assert_close(gradient(), before)


def test_iwae_control_has_one_wide_component(tmp_path, data):
    model = train(config_of(max_epochs=1, objective="iwae"), tmp_path, data=data)
    assert model.mixture == MixtureConfig()
    assert model.sizes.encoder_width > 1


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"objective": "iwae", "ensemble": True}, "two different controls"),
        ({"ensemble": True, "component_encoder": "shifted"}, "separate"),
        ({"ensemble": True, "estimator": "some_to_all", "n_sampled": 1}, "some_to_all"),
        ({"n_sampled": 5, "estimator": "some_to_all"}, "n_sampled must be between"),
    ],
)
def test_configurations_that_make_no_sense(kwargs, match):
    with pytest.raises(ValueError, match=match):
        config_of(**kwargs)


@pytest.mark.parametrize(("device", "expected"), [(None, "cuda"), ("cpu", "cpu")])
def test_training_is_told_the_device(tmp_path, data, monkeypatch, device, expected):
    """The accelerator, which need not exist, unless another device is named."""
    asked = []

    class Trainer:
        def __init__(self, *, accelerator, **kwargs):
            asked.append(accelerator)
            raise Killed

    monkeypatch.setattr(lightning, "Trainer", Trainer)
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    with pytest.raises(Killed):
        train(config_of(), tmp_path, data=data, device=device)
    assert asked == [expected]


@pytest.mark.parametrize("ensemble", [False, True])
def test_a_run_is_not_continued_on_other_images(ensemble, data, tmp_path, monkeypatch):
    config, n_epochs = config_of(ensemble=ensemble), 0
    original = _Recorder.on_train_epoch_end

    def kill(self, *args):
        nonlocal n_epochs
        original(self, *args)
        n_epochs += 1
        if n_epochs == (4 if ensemble else 0) + 2:
            raise Killed

    monkeypatch.setattr(_Recorder, "on_train_epoch_end", kill)
    with pytest.raises(Killed):
        train(config, tmp_path, data=data)
    monkeypatch.undo()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = replace(data, train=1 - data.train)
    with pytest.raises(ValueError, match="holds a run on other images, 'arrays' has changed"):
        train(config, tmp_path, data=changed, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    if ensemble:  # that of the decoder has ended
        (tmp_path / "images.json").unlink()  # as of an earlier version
        with pytest.raises(ValueError, match="alone holds a run on other images"):
            train(config, tmp_path, data=changed, resume=True)
    train(config, tmp_path, data=data, resume=True)
    (tmp_path / "images.json").write_text("{")
    (tmp_path / "summary.json").unlink()
    with pytest.raises(ValueError, match="images.json is truncated or damaged"):
        train(config, tmp_path, data=data, resume=True)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            lambda path: path.unlink(),
            "best.pt, the weights of the run, is missing: delete",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:99]), "best.pt is truncated"),
    ],
)
def test_weights_that_are_gone_are_missed_before_the_run_goes_on(
    damage, expected, data, tmp_path, monkeypatch
):
    original = _Recorder.on_train_epoch_end

    def kill(self, *args):
        original(self, *args)
        raise Killed

    monkeypatch.setattr(_Recorder, "on_train_epoch_end", kill)
    with pytest.raises(Killed):
        train(config_of(), tmp_path, data=data)
    monkeypatch.setattr(_Recorder, "on_train_epoch_end", lambda *_: pytest.fail("it goes on"))
    damage(tmp_path / "best.pt")
    with pytest.raises((FileNotFoundError, ValueError), match=expected):
        train(config_of(), tmp_path, data=data, resume=True)
