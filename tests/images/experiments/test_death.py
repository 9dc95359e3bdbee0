import warnings

import numpy as np
import pytest
import torch

from mixscvi.images import ImageData, RunConfig, train
from mixscvi.images.experiments import training
from mixscvi.images.experiments.death import warn_of_dead_components


@pytest.fixture(scope="module")
def data() -> ImageData:
    gray = np.random.default_rng(0).random((60, 6, 6))
    return ImageData.from_arrays(gray, n_validation=20, n_test=10)


@pytest.fixture
def make(data, tmp_path):
    """A trained model of which one component is far from everything."""

    def make(preset="vanilla", n_components=3, *, dead=None):
        config = RunConfig.from_preset(
            preset,
            budget="smoke",
            n_components=n_components,
            training={"max_epochs": 1, "warmup_epochs": 1},
        )
        model = train(config, tmp_path / "run", data=data)
        if dead is not None:
            encode = model.encode

            def encode_astray(x):
                encoded = encode(x)
                encoded.posterior.component_loc[:, dead] += 100.0
                return encoded

            model.encode = encode_astray
        return model

    return make


@pytest.mark.parametrize("preset", ["vanilla", "flow"])
def test_a_dead_component_is_named(preset, make, data):
    model = make(preset, dead=1)
    state = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match=r"n_components=3: 1 \(in 100% of the images\)\."):
        warn_of_dead_components(model, data.validation, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("n_components", [1, 3])
def test_components_that_are_alive_are_not_named(n_components, make, data):
    model = make(n_components=n_components)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_dead_components(model, data.validation, seed=0)


def test_training_looks_for_them(make, monkeypatch):
    seen = []
    monkeypatch.setattr(
        training, "warn_of_dead_components", lambda model, images, seed: seen.append(len(images))
    )
    make()
    assert seen == [20]
