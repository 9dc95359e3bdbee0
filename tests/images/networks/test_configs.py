from dataclasses import asdict

import pytest
import torch

from mixscvi.images.networks.configs import PRESETS, MixtureConfig, ModelConfig, Sizes


def test_presets_are_those_of_the_papers():
    plain = asdict(ModelConfig())
    changes = {
        preset: {name: value for name, value in asdict(config).items() if value != plain[name]}
        for preset, config in PRESETS.items()
    }
    assert changes == {
        "vanilla": {},
        "flow": {"n_flow_steps": 2},
        "vamp": {"prior": "vamp"},
        "hierarchical": {"n_levels": 2, "prior": "vamp"},
        "pixelcnn": {"decoder": "pixelcnn"},
        "composite": {
            "encoder": "conv",
            "n_flow_steps": 2,
            "n_levels": 2,
            "prior": "vamp",
            "decoder": "pixelcnn",
        },
    }


def test_only_the_control_has_another_encoder_width():
    assert Sizes().encoder_width == 1


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"prior": "gaussian"}, "prior must be one of .*'gaussian'"),
        ({"decoder": "dense"}, "decoder must be one of"),
        ({"n_levels": 3}, r"n_levels must be one of \[1, 2\], got 3"),
        ({"n_flow_steps": -1}, "n_flow_steps must be at least 0, got -1"),
    ],
)
def test_models_that_make_no_sense(kwargs, match):
    with pytest.raises(ValueError, match=match):
        ModelConfig(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"n_components": 0}, "n_components must be at least 1, got 0"),
        ({"n_components": 4, "n_sampled": 5}, "n_sampled must be between 1 and n_components=4"),
        ({"n_components": 4, "n_sampled": 2}, "all_to_all draws from all"),
        ({"n_components": 4, "n_sampled": 0, "estimator": "some_to_all"}, "got 0"),
        ({"estimator": "none_to_all"}, "none_to_all"),
        ({"component_encoder": "amortized"}, "component_encoder must be one of"),
    ],
)
def test_mixtures_that_make_no_sense(kwargs, match):
    with pytest.raises(ValueError, match=match):
        MixtureConfig(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"n_components": 2.5}, "n_components must be an integer, got 2.5"),
        ({"n_components": True}, "n_components must be an integer, got True"),
        ({"n_components": 4, "n_sampled": True, "estimator": "some_to_all"}, "n_sampled must be"),
        ({"n_components": 4, "n_sampled": 1.0, "estimator": "some_to_all"}, "n_sampled must be"),
    ],
)
def test_numbers_of_components_are_integers(kwargs, match):
    with pytest.raises(TypeError, match=match):
        MixtureConfig(**kwargs)


def test_making_a_configuration_draws_nothing():
    before = torch.get_rng_state()
    MixtureConfig(4, 2, "some_to_all")
    assert torch.equal(torch.get_rng_state(), before)


def test_some_to_all_draws_from_one_component_unless_told():
    assert MixtureConfig(4, estimator="some_to_all").n_drawn == 1
    assert MixtureConfig(4).n_drawn == 4
