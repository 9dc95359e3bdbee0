import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

from mixscvi.images import ImageData, RunConfig, build, train
from mixscvi.images.experiments import runs


@pytest.fixture(scope="module")
def data() -> ImageData:
    gray = np.random.default_rng(0).random((60, 6, 5))
    return ImageData.from_arrays(gray, n_validation=12, n_test=11, name="mine")


def config_of(**kwargs) -> RunConfig:
    training = {"max_epochs": 1, "warmup_epochs": 1} | kwargs.pop("training", {})
    return RunConfig.from_preset("vanilla", budget="smoke", training=training, **kwargs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    train(config_of(n_components=2), folder, data=data)
    return folder


def test_a_run_takes_as_many_images_as_it_is_trained_on(data):
    some = runs.run_data(config_of(training={"n_train": 20, "n_test": None}), data)
    assert [len(part) for part in (some.train, some.validation, some.test)] == [20, 12, 11]
    assert torch.equal(some.train, data.train[:20])


def test_images_are_loaded_by_name_where_none_are_given(monkeypatch, data):
    asked = []
    monkeypatch.setattr(runs, "load", lambda *args: asked.append(args) or data)
    assert runs.run_data(config_of(dataset="mnist"), data_folder="there").name == "mine"
    assert asked == [("mnist", "there")]


def test_a_folder_is_prepared_once(tmp_path):
    config, folder = config_of(), tmp_path / "new" / "run"
    assert runs.prepare(config, folder, resume=False) is False
    assert runs.read_config(folder) == config
    (folder / "last.ckpt").touch()
    assert runs.prepare(config, folder, resume=True) is True
    with pytest.raises(FileExistsError, match="unfinished run: resume it"):
        runs.prepare(config, folder, resume=False)
    with pytest.raises(ValueError, match="config.json differs in seed"):
        runs.prepare(replace(config, seed=9), folder, resume=True)
    (folder / "summary.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds a finished run"):
        runs.prepare(config, folder, resume=True)


def test_what_no_run_has_left_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run .config.json is missing"):
        runs.read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no finished run .summary.json is missing"):
        runs.read_summary(tmp_path)


def test_a_loaded_model_is_that_of_the_best_weights(finished):
    config, model = runs.load_run(finished)
    assert config == config_of(n_components=2) and not model.training
    best = torch.load(finished / "best.pt", weights_only=True)
    assert model.state_dict().keys() == best.keys()
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("preset", ["vanilla", "composite"])
def test_weights_of_earlier_versions_are_read(tmp_path, data, preset):
    """Codes belonged to the encoders; the configuration called these amortized."""
    config = RunConfig.from_preset(
        preset,
        budget="smoke",
        n_components=3,
        component_encoder="shifted",
        training={"max_epochs": 1, "warmup_epochs": 1},
    )
    model = train(config, tmp_path, data=data)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    earlier = {name.replace("encoder.heads.codes", "encoder.codes"): v for name, v in best.items()}
    assert earlier.keys() != best.keys()
    torch.save(earlier, tmp_path / "best.pt")
    text = (tmp_path / "config.json").read_text().replace("shifted", "amortized")
    (tmp_path / "config.json").write_text(text)
    again, loaded = runs.load_run(tmp_path)
    assert again == config
    assert runs.weights_hash(loaded) == runs.weights_hash(model)


HUGE = 10**9
TAMPERED = {
    "hidden": ("sizes", {"hidden": [HUGE, 10]}, r"config\.json .* its hidden=\(1000000000, 10\)"),
    "latents": ("sizes", {"n_latent": HUGE}, r"config\.json .* its n_latent=1000000000"),
    "layers": ("sizes", {"hidden": [1] * 10_000}, r"config\.json .* its len\(hidden\)=10000"),
    "one wide layer": (
        "sizes",
        {"hidden": [1000, 1000]},
        r"config\.json .* its sizes are of a larger",
    ),
    "width": ("sizes", {"encoder_width": 1e9}, r"config\.json .* its encoder_width=1000000000"),
    "components": ("mixture", {"n_components": HUGE}, r"config\.json .* its n_components="),
    "flow": ("model", {"n_flow_steps": HUGE}, r"config\.json .* its n_flow_steps=1000000000"),
}


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize(("part", "changed", "match"), TAMPERED.values(), ids=TAMPERED)
def test_configurations_of_huge_models_are_named(part, changed, match, copied):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    config[part] |= changed
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        runs.load_run(copied)


def test_images_of_a_huge_shape_are_named(copied):
    path = copied / "summary.json"
    summary = json.loads(path.read_text()) | {"image_shape": [HUGE, HUGE]}
    path.write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=r"summary\.json .* its image_shape=\[1000000000, 1000"):
        runs.load_run(copied)


def test_wide_flows_are_named(tmp_path, data):
    config = RunConfig.from_preset(
        "flow", budget="smoke", training={"max_epochs": 1, "warmup_epochs": 1}
    )
    train(config, tmp_path, data=data)
    path = tmp_path / "config.json"
    changed = json.loads(path.read_text())
    changed["sizes"]["flow_hidden"] = [2_000, 2_000]
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"config\.json .* its flow_hidden=\(2000, 2000\)"):
        runs.load_run(tmp_path)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _claim(path):
    weights = torch.load(path, weights_only=True)
    name = next(iter(weights))
    torch.save(weights | {name: torch.ones(1).expand(HUGE, HUGE)}, path)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_truncate, r"best\.pt is truncated, or no checkpoint"),
        (_claim, r"best\.pt is damaged \(.* claims the shape \(1000000000, 1000000000\)"),
    ],
)
def test_spoiled_weights_are_named(spoil, match, copied):
    spoil(copied / "best.pt")
    with pytest.raises(ValueError, match=match):
        runs.load_run(copied)


def test_data_of_a_finished_run(finished, data, monkeypatch):
    assert runs.finished_run_data(finished, data).fingerprint("test") == data.fingerprint("test")
    monkeypatch.setattr(runs, "load", lambda *args: replace(data, train=1 - data.train))
    with pytest.raises(ValueError, match="trained on other images than those of 'mnist'"):
        runs.finished_run_data(finished)
    with pytest.raises(ValueError, match=r"images of shape \(6, 5\), got \(5, 6\)"):
        turned = {part: getattr(data, part).mT for part in ("train", "validation", "test")}
        runs.finished_run_data(finished, replace(data, **turned))


def test_parameters_are_counted_by_part(data):
    model = build(config_of(n_components=3), data.image_shape)
    counts = runs.parameter_counts(model)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["encoder"] == sum(p.numel() for p in model.encoder.parameters())
    assert "prior" not in counts  # it has none


def test_weights_have_a_hash_of_their_numbers(data):
    config = config_of()
    first, same = (build(config, data.image_shape) for _ in range(2))
    assert runs.weights_hash(first) == runs.weights_hash(same)
    with torch.no_grad():
        next(same.parameters())[0, 0, 0] += 1e-3
    assert runs.weights_hash(first) != runs.weights_hash(same)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(False, False, "cpu"), (True, False, "cuda"), (False, True, "mps")],
)
def test_the_device_is_what_lightning_chooses(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: cuda))
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: mps))
    assert runs.resolve_device().type == expected
    assert runs.resolve_device("cpu") == torch.device("cpu")


def test_a_summary_says_what_the_run_was(finished, data):
    summary = runs.read_summary(finished)
    assert summary["image_shape"] == [6, 5]
    assert summary == json.loads((finished / "summary.json").read_text())
