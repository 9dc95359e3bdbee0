"""Models of data that stay on disk."""

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from anndata.experimental import AnnCollection
from anndata.io import sparse_dataset, write_elem
from scipy import sparse
from scvi.dataloaders import AnnDataLoader, CollectionAdapter
from scvi.model import SCVI

from fitting import SMALL, assert_same_history, assert_same_state, seeded, train
from mixscvi import MixSCVI
from mixscvi.model import rows
from mixscvi.model.loaders import LeanDataLoader, TrainingLoader

CELLS = [50, 3, 41, 3, 20]


def backed(adata, path, mode="r", **kwargs):
    adata.write_h5ad(path, **kwargs)
    return anndata.read_h5ad(path, backed=mode)


def collection(adata, folder):
    """The cells in two files, whose counts are in a layer."""
    parts = []
    for i, some in enumerate((slice(0, 30), slice(30, None))):
        part = adata[some].copy()
        part.layers["counts"] = part.X
        parts.append(backed(part, folder / f"part{i}.h5ad"))
    cells = CollectionAdapter(
        AnnCollection(parts, join_vars="inner", join_obs="inner", label="file")
    )
    cells.uns = {}  # by default all collections share them
    return cells


@pytest.fixture(params=["h5ad", "collection"])
def on_disk(request, make_adata, tmp_path):
    """Cells on disk, the arguments that set them up, and the same cells in memory."""
    adata = make_adata(sparse=True)
    adata.obs["batch"] = adata.obs["batch"].astype("category")
    if request.param == "h5ad":
        return backed(adata, tmp_path / "cells.h5ad"), {"batch_key": "batch"}, adata
    cells = collection(adata, tmp_path)
    adata.obs_names = cells.obs_names
    adata.layers["counts"] = adata.X
    return cells, {"batch_key": "batch", "layer": "counts"}, adata


def made(cls, adata, setup, **kwargs):
    cls.setup_anndata(adata, **setup)
    scvi.settings.seed = 0
    return cls(adata, **{**SMALL, **kwargs})


@pytest.mark.parametrize("n_components", [1, 4])
def test_methods_give_what_they_give_of_data_in_memory(on_disk, n_components, tmp_path):
    cells, setup, adata = on_disk
    model = train(made(MixSCVI, cells, setup, n_components=n_components))
    model.save(tmp_path / "model")
    again = MixSCVI.load(tmp_path / "model", cells)
    other = MixSCVI.load(tmp_path / "model", adata)
    assert_same_state(again, other)
    for method, kwargs in {
        "get_latent_representation": {},
        "get_latent_mixture": {},
        "get_elbo": {},
        "get_reconstruction_error": {},
        "get_marginal_ll": {"n_mc_samples": 20, "return_mean": False},
        "get_normalized_expression": {"gene_list": ["gene3"], "n_samples": 2},
        "get_latent_library_size": {"give_mean": False},
        "get_posterior_diagnostics": {"n_mc_samples": 50},
    }.items():
        for chosen in ({}, {"indices": CELLS}):
            expected = seeded(getattr(other, method), **kwargs, **chosen)
            result = seeded(getattr(again, method), **kwargs, **chosen)
            if isinstance(expected, pd.DataFrame):
                pd.testing.assert_frame_equal(result, expected)
            else:
                np.testing.assert_array_equal(result, expected, err_msg=method)
    latents = again.get_latent_representation()
    np.testing.assert_allclose(
        again.get_latent_representation(indices=CELLS), latents[CELLS], rtol=1e-5, atol=1e-6
    )


DIFFERENCES = {
    "groups": {"groupby": "label", "group1": "type0", "group2": "type1"},
    "each against the rest": {"groupby": "label", "mode": "change", "pseudocounts": 1e-4},
    "positions": {"idx1": [0, 5, 9], "idx2": [1, 2, 60]},
    "a query": {"idx1": "label == 'type1'"},
    "a subset": {"groupby": "label", "group1": "type0", "subset_idx": np.arange(40)},
    "the exact posterior": {
        "groupby": "label",
        "group1": "type0",
        "weights": "adapted",
        "importance_weighting_kwargs": {"n_mc_samples": 50, "progress": False},
    },
}


@pytest.mark.filterwarnings("ignore:.*k-hat")
@pytest.mark.parametrize("groups", DIFFERENCES.values(), ids=DIFFERENCES)
def test_differential_expression(on_disk, groups, tmp_path):
    cells, setup, adata = on_disk
    model = train(made(MixSCVI, cells, setup, n_components=2))
    model.save(tmp_path / "model")
    table = seeded(model.differential_expression, silent=True, **groups)
    other = MixSCVI.load(tmp_path / "model", adata)
    expected = seeded(other.differential_expression, silent=True, **groups)
    pd.testing.assert_frame_equal(table, expected, rtol=1e-4, check_dtype=False)
    bare = seeded(model.differential_expression, silent=True, all_stats=False, **groups)
    assert not any(column.startswith("raw_mean") for column in bare)


def test_pseudocounts_are_estimated_of_the_cells_compared(on_disk, tmp_path):
    cells, setup, adata = on_disk
    model = train(made(MixSCVI, cells, setup, n_components=2))
    compared = {"groupby": "label", "group1": "type1", "mode": "change", "silent": True}
    if type(cells) is CollectionAdapter:
        # scvi-tools would take the first two cells for the group, and the order of genes differs.
        with pytest.raises(ValueError, match="pseudocounts must be given for mode='change'"):
            model.differential_expression(**compared)
        table = model.differential_expression(**compared, pseudocounts=1e-4)
        assert (table["pseudocounts"] == 1e-4).all()
        return
    table = seeded(model.differential_expression, **compared)
    model.save(tmp_path / "model")
    other = MixSCVI.load(tmp_path / "model", adata)
    expected = seeded(other.differential_expression, **compared)
    assert expected["pseudocounts"].iloc[0] > 0
    pd.testing.assert_frame_equal(table, expected, rtol=1e-4, check_dtype=False)


def test_differential_abundance(on_disk, tmp_path):
    cells, setup, adata = on_disk
    model = train(made(MixSCVI, cells, setup, n_components=2))
    with pytest.raises(KeyError, match="sample_key='sample' is no column of adata.obs"):
        model.differential_abundance(sample_key="sample")
    if type(cells) is CollectionAdapter:
        with pytest.raises(ValueError, match="adata.obsm, which this collection lacks"):
            model.differential_abundance(sample_key="donor")
        for part in cells.adatas:
            part.obsm["X_any"] = np.zeros((part.n_obs, 2))
        cells = CollectionAdapter(AnnCollection(cells.adatas, join_obsm="inner", label="file"))
        cells.uns = {}
        model = train(made(MixSCVI, cells, setup, n_components=2))
    model.differential_abundance(sample_key="donor")
    found = cells.obsm["da_log_probs"]
    model.save(tmp_path / "model")
    other = MixSCVI.load(tmp_path / "model", adata)
    other.differential_abundance(sample_key="donor")
    expected = adata.obsm["da_log_probs"]
    assert found.shape == (72, 3)
    np.testing.assert_allclose(found[expected.columns], expected, rtol=1e-4)
    assert found.index.equals(cells.obs_names)


def test_one_component_is_scvi(on_disk):
    cells, setup, _ = on_disk
    kwargs = {"check_val_every_n_epoch": 1}
    ours = train(made(MixSCVI, cells, setup, n_components=1, likelihood="reference"), **kwargs)
    theirs = train(made(SCVI, cells, setup), **kwargs)
    assert_same_state(ours, theirs)
    assert_same_history(ours, theirs)


def test_a_vamp_prior_starts_from_cells_on_disk(on_disk):
    cells, setup, _ = on_disk
    model = train(made(MixSCVI, cells, setup, prior="vamp", n_prior_components=5))
    assert np.isfinite(model.get_latent_representation()).all()


def test_a_saved_model_has_its_data_and_leaves_their_file_alone(on_disk, tmp_path):
    cells, setup, _ = on_disk
    model = train(made(MixSCVI, cells, setup))
    if isinstance(cells, CollectionAdapter) and type(cells) is CollectionAdapter:
        with pytest.raises(ValueError, match="the model's data are a collection"):
            model.save(tmp_path / "model", save_anndata=True)
        return
    latents = model.get_latent_representation()
    model.save(tmp_path / "model", save_anndata=True)
    assert cells.filename == tmp_path / "cells.h5ad"
    np.testing.assert_array_equal(model.get_latent_representation(), latents)
    loaded = MixSCVI.load(tmp_path / "model")
    np.testing.assert_allclose(loaded.get_latent_representation(), latents, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_components", [1, 3])
def test_minified_data_are_in_memory(on_disk, n_components):
    cells, setup, adata = on_disk
    model = train(made(MixSCVI, cells, setup, n_components=n_components))
    with pytest.raises(ValueError, match="copies the counts, which are on disk"):
        model.minify_adata("latent_posterior_parameters_with_counts")
    if type(cells) is CollectionAdapter:
        with pytest.raises(ValueError, match="the model's data are a collection"):
            model.minify_adata()
        return
    latents = model.get_latent_representation()
    samples = seeded(model.posterior_predictive_sample).todense()
    model.minify_adata()
    assert not model.adata.isbacked
    assert cells.isbacked
    np.testing.assert_array_equal(model.get_latent_representation(), latents)
    np.testing.assert_array_equal(seeded(model.posterior_predictive_sample).todense(), samples)
    library = model.adata.obs["observed_lib_size"]
    np.testing.assert_allclose(library, adata.X.sum(1).A1, rtol=1e-6)


def test_a_collection_needs_a_layer(make_adata, tmp_path):
    cells = collection(make_adata(sparse=True), tmp_path)
    with pytest.raises(ValueError, match=r"layer must name .*'counts'.* got None"):
        MixSCVI.setup_anndata(cells)
    with pytest.raises(KeyError, match="layer='spliced' is not in"):
        MixSCVI.setup_anndata(cells, layer="spliced")


def test_bad_counts_on_disk_are_named(make_adata, tmp_path):
    adata = make_adata(sparse=True)
    adata.X[40, 3] = np.nan
    cells = backed(adata, tmp_path / "cells.h5ad")
    MixSCVI.setup_anndata(cells)
    with pytest.raises(ValueError, match=r"NaN .* in 1 of 72 cells, first: 'cell40'"):
        MixSCVI(cells)


# How rows are read.

FILES = {
    "as anndata writes it": {},
    "compressed": {"compression": "gzip"},
    "open for writing": {"mode": "r+"},
    "integers": {"dtype": np.int64},
    "doubles": {"dtype": np.float64},
    "short integers": {"dtype": np.uint16},
    "csc": {"convert": sparse.csc_matrix},
    "dense": {"convert": lambda x: x.toarray()},
    "empty rows": {"empty": True},
}


def assert_same_minibatches(ours, theirs):
    ours, theirs = [*ours], [*theirs]
    assert len(ours) == len(theirs)
    for got, expected in zip(ours, theirs, strict=True):
        assert got.keys() == expected.keys()
        for key in expected:
            assert got[key].dtype == expected[key].dtype
            assert torch.equal(got[key], expected[key]), key


@pytest.mark.filterwarnings("ignore:Training will be faster")
@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_minibatches_are_those_of_data_in_memory(file, make_adata, tmp_path):
    file = dict(file)
    adata = make_adata(sparse=True)
    if file.pop("empty", False):
        kept = np.ones((72, 1), dtype=np.float32)
        kept[[0, 20, 41, 71]] = 0
        adata.X = sparse.csr_matrix(adata.X.multiply(kept))
    adata.X = file.pop("convert", lambda x: x)(adata.X.astype(file.pop("dtype", np.float32)))
    cells = backed(adata, tmp_path / "cells.h5ad", **file)
    managers = []
    for data in (cells, adata):
        SCVI.setup_anndata(data, batch_key="batch", continuous_covariate_keys=["age"])
        managers.append(SCVI._get_most_recent_anndata_manager(data))
    manager, in_memory = managers
    order = np.random.default_rng(0).permutation(72)
    for chosen in (order, CELLS, None):
        options = {"indices": chosen, "batch_size": 10}
        assert_same_minibatches(
            LeanDataLoader(manager, **options), AnnDataLoader(in_memory, **options)
        )
    torch.manual_seed(0)
    ours = [*TrainingLoader(manager, indices=order, batch_size=10, shuffle=True)]
    torch.manual_seed(0)
    assert_same_minibatches(
        ours, AnnDataLoader(manager, indices=order, batch_size=10, shuffle=True)
    )


def entries(chunks=None, **kwargs):
    values = np.arange(1, 101, dtype=np.float32)
    return lambda file: file.create_dataset("values", data=values, chunks=chunks, **kwargs)


@pytest.mark.parametrize(
    ("create", "mode", "direct"),
    [
        (entries(), "r", True),
        (entries(chunks=(7,)), "r", True),
        (entries(chunks=(7,)), "r+", False),
        (entries(chunks=(7,), compression="gzip"), "r", False),
        (entries(chunks=(7,), shuffle=True), "r", False),
        (lambda file: file.create_dataset("values", shape=(100,), dtype="f4"), "r", False),
    ],
    ids=["contiguous", "chunks", "open for writing", "compressed", "shuffled", "not written"],
)
def test_entries_of_a_file(create, mode, direct, tmp_path):
    with h5py.File(tmp_path / "file.h5", "w") as file:
        expected = create(file)[:]
    with h5py.File(tmp_path / "file.h5", mode) as file:
        reader = rows._Entries(file["values"])
        assert (reader._offsets is not None) == direct
        runs = [(0, 3), (5, 5), (6, 29), (99, 100)]
        np.testing.assert_array_equal(
            reader.read(runs), np.concatenate([expected[slice(*run)] for run in runs])
        )


def test_entries_of_one_place_are_added_up(tmp_path):
    matrix = sparse.csr_matrix(([1.0, 2.0, 4.0], [1, 1, 0], [0, 2, 3]), shape=(2, 3))
    with h5py.File(tmp_path / "file.h5", "w") as file:
        write_elem(file, "X", matrix)
    with h5py.File(tmp_path / "file.h5", "r") as file:
        dense = rows._CsrFile(sparse_dataset(file["X"])).rows(np.array([0, 1]))
    np.testing.assert_array_equal(dense, matrix.toarray())


def test_a_damaged_part_of_a_collection_is_named(make_adata, tmp_path):
    adata = make_adata(sparse=True)
    parts = []
    for some in (slice(0, 30), slice(30, None)):
        part = adata[some].copy()
        part.layers["counts"] = part.X.copy()
        parts.append(part)
    parts[1].layers["counts"].indptr = parts[1].layers["counts"].indptr.astype(np.uint32)
    parts[1].layers["counts"].indptr[2] = 4_000_000_000
    cells = CollectionAdapter(AnnCollection(parts, join_vars="inner", label="file"))
    cells.uns = {}
    expected = r"adata\.layers\['counts'\] of part 1 is damaged: its rows do not lie .* first at 2"
    with pytest.raises(ValueError, match=expected):
        MixSCVI.setup_anndata(cells, layer="counts")


def test_a_damaged_column_in_a_file_of_a_collection_is_named(make_adata, tmp_path):
    """SciPy gathers rows of it before they can be looked at: the process crashed."""
    adata = make_adata(sparse=True)
    parts = []
    for i, some in enumerate((slice(0, 30), slice(30, None))):
        part = adata[some].copy()
        part.X = part.X.tocsc()
        part.layers["counts"] = part.X.copy()
        part.write_h5ad(tmp_path / f"{i}.h5ad")
    with h5py.File(tmp_path / "1.h5ad", "r+") as file:
        file["layers/counts/indices"][3] = 10**6
    parts = [anndata.read_h5ad(tmp_path / f"{i}.h5ad", backed="r") for i in range(2)]
    cells = CollectionAdapter(AnnCollection(parts, join_vars="inner", label="file"))
    cells.uns = {}
    expected = r"adata\.layers\['counts'\] of part 1 is damaged: it has values outside its shape"
    with pytest.raises(ValueError, match=expected):
        MixSCVI.setup_anndata(cells, layer="counts")
