"""Small runs on images, to be evaluated."""

import csv

import numpy as np

from mixscvi.images import ImageData, RunConfig, train
from mixscvi.images.experiments.runs import evaluation_file


def small_data() -> ImageData:
    """Images of 3 x 3 pixels, 12 of them for the test."""
    gray = np.random.default_rng(0).random((50, 3, 3))
    return ImageData.from_arrays(gray, n_validation=10, n_test=12)


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
