import json
from dataclasses import replace

import pytest
import torch

from image_runs import config_of
from mixscvi.images import build
from mixscvi.images.experiments import runs


def test_a_run_takes_as_many_images_as_it_is_trained_on(data):
    some = runs.run_data(config_of(training={"n_train": 20, "n_test": None}), data)
    assert [len(part) for part in (some.train, some.validation, some.test)] == [20, 12, 11]
    assert torch.equal(some.train, data.train[:20])


def test_images_are_loaded_by_name_where_none_are_given(monkeypatch, data):
    asked = []
    monkeypatch.setattr(runs, "load", lambda *args: asked.append(args) or data)
    assert runs.run_data(config_of(dataset="mnist"), data_folder="there").name == "mine"
    assert asked == [("mnist", "there")]


def test_a_folder_is_prepared_once(tmp_path, data):
    config, folder = config_of(), tmp_path / "new" / "run"
    assert runs.prepare(config, folder, data, resume=False) is False
    assert runs.read_config(folder) == config
    (folder / "last.ckpt").touch()
    assert runs.prepare(config, folder, data, resume=True) is True
    with pytest.raises(FileExistsError, match="unfinished run: resume it"):
        runs.prepare(config, folder, data, resume=False)
    with pytest.raises(ValueError, match="config.json differs in seed"):
        runs.prepare(replace(config, seed=9), folder, data, resume=True)
    (folder / "summary.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds a finished run"):
        runs.prepare(config, folder, data, resume=True)


def test_what_no_run_has_left_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run .config.json is missing"):
        runs.read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no finished run .summary.json is missing"):
        runs.read_summary(tmp_path)


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


def test_a_summary_says_what_the_run_was(finished, data):
    summary = runs.read_summary(finished)
    assert summary["image_shape"] == [6, 5]
    assert summary == json.loads((finished / "summary.json").read_text())
