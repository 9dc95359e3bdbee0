import anndata
import numpy as np
import pytest
import scanpy as sc
from scipy.sparse import csr_matrix, issparse

from mixscvi.datasets import pbmc68k

# raw.X holds three decimals as float32: half a step, and what float32 adds to it.
ROUNDING = 5e-4 + 1e-6


@pytest.fixture(scope="module")
def source() -> anndata.AnnData:
    return sc.datasets.pbmc68k_reduced()


@pytest.fixture(scope="module")
def adata() -> anndata.AnnData:
    return pbmc68k()


def as_scanpy_stores(counts: np.ndarray, source: anndata.AnnData) -> np.ndarray:
    n_counts = source.obs["n_counts"].to_numpy(dtype=np.float64)[:, None]
    return np.log1p(counts * 1e4 / n_counts)


def test_contents(adata, source):
    assert adata.shape == (700, 765)
    assert isinstance(adata.X, csr_matrix)
    assert adata.X.dtype == np.float32
    assert list(adata.obs_names) == list(source.obs_names)
    assert list(adata.var_names) == list(source.raw.var_names)
    assert list(adata.obs["cell_type"]) == list(source.obs["bulk_labels"])
    assert len(adata.obs["cell_type"].cat.categories) == 10
    np.testing.assert_array_equal(adata.obs["n_counts"], source.obs["n_counts"])
    assert "Zheng et al. 2017" in adata.uns["provenance"]


def test_counts_are_positive_integers_and_no_cell_is_empty(adata):
    np.testing.assert_array_equal(adata.X.data, np.rint(adata.X.data))
    assert adata.X.data.min() == 1
    assert np.asarray(adata.X.sum(axis=1)).min() > 0


def test_the_genes_are_part_of_the_library(adata):
    fraction = np.asarray(adata.X.sum(axis=1)).ravel() / adata.obs["n_counts"].to_numpy()
    assert fraction.max() < 1
    assert fraction.mean() == pytest.approx(0.198, abs=5e-4)


def test_counts_reproduce_every_value_to_within_its_rounding(adata, source):
    stored = source.raw.X.toarray().astype(np.float64)
    counts = adata.X.toarray().astype(np.float64)
    assert np.abs(as_scanpy_stores(counts, source) - stored).max() <= ROUNDING


def test_a_count_off_by_one_would_miss_every_value(adata, source):
    stored = source.raw.X.toarray().astype(np.float64)
    counts = adata.X.toarray().astype(np.float64)
    above = np.abs(as_scanpy_stores(counts + 1, source) - stored)
    below = np.abs(as_scanpy_stores(np.maximum(counts - 1, 0), source) - stored)[counts > 0]
    assert min(above.min(), below.min()) > 7 * ROUNDING


def test_each_call_builds_new_data(adata):
    other = pbmc68k()
    other.X.data[:] = 0
    assert adata.X.data.min() == 1


def scale_one_value(source):
    source.raw.X.data[0] += 0.01


def scale_one_library(source):
    source.obs["n_counts"] = source.obs["n_counts"].to_numpy() * 1.01


def lose_one_value(source):
    source.raw.X.data[0] = np.nan


def rename_the_types(source):
    source.obs = source.obs.rename(columns={"bulk_labels": "labels"})


def drop_raw(source):
    source.raw = None


@pytest.mark.parametrize(
    "change", [scale_one_value, scale_one_library, lose_one_value, rename_the_types, drop_raw]
)
def test_a_changed_file_is_an_error(change, source, monkeypatch):
    changed = source.copy()
    assert issparse(changed.raw.X)
    change(changed)
    monkeypatch.setattr(sc.datasets, "pbmc68k_reduced", lambda: changed)
    with pytest.raises(RuntimeError, match="pbmc68k_reduced.* has changed"):
        pbmc68k()
