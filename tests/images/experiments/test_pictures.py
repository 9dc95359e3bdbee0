import matplotlib.image
import numpy as np
import pytest
import torch

from mixscvi.images import ImageData, RunConfig, train
from mixscvi.images.experiments.pictures import picture_grid, sample


@pytest.mark.parametrize("n_images", [1, 5, 8])
def test_picture_grid(tmp_path, n_images):
    images = torch.zeros(n_images, 1, 4, 3)
    images[-1] = 1
    picture_grid(images, tmp_path / "grid.png", n_columns=4)
    picture = matplotlib.image.imread(tmp_path / "grid.png")[..., 0]
    n_rows = -(-n_images // 4)
    assert picture.shape == (2 * (5 * n_rows + 1), 2 * (4 * 4 + 1))
    black = (picture == 0).sum()
    assert black == 4 * 12 * (n_images - 1)


@pytest.mark.parametrize("n_images", [10**15, 10**30])
def test_more_samples_than_memory_holds(n_images, tmp_path):
    gray = np.random.default_rng(0).random((80, 6, 6))
    data = ImageData.from_arrays(gray, n_validation=20, n_test=10)
    train(RunConfig.from_preset("vanilla", budget="smoke"), tmp_path, data=data)
    with pytest.raises(MemoryError, match=f"images={n_images} do not fit into memory"):
        sample(tmp_path, n_images=n_images)
