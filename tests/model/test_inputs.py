"""Arguments and data that cannot be used: each has an error that names it."""

import warnings

import anndata
import numpy as np
import pytest
from scipy import sparse

from fitting import BATCH, SMALL, fit, train
from mixscvi import MixSCVI


def setup(adata, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MixSCVI.setup_anndata(adata, **kwargs)


@pytest.mark.parametrize("where", ["X", "layer"])
def test_texts_as_counts(where, make_adata):
    adata = make_adata()
    texts = adata.X.astype(object)
    texts[3, 2] = "many"
    kwargs = {}
    if where == "X":
        adata = anndata.AnnData(texts, obs=adata.obs, var=adata.var)
    else:
        adata.layers["counts"], kwargs = texts, {"layer": "counts"}
    with pytest.raises(TypeError, match="'many' of cell 'cell3', gene 'gene2'"):
        setup(adata, **kwargs)


@pytest.mark.parametrize(
    ("argument", "column", "error", "match"),
    [
        ("batch_key", "batch", ValueError, r"batch_key: .*'batch'\] is missing .*first: 'cell3'"),
        ("labels_key", "label", ValueError, r"labels_key: .*'label'\] is missing .*'cell3'"),
        ("categorical_covariate_keys", "donor", ValueError, r"'donor'\] is missing .*'cell3'"),
        ("batch_key", "plate", KeyError, r"batch_key='plate' is no column of adata\.obs.*'donor'"),
        ("continuous_covariate_keys", "donor", TypeError, r"'donor'\] must hold numbers.*'cell0'"),
        ("size_factor_key", "donor", TypeError, r"size_factor_key: .*'donor'\] must hold numbers"),
        ("layer", "counts", KeyError, r"layer='counts' is not in adata\.layers"),
    ],
)
def test_columns_and_layers(argument, column, error, match, make_adata):
    adata = make_adata()
    if error is ValueError:
        adata.obs[column] = adata.obs[column].astype(object)
        adata.obs.loc["cell3", column] = np.nan
    key = [column] if argument.endswith("keys") else column
    with pytest.raises(error, match=match):
        MixSCVI.setup_anndata(adata, **{argument: key})


def test_other_arguments_of_setup(make_adata):
    adata = make_adata()
    adata.obs["mixed"] = np.array(["a", *[1] * 71], dtype=object)
    with pytest.raises(TypeError, match=r"'mixed'\] mixes str with other types in 71 of 72 cells"):
        MixSCVI.setup_anndata(adata, batch_key="mixed")
    with pytest.raises(TypeError, match="must be a list of columns, got 'donor'"):
        MixSCVI.setup_anndata(adata, categorical_covariate_keys="donor")
    with pytest.raises(TypeError, match="adata must be an AnnData, got ndarray"):
        MixSCVI.setup_anndata(adata.X)
    with pytest.raises(ValueError, match="adata must have genes"):
        MixSCVI.setup_anndata(adata[:, :0].copy())
    with pytest.raises(ValueError, match="adata must have cells"):
        MixSCVI.setup_anndata(adata[:0].copy())


@pytest.mark.parametrize("n_obs", [1, 2])
def test_too_few_cells(n_obs, make_adata):
    adata = make_adata()[:n_obs].copy()
    setup(adata)
    model = MixSCVI(adata, **SMALL)
    with (
        pytest.raises(ValueError, match=rf"needs at least two cells to train on, .* of {n_obs}"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"n_hidden": 0}, "n_hidden must be an integer of at least 1"),
        ({"n_latent": -1}, "n_latent must be"),
        ({"n_layers": 1.5}, "n_layers must be"),
        ({"dropout_rate": 2}, "dropout_rate must be a number from 0 to 1"),
        ({"dropout_rate": "0.1"}, "dropout_rate must be a number"),
        ({"gene_likelihood": "zip"}, "gene_likelihood must be one of 'zinb'"),
        ({"dispersion": "cell"}, "dispersion must be one of 'gene'"),
        ({"latent_distribution": "t"}, "latent_distribution must be one of"),
    ],
)
@pytest.mark.parametrize("n_components", [1, 3])
def test_arguments_of_the_networks(n_components, kwargs, match, make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    with pytest.raises((TypeError, ValueError), match=match):
        MixSCVI(adata, n_components=n_components, **kwargs)


def test_too_many_components(make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    with pytest.raises(MemoryError, match=r"n_components=10000000000 .*'amortized'"):
        MixSCVI(adata, n_components=10**10)


@pytest.mark.parametrize(
    ("indices", "error", "match"),
    [
        ([], ValueError, "at least one cell, got none"),
        (["cell3"], TypeError, "got 'cell3' first: take adata.obs_names.get_indexer"),
        ([0.5], TypeError, "positions"),
        ([3, 99], IndexError, "below the 72 cells, got 99"),
        (np.ones(4, dtype=bool), IndexError, r"of the 72 cells, got \(4,\)"),
        (np.zeros(72, dtype=bool), ValueError, "at least one cell"),
    ],
)
def test_indices(indices, error, match, make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2)
    for method in (
        model.get_latent_representation,
        model.get_normalized_expression,
        model.get_elbo,
        model.get_marginal_ll,
        model.get_latent_mixture,
    ):
        with pytest.raises(error, match=match):
            method(indices=indices)
    mask = np.arange(72) < 5
    assert model.get_latent_representation(indices=mask).shape == (5, 3)


def test_a_batch_that_is_new_needs_surgery(make_adata, tmp_path):
    model = fit(MixSCVI, make_adata(), BATCH, n_components=2)
    query = make_adata(n_obs=10, seed=3, batches=("b0", "new"))
    match = r"'batch'\] is 'new' in 4 of 10 cells, first: 'cell2'.*'b0', 'b1'.*load_query_data"
    for method in (model.get_latent_representation, model.get_elbo, model.get_latent_mixture):
        with pytest.raises(ValueError, match=match):
            method(query)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=match):
        MixSCVI.load(tmp_path / "model", query)


def test_genes_that_are_matched_are_unique(make_adata):
    model = fit(MixSCVI, make_adata(), BATCH, n_components=2)
    query = make_adata(n_obs=10, seed=3, batches=("new",))
    query.var_names = ["gene1", *query.var_names[1:]]
    match = "var_names must be unique to be matched, but 1 occur more than once, first: 'gene1'"
    with pytest.raises(ValueError, match=match):
        MixSCVI.prepare_query_anndata(query, model)
    with pytest.raises(ValueError, match=match):
        MixSCVI.load_query_data(query, model, inplace_subset_query_vars=True)
    reference = make_adata()
    reference.var_names = ["gene1", *reference.var_names[1:]]
    setup(reference)
    model = MixSCVI(reference, n_components=2, **SMALL)
    with pytest.raises(ValueError, match="the reference's genes must be unique .*first: 'gene1'"):
        MixSCVI.prepare_query_anndata(make_adata(n_obs=10), model)


def test_the_summary_names_what_training_does(make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    model = MixSCVI(adata, estimator="some_to_all", n_samples=3, objective="miselbo")
    for part in ("n_sampled_components: 1", "n_samples: 3", "objective: miselbo"):
        assert part in model.summary_string


@pytest.mark.parametrize("of", ["obs", "var"])
def test_names_that_are_not_unique_warn(of, make_adata):
    adata = make_adata()
    names = getattr(adata, f"{of}_names").tolist()
    setattr(adata, f"{of}_names", [names[1], *names[1:]])
    with pytest.warns(UserWarning, match=rf"1 of adata\.{of}_names occur .*first: '{names[1]}'"):
        MixSCVI.setup_anndata(adata)
    model = MixSCVI(adata, n_components=2, **SMALL)
    assert np.isfinite(train(model).get_latent_representation()).all()


@pytest.mark.parametrize(
    ("gene_list", "error", "match"),
    [
        (["gene3", "gene1"], ValueError, "1 of its names are of several genes, first: 'gene1'"),
        (["nope"], ValueError, "gene_list has no gene of the model's 20, got 'nope'"),
        ([], ValueError, "gene_list has no gene"),
        ("gene3", TypeError, "must be a list of genes, got 'gene3'"),
    ],
)
def test_genes_chosen_by_name(gene_list, error, match, make_adata):
    adata = make_adata()
    adata.var_names = ["gene1", *adata.var_names[1:]]
    setup(adata)
    model = train(MixSCVI(adata, n_components=2, **SMALL))
    for method in (model.get_normalized_expression, model.posterior_predictive_sample):
        with pytest.raises(error, match=match):
            method(gene_list=gene_list)
        assert method(gene_list=["gene3", "gene4"]).shape == (72, 2)


@pytest.mark.parametrize("kind", ["csr_array", "csc_array"])
@pytest.mark.parametrize("layer", [None, "counts"])
def test_sparse_arrays_train_as_matrices(kind, layer, make_adata):
    latents = []
    for as_kind in (kind, "csr_matrix"):
        adata = make_adata()
        counts = getattr(sparse, as_kind)(adata.X)
        if layer is None:
            adata.X = counts
        else:
            adata.layers[layer] = counts
        model = fit(MixSCVI, adata, {"layer": layer}, n_components=2)
        latents.append(model.get_latent_representation())
    np.testing.assert_array_equal(*latents)
