"""Arguments of the methods of a trained model: named, whichever method they are given to."""

import numpy as np
import pandas as pd
import pytest

from fitting import BATCH, fit
from mixscvi import MixSCANVI, MixSCVI

LABELS = {"labels_key": "label", "unlabeled_category": "type0", **BATCH}


@pytest.fixture(scope="module")
def models(make_adata):
    return (
        fit(MixSCVI, make_adata(), BATCH, n_components=2),
        fit(MixSCANVI, make_adata(), LABELS, n_components=2),
    )


WRONG = {
    "n_samples": (
        [0, 1.5, "2", None],
        ["get_likelihood_parameters", "get_feature_correlation_matrix"],
    ),
    "mc_samples": ([0, 2.5, None], ["get_latent_representation"]),
    "rna_size_factor": ([0, np.nan, "x"], ["get_feature_correlation_matrix"]),
    "correlation_type": (["kendall", None], ["get_feature_correlation_matrix"]),
    "transform_batch": (
        ["b7", [], ["b0", 7]],
        ["get_feature_correlation_matrix", "posterior_predictive_sample"],
    ),
    "gene_list": ([3, "gene0", []], ["posterior_predictive_sample", "get_normalized_expression"]),
    "dof": ([0, "x", np.nan], ["get_aggregated_posterior"]),
    "threshold": ([-1, "x", None], ["get_active_units"]),
    "adapt_kwargs": ([3, {"n_draw": 1}], ["get_adapted_posterior"]),
    "adata": ([3, pd.DataFrame()], ["get_elbo", "get_latent_mixture", "differential_expression"]),
    "dataloader": (
        [3, "cells", []],
        ["get_elbo", "get_latent_mixture", "get_normalized_expression", "get_latent_library_size"],
    ),
    "batch_size": ([0, None, "x"], ["differential_abundance"]),
    "num_cells_posterior": ([0, 1.5], ["differential_abundance"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_named(name, models):
    values, methods = WRONG[name]
    for value in values:
        for method in methods:
            for model in models:
                kwargs = {"groupby": "batch"} if method == "differential_expression" else {}
                kwargs |= {"sample_key": "batch"} if method == "differential_abundance" else {}
                with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
                    getattr(model, method)(**kwargs, **{name: value})


def test_cells_that_are_not_there(models, make_adata):
    for model in models:
        for method in (model.get_elbo, model.get_latent_mixture, model.posterior_predictive_sample):
            with pytest.raises(ValueError, match=r"adata must have cells, got shape \(0, 20\)"):
                method(make_adata()[:0].copy())


@pytest.mark.parametrize("cls", [MixSCVI, MixSCANVI])
def test_a_model_without_data_says_so(cls, models, tmp_path):
    model = models[cls is MixSCANVI]
    model.save(tmp_path / "model")
    without = cls.load(tmp_path / "model", False)
    for method, kwargs in (
        ("get_elbo", {}),
        ("get_normalized_expression", {}),
        ("posterior_predictive_sample", {}),
        ("get_likelihood_parameters", {}),
        ("differential_abundance", {"sample_key": "batch"}),
        ("differential_expression", {"groupby": "batch"}),
        ("get_latent_representation", {}),
        ("minify_adata", {}),
    ):
        # Later versions of scvi-tools look for data themselves, in some methods.
        with pytest.raises(ValueError, match="the model holds n|Pass `adata` or"):
            getattr(without, method)(**kwargs)


@pytest.mark.parametrize("cls", [MixSCVI, MixSCANVI])
def test_what_no_model_is_made_of(cls, make_adata):
    with pytest.raises(TypeError, match="adata must be an AnnData, got int"):
        cls(3)
    with pytest.raises(TypeError, match="registry must be that of a data module, got 3"):
        cls(registry=3)
    with pytest.raises(ValueError, match=r"registry must have 'field_registries', got \[\]"):
        cls(registry={})


TRAINED = {
    "n_samples_per_label": [0, -1, 2.5, "x"],
    "lr": [-1, "x", np.nan],
    "weight_decay": ["x"],
    "classification_ratio": ["x", -3],
}


@pytest.mark.parametrize("name", TRAINED)
def test_training(name, make_adata):
    adata = make_adata()
    MixSCANVI.setup_anndata(adata, **LABELS)
    model = MixSCANVI(adata, n_components=2)
    for value in TRAINED[name]:
        kwargs = {name: value}
        if name != "n_samples_per_label":
            kwargs = {"plan_kwargs": kwargs}
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
            model.train(**kwargs)


def test_cells_chosen_by_a_tuple(models):
    for model in models:
        names = model.adata.obs_names[[3, 5]].tolist()
        tables = (
            model.get_normalized_expression(indices=(3, 5)),
            model.get_posterior_diagnostics(indices=(3, 5), n_mc_samples=30),
            model.get_posterior_diagnostics(
                indices=(3, 5), n_mc_samples=30, proposal="adapted", progress=False
            ),
        )
        assert [table.index.tolist() for table in tables] == [names] * 3
    assert models[1].predict(indices=(3, 5), soft=True).index.tolist() == names


COMPARED = {
    "all cells": (
        {"idx1": "batch in ['b0', 'b1']"},
        "idx1 chooses all 72 cells, which leaves none to compare with",
    ),
    "one group": ({"groupby": "one"}, "groupby='one' chooses all 72 cells"),
    "the group of all": ({"groupby": "one", "group1": "a"}, "group1='a' chooses all 72 cells"),
    "no group": ({"groupby": "batch", "group1": []}, "group1 must name at least one value"),
    "the same cells": ({"idx1": [0, 1], "idx2": [1, 0]}, "idx2 must not hold all cells of idx1"),
    "batch": (
        {"batch_correction": True, "batchid1": ["b7"], "batchid2": ["b0"]},
        "batchid1 must be of the model's batches, 'b0', 'b1', got 'b7'",
    ),
    "batch as text": ({"batch_correction": True, "batchid1": "b0"}, "batchid1 must be a list"),
    "batch alone": ({"batchid2": ["b0"]}, "batchid2=.* needs batch_correction=True"),
    "delta": ({"mode": "change", "delta": -1}, "delta must be a finite number of at least 0"),
    "pseudocounts": ({"mode": "change", "pseudocounts": "x"}, "pseudocounts must be a finite"),
    "fdr": ({"mode": "change", "fdr_target": 5}, "fdr_target must be .* from 0 to 1, got 5"),
    "test": ({"mode": "change", "test_mode": "one"}, "test_mode must be one of 'two', 'three'"),
    "function": ({"mode": "change", "change_fn": "ratio"}, "change_fn must be a function"),
    "domain": ({"mode": "change", "m1_domain_fn": 3}, "m1_domain_fn must be a function"),
    "levels": ({"mode": "change", "cred_interval_lvls": [2.0]}, "cred_interval_lvls must be"),
    "draws": ({"n_samples_overall": 0}, "n_samples_overall must be an integer of at least 1"),
}


@pytest.mark.parametrize(("kwargs", "expected"), COMPARED.values(), ids=COMPARED)
def test_comparisons(kwargs, expected, models):
    for model in models:
        model.adata.obs["one"] = "a"
        before = [*model.adata.obs]
        if not kwargs.keys() & {"groupby", "idx1"}:
            kwargs = {**kwargs, "groupby": "batch"}
        with pytest.raises((TypeError, ValueError), match=expected):
            model.differential_expression(**kwargs, silent=True)
        assert [*model.adata.obs] == before


def test_samples_of_cells_must_be_known(models):
    model = models[0]
    model.adata.obs["sample"] = np.where(np.arange(72) % 3, "s", None)
    with pytest.raises(ValueError, match=r"sample_key: adata.obs\['sample'\] is missing .*'cell0'"):
        model.differential_abundance(sample_key="sample")
    with pytest.raises(TypeError, match="sample_key must be the name of a column"):
        model.differential_abundance(sample_key=["batch"])


def test_queries(models, make_adata):
    reference = models[0]
    for wrong in (3, None, MixSCVI):
        with pytest.raises(TypeError, match="reference_model must be a model or the folder of one"):
            MixSCVI.load_query_data(make_adata(), wrong)
        with pytest.raises(TypeError, match="reference_model must be a model or the folder of one"):
            MixSCVI.prepare_query_anndata(make_adata(), wrong)
        with pytest.raises(TypeError, match="adata must be an AnnData"):
            MixSCVI.prepare_query_anndata(wrong, reference)
    query = make_adata(n_obs=30, seed=3)
    query.obs["batch"] = np.arange(30) % 2
    with pytest.raises(TypeError, match=r"adata.obs\['batch'\] is 0 in 'cell0', but .* on 'b0'"):
        MixSCVI.load_query_data(query, reference)


def test_a_query_or_labels_of_other_genes(models, make_adata, tmp_path):
    models[0].save(tmp_path / "model")
    other = make_adata(seed=3)
    other.var_names = [f"ENSG{i}" for i in range(20)]
    for reference in (models[0], tmp_path / "model"):
        with pytest.raises(ValueError, match=r"none of the reference's 20 genes.*'gene0'.*'ENSG0'"):
            MixSCVI.prepare_query_anndata(other, reference)
    with pytest.raises(ValueError, match="adata has 20 genes that are not the 20"):
        MixSCANVI.from_scvi_model(models[0], "type0", "label", adata=other)
    with pytest.raises(ValueError, match=r"adata must have cells, got shape \(0, 20\)"):
        MixSCVI.load_query_data(make_adata()[:0].copy(), models[0])


def test_folders_and_addresses_that_are_none(models, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"dir_path must be a folder.*file' is a file"):
        models[0].save(tmp_path / "file" / "model")
    with pytest.raises(OSError, match=r"model\.pt could not be fetched from backup_url='nowhere'"):
        MixSCVI.load(tmp_path / "model", False, backup_url="nowhere")
    assert not list((tmp_path / "model").iterdir())


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_a_query_with_names_of_cells_that_repeat(models, make_adata, tmp_path):
    models[0].save(tmp_path / "model")
    query = make_adata(n_obs=30, seed=3)
    query.obs_names = ["cell"] * 30
    for reference in (models[0], tmp_path / "model"):
        MixSCVI.prepare_query_anndata(query.copy(), reference)  # nothing has to be added
        with pytest.raises(ValueError, match="adata.obs_names must be unique to be matched"):
            MixSCVI.prepare_query_anndata(query[:, 3:].copy(), reference)


def test_labels_that_are_none(make_adata):
    adata = make_adata()
    for value in (["type0"], {}, np.nan, None):
        with pytest.raises(TypeError, match="unlabeled_category must be the value of"):
            MixSCANVI.setup_anndata(adata, "label", unlabeled_category=value)
    adata.obs = pd.concat([adata.obs, adata.obs[["label"]]], axis=1)
    with pytest.raises(ValueError, match="labels_key='label' is of 2 columns of adata.obs"):
        MixSCANVI.setup_anndata(adata, "label", unlabeled_category="type0")
