"""Training minibatches: scvi-tools' own, made faster."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scvi.dataloaders import AnnDataLoader, DataSplitter

from mixscvi import MixSCVI, compiled
from mixscvi.likelihoods import native
from mixscvi.model.data import LeanDataSplitter
from mixscvi.model.loaders import LeanDataLoader


def registered(convert, n_cells=53):
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.4, (n_cells, 17)).astype(np.float32)
    counts[:, 0] += 1
    obs = pd.DataFrame(
        {
            "batch": rng.choice(["a", "b"], n_cells),
            "donor": rng.choice(["x", "y", "z"], n_cells),
            "age": rng.normal(size=n_cells),
            "size": rng.uniform(1, 2, n_cells),
        },
        index=[f"cell{i}" for i in range(n_cells)],
    )
    adata = anndata.AnnData(convert(counts), obs=obs)
    MixSCVI.setup_anndata(
        adata,
        batch_key="batch",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"],
        size_factor_key="size",
    )
    return MixSCVI(adata, n_hidden=8).adata_manager


def minibatches(splitter_cls, manager, **kwargs):
    splitter = splitter_cls(
        manager, train_size=0.8, batch_size=10, shuffle_set_split=False, **kwargs
    )
    splitter.setup()
    torch.manual_seed(3)
    loader = splitter.train_dataloader()
    return loader, [*loader, *loader], torch.rand(())


KINDS = {
    "csr": sparse.csr_matrix,
    "integers": lambda x: sparse.csr_matrix(x.astype(np.int64)),
    "doubles": lambda x: sparse.csr_matrix(x.astype(np.float64)),
    "dense": np.asarray,
    "dense integers": lambda x: x.astype(np.uint16),
    "csc": sparse.csc_matrix,
}


@pytest.mark.filterwarnings("ignore:Training will be faster")
@pytest.mark.parametrize("kind", KINDS)
def test_minibatches_are_those_of_scvi_tools(kind):
    manager = registered(KINDS[kind])
    loader, ours, random = minibatches(LeanDataSplitter, manager)
    assert (loader._lean is None) == (kind == "csc")
    _, theirs, expected_random = minibatches(DataSplitter, manager)
    assert random == expected_random
    assert len(ours) == len(theirs) == 2 * 5
    for got, expected in zip(ours, theirs, strict=True):
        assert got.keys() == expected.keys()
        for key in expected:
            assert got[key].dtype == expected[key].dtype
            assert torch.equal(got[key], expected[key]), key
    assert not torch.equal(ours[0]["X"], ours[5]["X"])  # shuffled in every epoch


def test_entries_of_one_place_are_added_up():
    def twice(counts):
        matrix = sparse.csr_matrix(counts)
        return sparse.csr_matrix(
            (np.repeat(matrix.data, 2), np.repeat(matrix.indices, 2), 2 * matrix.indptr),
            shape=matrix.shape,
        )

    _, ours, _ = minibatches(LeanDataSplitter, registered(twice))
    _, theirs, _ = minibatches(DataSplitter, registered(lambda x: sparse.csr_matrix(2 * x)))
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.equal(got["X"], expected["X"])


@pytest.mark.filterwarnings("ignore:Sparse")
def test_other_loaders_are_left_alone():
    manager = registered(sparse.csr_matrix)
    loader, *_ = minibatches(LeanDataSplitter, manager, load_sparse_tensor=True)
    assert loader._lean is None
    loader, *_ = minibatches(LeanDataSplitter, manager)
    assert loader._lean is not None


def test_loaders_of_the_methods_give_the_same_minibatches():
    manager = registered(sparse.csr_matrix)
    cells = [3, -1, 7]
    ours = next(iter(LeanDataLoader(manager, indices=cells, batch_size=8)))
    theirs = next(iter(AnnDataLoader(manager, indices=cells, batch_size=8)))
    for key in theirs:
        assert torch.equal(ours[key], theirs[key])


def test_nothing_is_compiled_where_numba_is_not(monkeypatch):
    monkeypatch.setattr(compiled, "_failed", True)
    loader, ours, _ = minibatches(LeanDataSplitter, registered(sparse.csr_matrix))
    _, theirs, _ = minibatches(DataSplitter, registered(sparse.csr_matrix))
    assert loader._lean is None
    assert torch.equal(ours[0]["X"], theirs[0]["X"])


def test_a_matrix_with_entries_beyond_its_columns_is_refused():
    indptr, indices, data = np.array([0, 1]), np.array([5], np.int32), np.ones(1, np.float32)
    with pytest.raises(IndexError, match="3 columns"):
        native.dense_rows(np.array([0]), indptr, indices, data, 3, np.float32)
    with pytest.raises(IndexError, match=r"\[0, 1\)"):
        native.dense_rows(np.array([1]), indptr, indices, data, 6, np.float32)
