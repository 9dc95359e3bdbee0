import numpy as np
import pytest

from image_runs import config_of
from mixscvi.images import ImageData, train


@pytest.fixture(scope="module")
def data() -> ImageData:
    gray = np.random.default_rng(0).random((60, 6, 5))
    return ImageData.from_arrays(gray, n_validation=12, n_test=11, name="mine")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """Folder of a finished run of two components."""
    folder = tmp_path_factory.mktemp("run")
    train(config_of(n_components=2), folder, data=data)
    return folder
