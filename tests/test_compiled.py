"""What is compiled, when, and what is said of it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import scvi
from numba.core.dispatcher import Dispatcher

from fitting import SMALL, train
from mixscvi import MixSCVI

MEASURE = """
import logging, sys
import torch
from mixscvi.mixture.distances import squared_distances

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s: %(message)s")
for dtype in (torch.float64, torch.float32):
    z, factor = torch.ones(5, 2, 3, dtype=dtype), torch.ones(2, 4, 3, 3, dtype=dtype)
    squared_distances(z, z[0], factor, factor[..., 0])
"""


def test_compiling_is_said_once_and_not_where_its_code_is_kept(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    said = [
        subprocess.run(
            [sys.executable, "-c", MEASURE],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        for _ in range(2)
    ]
    assert len(said[0]) == 1
    assert said[0][0].startswith("mixscvi.compiled: numba compiles")
    assert str(tmp_path) in said[0][0]
    assert said[1] == []


def signatures():
    """Every compiled function of the package, and for how many kinds of arguments it is."""
    functions = {
        f"{name}.{key}": value
        for name, module in list(sys.modules.items())
        if name.startswith("mixscvi.")
        for key, value in vars(module).items()
        if isinstance(value, Dispatcher)
    }
    return {name: len(function.signatures) for name, function in functions.items()}


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("n_components", [1, 3])
def test_nothing_is_compiled_anew_by_epochs_or_short_minibatches(n_components, sparse, make_adata):
    adata = make_adata(n_obs=100, sparse=sparse)
    MixSCVI.setup_anndata(adata)
    scvi.settings.seed = 0
    model = MixSCVI(adata, n_components=n_components, **SMALL)
    train(model, max_epochs=1, batch_size=32, train_size=1.0)
    before = signatures()
    assert sum(before.values()) > 0
    # Epochs, and minibatches of other sizes, the last ones short.
    for batch_size in (32, 30, adata.n_obs - 5):
        train(model, max_epochs=2, batch_size=batch_size, train_size=1.0)
    assert signatures() == before
    assert np.isfinite(model.history["elbo_train"].to_numpy(dtype=float)).all()
