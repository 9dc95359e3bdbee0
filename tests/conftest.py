import os
from collections.abc import Callable
from pathlib import Path

import anndata
import matplotlib
import numpy as np
import pytest
from scipy.sparse import csr_matrix

matplotlib.use("Agg")


def find_data_folder() -> Path | None:
    """The folder named by ``MIXSCVI_DATA``, else ``../shared/data`` if there is one.

    A folder that is named but missing is an error and no reason to skip.
    """
    named = os.environ.get("MIXSCVI_DATA")
    if named:
        folder = Path(named)
        if not folder.is_dir():
            raise NotADirectoryError(f"MIXSCVI_DATA names no folder: {named!r}")
        return folder
    for root in (Path(__file__).parents[1], Path.cwd()):
        folder = root.parent / "shared" / "data"
        if folder.is_dir():
            return folder
    return None


@pytest.fixture(scope="session")
def data_folder() -> Path:
    folder = find_data_folder()
    if folder is None:
        pytest.skip("no data folder: set MIXSCVI_DATA, or have ../shared/data")
    return folder


def synthetic_counts(
    n_obs: int = 72,
    n_vars: int = 20,
    *,
    seed: int = 0,
    sparse: bool = False,
    batches: tuple[str, ...] = ("b0", "b1"),
    layer: str | None = None,
) -> anndata.AnnData:
    """Integer counts of three clusters of cells, with every kind of annotation.

    obs holds batch, label and donor (categorical), age and depth (continuous) and factor (a size
    factor). With `layer`, the counts stand there and X holds something that must not be used.
    """
    rng = np.random.default_rng(seed)
    cluster = np.arange(n_obs) % 3
    rates = rng.gamma(0.8, 3.0, size=(3, n_vars))[cluster]
    rates = rates * rng.lognormal(0.0, 0.4, size=(n_obs, 1))
    counts = rng.poisson(rng.gamma(2.0, rates / 2.0)).astype(np.float32)
    counts[:, 0] += 1
    counts = csr_matrix(counts) if sparse else counts
    adata = anndata.AnnData(counts)
    adata.obs_names = [f"cell{i}" for i in range(n_obs)]
    adata.var_names = [f"gene{i}" for i in range(n_vars)]
    adata.obs["batch"] = [batches[i // 2 % len(batches)] for i in range(n_obs)]
    adata.obs["label"] = [f"type{i}" for i in cluster]
    adata.obs["donor"] = [f"donor{i}" for i in rng.permutation(n_obs) % 3]
    adata.obs["age"] = rng.normal(size=n_obs)
    adata.obs["depth"] = rng.normal(size=n_obs)
    adata.obs["factor"] = rng.uniform(5.0, 60.0, size=n_obs)
    if layer is not None:
        adata.layers[layer] = adata.X
        adata.X = np.full(adata.shape, 7.0, dtype=np.float32)
    return adata


@pytest.fixture(scope="session")
def make_adata() -> Callable[..., anndata.AnnData]:
    return synthetic_counts


@pytest.fixture(scope="session")
def ray_cluster():
    """Ray, with a cluster of two processors in processes of this machine."""
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()
