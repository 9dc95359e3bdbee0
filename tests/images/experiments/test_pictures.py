import matplotlib.image
import pytest
import torch

from mixscvi.images.experiments.pictures import picture_grid


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
