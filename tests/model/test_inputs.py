"""Arguments and data that cannot be used: each has an error that names it."""

import warnings
from functools import partial

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
from scipy import sparse

from fitting import BATCH, SMALL, fit, seeded, train
from mixscvi import MixSCANVI, MixSCVI

LABELS = {"labels_key": "label", "unlabeled_category": "type0"}


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
    with pytest.raises(
        TypeError, match=r"batch_key must be the name of a column .*got \['batch'\]"
    ):
        MixSCVI.setup_anndata(adata, batch_key=["batch"])
    for keys in ("donor", 3):
        with pytest.raises(TypeError, match=f"must be a list of columns, got {keys!r}"):
            MixSCVI.setup_anndata(adata, categorical_covariate_keys=keys)
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
        ({"use_batch_norm": "yes"}, "use_batch_norm must be one of 'encoder'"),
        ({"use_layer_norm": True}, "use_layer_norm must be one of 'encoder'"),
        ({"encode_covariates": "no"}, "encode_covariates must be True or False, got 'no'"),
        ({"deeply_inject_covariates": "no"}, "deeply_inject_covariates must be True or False"),
        ({"use_observed_lib_size": "no"}, "use_observed_lib_size must be True or False"),
        ({"batch_representation": "x"}, "batch_representation must be one of 'one-hot'.* got 'x'"),
        ({"var_activation": "exp"}, "var_activation must be a function of tensors, got 'exp'"),
        ({"extra_encoder_kwargs": 5}, "extra_encoder_kwargs must be a dictionary .*, got 5"),
        ({"batch_embedding_kwargs": "x"}, "batch_embedding_kwargs must be a dictionary"),
        ({"n_input": 5}, "n_input is taken from the data, got 5: leave it out"),
        ({"use_size_factor_key": "f"}, "use_size_factor_key is taken from the data, got 'f'"),
        ({"n_foo": 2}, r"there is no argument 'n_foo', got 2: expected \[.*'var_activation'"),
    ],
)
@pytest.mark.parametrize("n_components", [1, 3])
def test_arguments_of_the_networks(n_components, kwargs, match, make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    with pytest.raises((TypeError, ValueError), match=match):
        MixSCVI(adata, n_components=n_components, **kwargs)


@pytest.mark.parametrize("is_known", [True, False], ids=["memory known", "allocator asked"])
def test_too_many_components(is_known, make_adata, monkeypatch):
    if not is_known:
        monkeypatch.setattr("mixscvi.model.base.physical_memory", lambda: None)
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    with pytest.raises(MemoryError, match=r"n_components=10000000000 .*'amortized'"):
        MixSCVI(adata, n_components=10**10)


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_latent": 10**9},
        {"n_hidden": 10**5, "n_layers": 9},
        {"n_prior_components": 10**9},
        {"n_hidden": 2 * 10**7},  # of whose weights most are of the 20 genes
    ],
)
def test_too_large_for_the_memory_of_the_machine(sizes, make_adata, monkeypatch):
    """Nothing is made: the system might hand out memory that it does not have."""
    monkeypatch.setattr("mixscvi.model.base.physical_memory", lambda: 2**33)
    monkeypatch.setattr(scvi.model.SCVI, "__init__", lambda *_, **__: pytest.fail("it is made"))
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    expected = ".*".join(f"{name}={value}" for name, value in sizes.items())
    with pytest.raises(MemoryError, match=f"{expected}.* does not fit into memory: choose"):
        MixSCVI(adata, **{"prior": "mog", "n_components": 2, "n_latent": 1, **sizes})


@pytest.mark.filterwarnings("ignore:components are dead")
@pytest.mark.parametrize("cls", [MixSCVI, MixSCANVI])
def test_steps_too_large_for_the_memory_of_the_machine(cls, make_adata, monkeypatch):
    """Components of one unit each have few weights, and a draw of each cell each."""
    adata = make_adata()
    setup = {} if cls is MixSCVI else {"labels_key": "label", "unlabeled_category": "type0"}
    cls.setup_anndata(adata, **setup)
    model = cls(adata, n_components=300, n_hidden=1, n_latent=1)
    monkeypatch.setattr("mixscvi.model.memory.physical_memory", lambda: 2**21)
    expected = r"batch_size=72 cells with n_components=300, .* does not fit into memory: choose .*"
    with pytest.raises(MemoryError, match=expected + r"at least \d+ GiB"):
        model.train(max_epochs=1, train_size=1.0)
    assert not model.is_trained
    model.train(max_epochs=1, train_size=1.0, batch_size=9, enable_progress_bar=False)


@pytest.mark.parametrize(
    ("kind", "as_kind"),
    [
        ("float16", np.asarray),
        ("longdouble", np.asarray),
        ("longdouble", sparse.csr_matrix),
        (">f4", np.asarray),
        (">i8", np.asarray),
    ],
)
def test_numbers_of_any_size_and_byte_order_are_counts(kind, as_kind, make_adata):
    latents = []
    for dtype in (kind, "float32"):
        adata = make_adata()
        adata.layers["counts"] = as_kind(adata.X).astype(dtype)
        model = fit(MixSCVI, adata, {"layer": "counts"}, n_components=2)
        latents.append(model.get_latent_representation())
    np.testing.assert_array_equal(*latents)


@pytest.mark.parametrize(
    ("indices", "error", "match"),
    [
        ([], ValueError, "at least one cell, got none"),
        (["cell3"], TypeError, "got 'cell3' first: take adata.obs_names.get_indexer"),
        ([0.5], TypeError, "positions"),
        ([3, 72], IndexError, "below the 72 cells, got 72"),
        ([3, -73], IndexError, "below the 72 cells, got -73"),
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


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("layer", [None, "counts"])
def test_sparse_arrays_of_other_data(layer, view, make_adata):
    model = fit(MixSCVI, make_adata(layer=layer, sparse=True), {"layer": layer}, n_components=2)
    latents = []
    for kind in (sparse.csr_array, sparse.csr_matrix):
        other = make_adata(n_obs=30, seed=3, layer=layer, sparse=True)
        if layer is None:
            other.X = kind(other.X)
        else:
            other.layers[layer] = kind(other.layers[layer])
        latents.append(model.get_latent_representation(other[:20] if view else other))
    np.testing.assert_array_equal(*latents)


@pytest.mark.parametrize("indices", [3, slice(0, 5), "cell3", [[0, 1]], [[0], [1, 2]]])
def test_indices_that_are_no_sequence(indices, make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2)
    for method in (model.get_latent_representation, model.get_posterior_diagnostics):
        with pytest.raises(TypeError, match="indices must be one sequence of positions of cells"):
            method(indices=indices)


def test_a_list_of_booleans_is_a_mask(make_adata):
    """Of which scvi-tools takes cells 0 and 1 many times."""
    model = fit(MixSCVI, make_adata(), n_components=2)
    mask = np.arange(72) % 3 == 1
    for method in (
        model.get_latent_representation,
        model.get_normalized_expression,
        partial(model.get_latent_library_size, give_mean=False),
    ):
        given, expected = (
            seeded(method, indices=indices) for indices in (mask.tolist(), np.flatnonzero(mask))
        )
        np.testing.assert_array_equal(given, expected)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer of at least 1, got 2.5"),
        ({"max_epochs": -2}, "max_epochs must be an integer of at least -1, got -2"),
        ({"max_epochs": "all"}, "max_epochs must be an integer of at least -1, got 'all'"),
        ({"train_size": 0}, "train_size must be a share of the cells, got 0"),
        ({"train_size": 1.5}, "train_size must be a share of the cells, got 1.5"),
        ({"train_size": "0.9"}, "train_size must be a share of the cells, got '0.9'"),
        ({"validation_size": 1}, "validation_size must be a share of the cells, got 1"),
        (
            {"max_epoch": 3},
            r"train\(\) takes no argument 'max_epoch', got 3: did you mean 'max_epochs'",
        ),
        (
            {"plan_kwargs": {"learning_rate": 1}},
            r"plan_kwargs of train\(\) takes no argument 'learning_rate', got 1",
        ),
        (
            {"train_size": 0.9, "validation_size": 0.5},
            r"train_size \+ validation_size must be at most 1, got 0.9 \+ 0.5",
        ),
    ],
)
@pytest.mark.parametrize("cls", [MixSCVI, MixSCANVI])
def test_arguments_of_train(cls, kwargs, match, make_adata):
    adata = make_adata()
    cls.setup_anndata(adata, **(LABELS if cls is MixSCANVI else {}))
    model = cls(adata, n_components=2, **SMALL)
    with pytest.raises((TypeError, ValueError), match=match):
        model.train(accelerator="cpu", **kwargs)
    assert not model.is_trained


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"n_samples": 0}, "n_samples must be an integer of at least 1, got 0"),
        ({"n_samples_overall": 0}, "n_samples_overall must be an integer of at least 1, got 0"),
        ({"library_size": "own"}, "library_size must be 'latent' or a number, got 'own'"),
        ({"library_size": -1}, "library_size must be 'latent' or above zero, got -1"),
        ({"library_size": 0}, "library_size must be 'latent' or above zero, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        (
            {"transform_batch": ["b0", "new"]},
            "transform_batch must be of the model's batches, 'b0', 'b1', got 'new'",
        ),
    ],
)
def test_arguments_of_expression(kwargs, match, make_adata):
    model = fit(MixSCVI, make_adata(), BATCH, n_components=2)
    for weights in ("uniform", "adapted"):
        with pytest.raises((TypeError, ValueError), match=match):
            model.get_normalized_expression(**kwargs, weights=weights)
    for name in kwargs.keys() & {"n_samples", "batch_size"}:
        with pytest.raises(ValueError, match=match):
            model.posterior_predictive_sample(**{name: 0})


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({}, ValueError, "give groupby, a column of adata.obs, or the cells to compare as idx1"),
        ({"groupby": "sort"}, KeyError, "groupby='sort' is no column of adata.obs, .*'label'"),
        ({"group1": "T"}, ValueError, r"group1='T' is no value of .*'label'\], which has 'type0'"),
        ({"group1": ["type1", "T"]}, ValueError, "group1='T' is no value"),
        ({"group1": "type1", "group2": "T"}, ValueError, "group2='T' is no value"),
        ({"idx1": []}, ValueError, "idx1 must choose at least one cell, got none"),
        ({"idx1": ["cell1"]}, TypeError, "idx1 must be positions .*, got 'cell1' first"),
        ({"idx1": [0, 99]}, IndexError, "idx1 must be below the 72 cells, got 99"),
        ({"idx1": [0], "idx2": [99]}, IndexError, "idx2 must be below the 72 cells, got 99"),
        ({"idx1": np.ones(5, bool)}, IndexError, "idx1 as a mask must be of the 72 cells"),
        ({"idx1": "age > 1e9"}, ValueError, "idx1='age > 1e9' chooses no cell"),
        ({"idx1": "sort == 1"}, ValueError, "idx1='sort == 1' is no query of adata.obs, .*'sort'"),
        ({"idx1": "age >"}, ValueError, "idx1='age >' is no query of adata.obs"),
        ({"groupby": "label", "mode": "both"}, ValueError, "mode must be one of 'vanilla'"),
    ],
)
def test_what_cannot_be_compared(kwargs, error, match, make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2)
    if "group1" in kwargs:
        kwargs = {"groupby": "label", **kwargs}
    with pytest.raises(error, match=match):
        model.differential_expression(**kwargs, silent=True)
    assert "_scvi_temp_de" not in model.adata.obs


def test_cells_to_compare_as_scvi_tools_takes_them(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2)
    mask = model.adata.obs["label"].to_numpy() == "type1"
    tables = [
        seeded(model.differential_expression, idx1=cells, silent=True)
        for cells in (mask, mask.tolist(), np.where(mask), "label == 'type1'")
    ]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])


@pytest.mark.parametrize("of", [tuple, np.array, pd.Index])
def test_columns_need_not_be_a_list(of, make_adata):
    one, other = make_adata(), make_adata()
    MixSCVI.setup_anndata(one, categorical_covariate_keys=["batch"])
    MixSCVI.setup_anndata(other, categorical_covariate_keys=of(["batch"]))
    expected, registered = (
        MixSCVI(adata, n_components=2, **SMALL).adata_manager.get_from_registry(
            "extra_categorical_covs"
        )
        for adata in (one, other)
    )
    pd.testing.assert_frame_equal(registered, expected)


@pytest.mark.parametrize(
    "name", ["extra_encoder_kwargs", "extra_decoder_kwargs", "batch_embedding_kwargs"]
)
def test_what_networks_are_made_of_is_known(name, make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata, batch_key="batch")
    options = {**SMALL, "batch_representation": "embedding", name: {"zz": 3}}
    with pytest.raises(TypeError, match=f"{name} takes no argument 'zz', got 3"):
        MixSCVI(adata, n_components=2, **options)


@pytest.mark.parametrize("n_components", [1, 2])
@pytest.mark.parametrize("gene_likelihood", ["poisson", "normal"])
def test_methods_of_negative_binomials(gene_likelihood, n_components, make_adata):
    options = {"n_components": n_components, "gene_likelihood": gene_likelihood}
    model = fit(MixSCVI, make_adata(), {"batch_key": "batch"}, **options)
    named = f"needs the dispersion of a negative binomial.* gene_likelihood='{gene_likelihood}'"
    importance = {"weights": "importance", "n_samples_overall": 9}
    for method, kwargs in (
        (model.get_likelihood_parameters, {}),
        (model.get_feature_correlation_matrix, {}),
        (model.get_normalized_expression, importance),
        (model.differential_expression, {"groupby": "batch", "weights": "importance"}),
    ):
        with pytest.raises(ValueError, match=named):
            method(**kwargs)


@pytest.mark.parametrize("n_components", [1, 2])
@pytest.mark.parametrize("argument", ["size_factor_key", "continuous_covariate_keys"])
def test_categories_that_are_numbers(argument, n_components, make_adata):
    latents = []
    for convert in (np.asarray, pd.Categorical):
        adata = make_adata()
        adata.obs["number"] = convert(np.resize([1.5, 2.5, 4.0], adata.n_obs))
        column = "number" if argument == "size_factor_key" else ["number"]
        model = fit(MixSCVI, adata, {argument: column}, n_components=n_components)
        latents.append(model.get_latent_representation())
    np.testing.assert_array_equal(*latents)
