import json
from dataclasses import replace

import pytest

from mixscvi.images import BUDGETS, PRESETS, RunConfig, TrainingConfig


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("preset", PRESETS)
def test_configurations_survive_their_file(preset, budget):
    config = RunConfig.from_preset(
        preset,
        budget=budget,
        n_components=4,
        n_sampled=2,
        estimator="some_to_all",
        component_encoder="shifted",
        seed=7,
    )
    assert RunConfig.from_json(config.to_json()) == config
    assert config.draws == BUDGETS[budget].draws


def test_the_papers_budget_is_that_of_the_papers():
    config = RunConfig.from_preset("composite", budget="paper")
    training, sizes = config.training, config.sizes
    assert (training.batch_size, training.learning_rate) == (100, 5e-4)
    assert (training.warmup_epochs, training.patience) == (100, 100)
    assert (training.n_train, training.n_validation, training.n_test) == (None, None, None)
    assert (sizes.n_latent, sizes.hidden, sizes.n_prior_components) == (40, (300, 300), 500)
    assert (config.model.n_flow_steps, sizes.flow_hidden) == (2, (320,))
    assert (sizes.pixelcnn_layers, sizes.pixelcnn_channels) == (8, 64)
    assert config.draws == 5000


def test_changes_to_the_training():
    config = RunConfig.from_preset("vanilla", budget="small", training={"max_epochs": 3})
    usual = RunConfig.from_preset("vanilla", budget="small")
    assert config.training == replace(usual.training, max_epochs=3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: RunConfig(objective="IWAE"), "objective must be one of .*'IWAE'"),
        (lambda: TrainingConfig(max_epochs=0), "max_epochs must be at least 1, got 0"),
        (lambda: TrainingConfig(n_train=-5), "n_train must be at least 1, got -5"),
    ],
)
def test_what_no_run_can_be_made_of(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_unknown_names():
    with pytest.raises(ValueError, match="preset must be one of.*'vanila'"):
        RunConfig.from_preset("vanila")
    with pytest.raises(ValueError, match="budget must be one of.*'gpu'"):
        RunConfig.from_preset("vanilla", budget="gpu")


def test_files_of_earlier_versions_are_read():
    """They had other names for fields, the budget and the components that share an encoder."""
    config = RunConfig.from_preset(
        "composite", budget="small", n_components=4, component_encoder="shifted", seed=7
    )
    fields = json.loads(config.to_json())
    fields["parts"], fields["protocol"] = fields.pop("model"), fields.pop("training")
    fields["budget"] = "cpu"
    fields["mixture"]["component_encoder"] = "amortized"
    assert RunConfig.from_json(json.dumps(fields)) == config
