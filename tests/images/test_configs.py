from dataclasses import replace

import pytest

from mixscvi.images import BUDGETS, PRESETS, Mixture, RunConfig


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("preset", PRESETS)
def test_configurations_survive_their_file(preset, budget):
    config = RunConfig.of(
        preset,
        budget=budget,
        n_components=4,
        n_sampled=2,
        estimator="some_to_all",
        component_encoder="amortized",
        seed=7,
    )
    assert RunConfig.from_json(config.to_json()) == config
    assert config.draws == BUDGETS[budget].draws


def test_the_papers_budget_is_the_reference_protocol():
    config = RunConfig.of("composite", budget="paper")
    protocol, sizes = config.protocol, config.sizes
    assert (protocol.batch_size, protocol.learning_rate) == (100, 5e-4)
    assert (protocol.warmup_epochs, protocol.patience) == (100, 100)
    assert (protocol.n_train, protocol.n_validation, protocol.n_test) == (None, None, None)
    assert (sizes.n_latent, sizes.hidden, sizes.n_prior_components) == (40, (300, 300), 500)
    assert (config.parts.n_flow_steps, sizes.flow_hidden) == (2, (320,))
    assert (sizes.pixelcnn_layers, sizes.pixelcnn_channels) == (8, 64)
    assert config.draws == 5000


def test_changes_to_the_protocol():
    config = RunConfig.of("vanilla", budget="cpu", protocol={"max_epochs": 3})
    usual = RunConfig.of("vanilla", budget="cpu")
    assert config.protocol == replace(usual.protocol, max_epochs=3)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"n_components": 0}, "n_components must be at least 1, got 0"),
        ({"n_components": 4, "n_sampled": 5}, "n_sampled must be between 1 and n_components=4"),
        ({"n_components": 4, "n_sampled": 2}, "all_to_all draws from all"),
        ({"n_components": 4, "n_sampled": 0, "estimator": "some_to_all"}, "got 0"),
        ({"estimator": "none_to_all"}, "none_to_all"),
    ],
)
def test_mixtures_that_make_no_sense(kwargs, match):
    with pytest.raises(ValueError, match=match):
        Mixture(**kwargs)


def test_unknown_names():
    with pytest.raises(ValueError, match="preset must be one of.*'vanila'"):
        RunConfig.of("vanila")
    with pytest.raises(ValueError, match="budget must be one of.*'gpu'"):
        RunConfig.of("vanilla", budget="gpu")
