"""Small runs on images, to be evaluated."""

import csv

import numpy as np

from mixscvi.images import ImageData, RunConfig, train
from mixscvi.images.experiments.runs import evaluation_file


def small_data() -> ImageData:
    """Images of 3 x 3 pixels, 12 of them for the test."""
    gray = np.random.default_rng(0).random((50, 3, 3))
    return ImageData.from_arrays(gray, n_validation=10, n_test=12)


def config_of(**kwargs) -> RunConfig:
    """A vanilla run of an epoch."""
    training = {"max_epochs": 1, "warmup_epochs": 1} | kwargs.pop("training", {})
    return RunConfig.from_preset("vanilla", budget="smoke", training=training, **kwargs)


def run(folder, data, preset="vanilla", n_components=2, **kwargs):
    """Train a preset for an epoch."""
    config = RunConfig.from_preset(
        preset,
        budget="smoke",
        n_components=n_components,
        training={"max_epochs": 1},
        **kwargs,
    )
    train(config, folder, data=data)
    return folder


def rows_of(folder, proposal="encoder") -> dict[str, np.ndarray]:
    """Columns of an evaluation's table, with an entry per image."""
    with open(evaluation_file(folder, proposal, ".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def of_version_1(state, *, versions=True):
    """A state of modules as earlier versions had it: the first weight of dense trunks by pixel."""
    weights = {
        name: value.permute(2, 0, 1).contiguous()
        for name, value in state.items()
        if name.endswith("layers.0.weight") and value.dim() == 3
    }
    if not versions:
        return dict(state) | weights
    state.update(weights)
    for name in weights:
        state._metadata[name.removesuffix("layers.0.weight").removesuffix(".")]["version"] = 1
    return state
