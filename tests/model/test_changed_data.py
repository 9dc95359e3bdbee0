"""Data that the user changes in place after a model was made of them."""

import warnings

import numpy as np
import pytest
import scanpy as sc

from fitting import SMALL, fit, train
from mixscvi import MixSCVI

METHODS = {
    "train": train,
    "get_latent_representation": lambda model: model.get_latent_representation(),
    "get_marginal_ll": lambda model: model.get_marginal_ll(n_mc_samples=4),
    "get_elbo": lambda model: model.get_elbo(),
    "get_normalized_expression": lambda model: model.get_normalized_expression(),
}


def scale(adata):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "zero-centering a sparse")
        sc.pp.scale(adata)


@pytest.fixture(params=[False, True], ids=["dense", "sparse"])
def adata(request, make_adata):
    adata = make_adata(sparse=request.param)
    MixSCVI.setup_anndata(adata)
    return adata


@pytest.mark.parametrize("method", METHODS)
def test_scaled_counts(adata, method):
    model = fit(MixSCVI, adata, n_components=2)
    scale(adata)
    with pytest.raises(ValueError, match=r"adata\.X has negative values in .* cells, first: 'cell"):
        METHODS[method](model)


@pytest.mark.parametrize("method", METHODS)
def test_normalized_counts(adata, method):
    model = fit(MixSCVI, adata, n_components=2)
    sc.pp.normalize_total(adata, target_sum=1_000)
    sc.pp.log1p(adata)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        METHODS[method](model)
    what = "adata.X has changed since the model was made"
    lines = {w.filename for w in caught if str(w.message).startswith(what)}
    # The innermost line of the user's.
    expected = __file__ if method != "train" else train.__code__.co_filename
    assert lines == {expected}


def test_emptied_cells(adata):
    model = MixSCVI(adata, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.X[3] = 0
    with pytest.raises(ValueError, match="no counts at all in 1 of 72 cells, first: 'cell3'"):
        train(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("genes", "what"),
    [(np.arange(20)[::-1], "another order, first at 0"), (np.arange(12), "8 genes are missing")],
    ids=["order", "subset"],
)
def test_other_genes(adata, method, genes, what):
    model = fit(MixSCVI, adata, n_components=2)
    adata._inplace_subset_var(genes)
    with pytest.raises(ValueError, match=what):
        METHODS[method](model)


def test_data_that_had_fractions_or_are_what_they_were(adata, make_adata):
    """Nothing is said of what was known when the model was made."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "adata.X has changed")
        train(fit(MixSCVI, adata, n_components=2))
        corrected = make_adata()
        corrected.X = corrected.X + 0.25
        with pytest.warns(UserWarning, match="does not contain unnormalized count data"):
            MixSCVI.setup_anndata(corrected)
        train(MixSCVI(corrected, n_components=2, **SMALL)).get_latent_representation()


def test_fewer_cells_are_fine(adata):
    model = MixSCVI(adata, n_components=2, **SMALL)
    adata._inplace_subset_obs(np.arange(40))
    assert train(model).get_latent_representation().shape == (40, 3)


def test_a_training_takes_its_own_batches(make_adata):
    """scvi-tools notes codes in the AnnData, where those of another model may have come since."""
    adata = make_adata()
    MixSCVI.setup_anndata(adata, batch_key="batch")
    model = MixSCVI(adata, n_components=2, **SMALL)
    MixSCVI.setup_anndata(adata)  # for another model: one batch
    train(model)
    codes = np.unique(model.adata_manager.get_from_registry("batch"))
    assert codes.tolist() == [0, 1]
