"""Pictures that a run's model draws and reconstructs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixscvi.images.datasets import ImageData
from mixscvi.images.experiments.configs import check_seed
from mixscvi.images.experiments.devices import resolve_device
from mixscvi.images.experiments.runs import finished_run_data
from mixscvi.images.experiments.weights import load_run
from mixscvi.system import naming_what_takes_memory, write_beside

__all__ = ["picture_grid", "reconstruct", "sample"]


def picture_grid(images: Tensor, path: str | Path, *, n_columns: int = 8) -> None:
    """Write images `(n, 1, height, width)` in [0, 1] as one picture, row by row."""
    from matplotlib.image import imsave

    n, _, height, width = images.shape
    n_rows = math.ceil(n / n_columns)
    grid = np.ones((n_rows * (height + 1) + 1, n_columns * (width + 1) + 1))
    for i, image in enumerate(images[:, 0].cpu().numpy()):
        top = i // n_columns * (height + 1) + 1
        left = i % n_columns * (width + 1) + 1
        grid[top : top + height, left : left + width] = image
    enlarged = np.kron(grid, np.ones((2, 2)))
    write_beside(
        Path(path),
        lambda partial: imsave(partial, enlarged, cmap="gray", vmin=0, vmax=1, format="png"),
    )


def _check_pictures(n_images: int, seed: int) -> None:
    check_seed(seed)
    if n_images < 1:
        raise ValueError(f"images must be at least 1, got {n_images}")


def sample(
    folder: str | Path,
    *,
    n_images: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Path:
    """Write a grid of images drawn from a run's model; a PixelCNN's are drawn pixel by pixel.

    Parameters
    ----------
    folder
        The run.
    n_images
        How many.
    seed
        Seed of the draws.
    device
        Where the model runs; on the accelerator, if there is one, when ``None``.

    Returns
    -------
    Path of the picture, ``samples.png`` in the run's folder.

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished run.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from mixscvi import images
    >>> gray = np.random.default_rng(0).random((80, 6, 6))
    >>> data = images.ImageData.from_arrays(gray, n_validation=20, n_test=10)
    >>> config = images.RunConfig.from_preset("vanilla", budget="smoke")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = images.train(config, folder, data=data)
    ...     sample(folder, n_images=8).name
    'samples.png'
    """
    _check_pictures(n_images, seed)
    device = resolve_device(device)
    path = Path(folder) / "samples.png"
    _, model = load_run(folder, device)
    with naming_what_takes_memory(f"images={n_images} do not fit into memory: choose fewer"):
        picture_grid(model.sample(n_images, seed), path)
    return path


@torch.no_grad()
def reconstruct(
    folder: str | Path,
    *,
    n_images: int = 8,
    data: ImageData | None = None,
    data_folder: str | Path | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Path:
    """Write test images and, below, their reconstructions, one row for each component.

    Parameters
    ----------
    folder
        The run.
    n_images
        How many, from the first.
    data, data_folder
        As in :func:`~mixscvi.images.experiments.evaluation.evaluate`.
    seed
        Seed of the draws.
    device
        Where the model runs; on the accelerator, if there is one, when ``None``.

    Returns
    -------
    Path of the picture, ``reconstructions.png`` in the run's folder.

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished run.
    ValueError
        If the images are not those of the run, or fewer than are asked for.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from mixscvi import images
    >>> gray = np.random.default_rng(0).random((80, 6, 6))
    >>> data = images.ImageData.from_arrays(gray, n_validation=20, n_test=10)
    >>> config = images.RunConfig.from_preset("vanilla", budget="smoke", n_components=3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = images.train(config, folder, data=data)
    ...     reconstruct(folder, data=data).name
    'reconstructions.png'
    """
    _check_pictures(n_images, seed)
    device = resolve_device(device)
    _, model = load_run(folder, device)
    test = finished_run_data(folder, data, data_folder).test
    if n_images > len(test):
        raise ValueError(f"images must be at most the {len(test)} test images, got {n_images}")
    x = test[:n_images].to(device)
    generator = torch.Generator(x.device).manual_seed(seed)
    z = model.draw(x, generator=generator).z[0]
    # (A, B, ...): a row of the picture is a component.
    rows = model.decoder.sample(z.transpose(0, 1).flatten(0, 1), generator)
    path = Path(folder) / "reconstructions.png"
    picture_grid(torch.cat((x, rows)), path, n_columns=len(x))
    return path
