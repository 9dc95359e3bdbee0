import json
from dataclasses import replace

import numpy as np
import pytest

from mixscvi.images import ImageData, RunConfig, train
from mixscvi.images.experiments.probe import (
    linear_accuracy,
    parameter_features,
    probe,
    sample_features,
)


@pytest.fixture(scope="module")
def data() -> ImageData:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 160)
    halves = np.arange(6)[None, :, None] < 3
    gray = np.where(halves == labels[:, None, None].astype(bool), 0.9, 0.1) * np.ones((6, 6))
    return ImageData.from_arrays(gray, labels, n_validation=20, n_test=40)


def run(folder, data, n_components, preset="vanilla"):
    config = RunConfig.from_preset(
        preset, budget="smoke", n_components=n_components, training={"max_epochs": 1}
    )
    return train(config, folder, data=data)


@pytest.mark.parametrize("preset", ["vanilla", "hierarchical"])
def test_features(tmp_path, data, preset):
    model = run(tmp_path, data, 3, preset)
    n_latent = 3 * model.config.n_levels
    features = parameter_features(model, data.test[:20])
    assert features.shape == (20, 2 * 3 * n_latent)
    loc, scale = model.component_parameters(model.encode(data.test[4:5]))
    expected = np.stack((loc[0].detach().numpy(), scale[0].detach().numpy() ** 2), 1)
    expected = np.concatenate((expected[:, 0], expected[:, 1]), -1).reshape(-1)
    np.testing.assert_allclose(features[4], expected, rtol=1e-4)

    samples = sample_features(model, data.test[:20], 2)
    assert samples.shape == (20, 2 * 3 * n_latent)
    np.testing.assert_array_equal(samples, sample_features(model, data.test[:20], 2))
    assert not np.array_equal(samples, sample_features(model, data.test[:20], 2, seed=1))


def test_probe_against_one_component(tmp_path, data):
    run(tmp_path / "three", data, 3)
    run(tmp_path / "one", data, 1)
    result = probe(tmp_path / "three", against=tmp_path / "one", data=data)
    assert result["n_features"] == {"parameters": 18, "samples": 18}
    # The halves of the images are told apart even by an encoder that has hardly been trained.
    assert result["parameters"] > 0.9
    assert json.loads((tmp_path / "three" / "probe.json").read_text()) == result
    assert probe(tmp_path / "three", data=data)["against"] is None
    with pytest.raises(ValueError, match="one component"):
        probe(tmp_path / "one", against=tmp_path / "three", data=data)
    smaller = replace(
        data, **{p: getattr(data, p)[..., :5] for p in ("train", "validation", "test")}
    )
    run(tmp_path / "smaller", smaller, 1)
    with pytest.raises(ValueError, match=r"shape \(6, 6\), .*smaller is one on \(6, 5\)"):
        probe(tmp_path / "three", against=tmp_path / "smaller", data=data)


def test_probe_needs_labels(tmp_path, data):
    run(tmp_path, data, 1)
    unlabeled = ImageData(data.name, data.train, data.validation, data.test)
    with pytest.raises(ValueError, match="needs labels"):
        probe(tmp_path, data=unlabeled)


def test_chance_level():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(400, 2)), rng.integers(0, 2, 400)
    assert linear_accuracy(x[:200], labels[:200], x[200:], labels[200:]) == pytest.approx(
        0.5, abs=0.15
    )
