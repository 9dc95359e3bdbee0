"""Linear classification of the labels from the latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixscvi.images.datasets import ImageData, binarize, epoch_seed
from mixscvi.images.experiments.configs import check_seed
from mixscvi.images.experiments.devices import resolve_device
from mixscvi.images.experiments.runs import finished_run_data, read_summary
from mixscvi.images.experiments.weights import load_run
from mixscvi.images.networks.vae import ImageVAE
from mixscvi.system import write_beside

__all__ = ["linear_accuracy", "parameter_features", "probe", "sample_features"]

_BATCH = 200


@torch.no_grad()
def parameter_features(model: ImageVAE, images: Tensor) -> np.ndarray:
    """Means and variances of all components, `(n, 2 * A * n_levels * D)`."""
    rows = []
    for x in images.split(_BATCH):
        loc, scale = model.component_parameters(model.encode(x))
        rows.append(torch.cat((loc, scale.square()), -1).flatten(1).cpu().numpy())
    return np.concatenate(rows)


@torch.no_grad()
def sample_features(
    model: ImageVAE, images: Tensor, n_samples: int, *, seed: int = 0
) -> np.ndarray:
    """Draws of every component side by side, `(n, L * A * n_levels * D)`."""
    rows = []
    prior = model.prior_distribution()
    for batch, x in enumerate(images.split(_BATCH)):
        generator = torch.Generator(x.device).manual_seed(epoch_seed(seed, batch, "probe"))
        z = model.draw(x, n_samples, prior=prior, generator=generator).z
        rows.append(z.transpose(0, 1).flatten(1).cpu().numpy())
    return np.concatenate(rows)


def linear_accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
    """Test accuracy of a linear support vector machine (C = 0.025) on standardized features.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    >>> linear_accuracy(x, np.array([0, 0, 1, 1]), x, np.array([0, 0, 1, 1]))
    1.0
    """
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    classifier = make_pipeline(
        StandardScaler(), LinearSVC(C=0.025, dual=False, random_state=0, max_iter=10_000)
    )
    return float(classifier.fit(train, train_labels).score(test, test_labels))


def probe(
    folder: str | Path,
    *,
    against: str | Path | None = None,
    data: ImageData | None = None,
    data_folder: str | Path | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Classify the labels linearly from a run's latents.

    The classifier is fitted on the training images and scored on the test images.

    Parameters
    ----------
    folder
        The run. Its features are the means and variances of its `A` components, before the flow
        if there is one; samples are taken after it.
    against
        A run with one component, of which `2 A` posterior samples are as many features. Without
        it, `2` samples of each of the run's own components are.
    data, data_folder
        As in :func:`~mixscvi.images.experiments.evaluation.evaluate`.
    seed
        Seed of the samples.
    device
        Where the model runs; on the accelerator, if there is one, when ``None``.

    Returns
    -------
    Accuracies ``parameters`` and ``samples``, the number of features of both, and how many
    images they come from; also written into the run's ``probe.json``.

    Raises
    ------
    ValueError
        If the data have no labels, or `against` has more than one component or other data.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from mixscvi import images
    >>> labels = np.arange(90) % 2
    >>> gray = np.random.default_rng(0).random((90, 6, 6)) * labels[:, None, None]
    >>> data = images.ImageData.from_arrays(gray, labels, n_validation=20, n_test=20)
    >>> config = images.RunConfig.from_preset("vanilla", budget="smoke", n_components=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = images.train(config, folder, data=data)
    ...     result = probe(folder, data=data)
    >>> result["n_features"]  # of 2 components in 3 dimensions: means and variances; 2 draws
    {'parameters': 12, 'samples': 12}
    """
    folder = Path(folder)
    check_seed(seed)
    device = resolve_device(device)
    config, model = load_run(folder, device)
    data = finished_run_data(folder, data, data_folder)
    if data.labels is None:
        raise ValueError(f"the probe needs labels, and the data {data.name!r} have none")
    other, n_samples = model, 2
    if against is not None:
        other_config, other = load_run(against, device)
        if other_config.dataset != config.dataset:
            raise ValueError(
                f"against must be a run on {config.dataset!r}, {against} is one on "
                f"{other_config.dataset!r}"
            )
        shape, others = (tuple(read_summary(run)["image_shape"]) for run in (folder, against))
        if others != shape:
            raise ValueError(
                f"against must be a run on images of shape {shape}, {against} is one on {others}"
            )
        if other.mixture.n_components != 1:
            raise ValueError(
                f"against must be a run with one component, {against} has "
                f"{other.mixture.n_components}"
            )
        n_samples = 2 * model.mixture.n_components
    # The encoders were trained on binary images.
    generator = torch.Generator().manual_seed(epoch_seed(seed, 0, "probe images"))
    train_images = binarize(data.train, generator)
    accuracies, n_features = {}, {}
    for name, features in {
        "parameters": lambda images: parameter_features(model, images),
        "samples": lambda images: sample_features(other, images, n_samples, seed=seed),
    }.items():
        train, test = features(train_images.to(device)), features(data.test.to(device))
        n_features[name] = train.shape[1]
        accuracies[name] = linear_accuracy(train, data.labels["train"], test, data.labels["test"])
    result = accuracies | {
        "n_features": n_features,
        "against": None if against is None else str(against),
        "n_train": len(train_images),
        "n_test": len(data.test),
        "dataset": data.name,
        "seed": seed,
    }
    write_beside(folder / "probe.json", json.dumps(result, indent=2) + "\n")
    return result
