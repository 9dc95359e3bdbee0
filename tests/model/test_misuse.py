"""Bad data and bad arguments: named, and refused before anything is lost."""

import warnings

import numpy as np
import pytest
from scipy.sparse import csr_matrix, issparse

from fitting import SMALL, fit, train
from mixscvi import MixSCVI


def with_value(adata, value, cells=(4, 11)):
    dense = adata.X.toarray() if issparse(adata.X) else adata.X.copy()
    dense[list(cells), 2] = value
    adata.X = csr_matrix(dense) if issparse(adata.X) else dense
    return adata


def setup_quietly(adata, **setup):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MixSCVI.setup_anndata(adata, **setup)


@pytest.mark.parametrize("n_components", [1, 4])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("value", "what"), [(-1, "negative"), (np.nan, "NaN or infinite"), (np.inf, "NaN or infinite")]
)
def test_bad_counts(value, what, sparse, n_components, make_adata):
    adata = with_value(make_adata(sparse=sparse), value)
    setup_quietly(adata)
    expected = rf"adata\.X has {what} values in 2 of 72 cells, first: 'cell4', 'cell11'"
    with pytest.raises(ValueError, match=expected):
        MixSCVI(adata, n_components=n_components)


def test_bad_counts_in_a_layer(make_adata):
    adata = with_value(make_adata(), -1)
    adata.layers["counts"] = adata.X.copy()
    setup_quietly(adata, layer="counts")
    with pytest.raises(ValueError, match=r"adata\.layers\['counts'\] has negative .*'cell4'"):
        MixSCVI(adata)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_empty_cells(sparse, make_adata):
    adata = make_adata(sparse=sparse)
    dense = adata.X.toarray() if sparse else adata.X
    dense[[6, 8]] = 0
    adata.X = csr_matrix(dense) if sparse else dense
    setup_quietly(adata)
    with pytest.raises(ValueError, match="no counts at all in 2 of 72 cells, first: 'cell6'"):
        MixSCVI(adata)


def test_negative_values_are_data_to_the_normal_likelihood(make_adata):
    adata = with_value(make_adata(), -0.5)
    setup_quietly(adata)
    model = train(MixSCVI(adata, gene_likelihood="normal", n_components=2, **SMALL))
    assert np.isfinite(model.get_latent_representation()).all()


def test_counts_that_are_no_integers_warn(make_adata):
    adata = make_adata()
    adata.X = np.log1p(adata.X)
    with pytest.warns(UserWarning, match="unnormalized count data"):
        MixSCVI.setup_anndata(adata)
    model = train(MixSCVI(adata, n_components=2, **SMALL))
    assert np.isfinite(model.get_latent_representation()).all()


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_bad_size_factors(value, make_adata):
    adata = make_adata()
    adata.obs.loc["cell9", "factor"] = value
    setup_quietly(adata, size_factor_key="factor")
    with pytest.raises(ValueError, match=r"adata\.obs\['factor'\] must be positive.*'cell9'"):
        MixSCVI(adata)


@pytest.fixture
def registered(make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    return adata


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "4", None])
@pytest.mark.parametrize("name", ["n_components", "n_samples", "n_prior_components"])
def test_numbers_that_are_no_positive_integers(name, value, registered):
    with pytest.raises((TypeError, ValueError), match=f"{name} must be an integer of at least 1"):
        MixSCVI(registered, **{name: value})


@pytest.mark.parametrize("value", [-1, 1.0, True, "2"])
def test_flow_steps_that_are_no_count(value, registered):
    with pytest.raises((TypeError, ValueError), match="n_flow_steps must be an integer"):
        MixSCVI(registered, n_flow_steps=value)


@pytest.mark.parametrize("value", ["all", "", None, 3])
@pytest.mark.parametrize("name", ["estimator", "component_encoder", "prior", "objective"])
def test_unknown_choices(name, value, registered):
    with pytest.raises(ValueError, match=f"{name} must be one of '"):
        MixSCVI(registered, **{name: value})


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"n_sampled_components": 5, "estimator": "some_to_all"}, ValueError, "n_components=4"),
        ({"n_sampled_components": 0, "estimator": "some_to_all"}, ValueError, "at least 1"),
        ({"n_sampled_components": 1.5, "estimator": "some_to_all"}, TypeError, "an integer"),
        ({"n_sampled_components": 2}, ValueError, "estimator='all_to_all'"),
    ],
)
def test_sampled_components(kwargs, error, match, registered):
    with pytest.raises(error, match=rf"n_sampled_components.*{match}|{match}.*n_sampled_comp"):
        MixSCVI(registered, **kwargs)


def test_unknown_arguments(registered):
    with pytest.raises(TypeError, match="n_component"):
        MixSCVI(registered, n_component=4)


def other_genes(adata, how):
    if how == "reordered":
        return adata[:, adata.var_names[::-1]].copy()
    if how == "missing":
        return adata[:, :-2].copy()
    adata.var_names = [*adata.var_names[:-1], "another"]
    return adata


GENES = {"reordered": "another order, first at 0", "missing": "2 genes are missing, first: gene18"}


GENES["renamed"] = "1 genes are missing, first: gene19"


@pytest.mark.parametrize(("how", "detail"), GENES.items(), ids=GENES)
def test_other_genes(how, detail, make_adata, tmp_path):
    model = fit(MixSCVI, make_adata(), n_components=2)
    other = other_genes(make_adata(seed=1), how)
    for method in (
        model.get_latent_representation,
        model.get_latent_mixture,
        model.get_marginal_ll,
        model.get_elbo,
        model.get_normalized_expression,
        model.get_posterior_diagnostics,
    ):
        with pytest.raises(ValueError, match=detail):
            method(other)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=detail), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MixSCVI.load(tmp_path / "model", adata=other)


def test_new_cells_are_checked_too(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2)
    new = with_value(make_adata(seed=1), np.nan)
    for method in (model.get_latent_representation, model.get_marginal_ll, model.get_elbo):
        with (
            pytest.raises(ValueError, match=r"NaN or infinite .*'cell4', 'cell11'"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            method(new.copy())


@pytest.mark.parametrize("n_components", [1, 3])
@pytest.mark.parametrize(
    "method",
    [
        "get_latent_representation",
        "get_latent_mixture",
        "get_marginal_ll",
        "get_posterior_diagnostics",
        "get_component_diagnostics",
        "get_active_units",
        "get_aggregated_posterior",
    ],
)
def test_methods_before_training(method, n_components, registered):
    model = MixSCVI(registered, n_components=n_components, **SMALL)
    with pytest.raises(RuntimeError, match="train"):
        getattr(model, method)()


def test_representations_are_checked(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2)
    with pytest.raises(ValueError, match="representation must be one of 'mean'"):
        model.get_latent_representation(representation="median")
    for kwargs in ({"return_dist": True}, {"give_mean": False}):
        with pytest.raises(ValueError, match="representation='components'"):
            model.get_latent_representation(representation="components", **kwargs)


def test_summary_names_the_mixture(registered):
    model = MixSCVI(registered, n_components=3, prior="mog")
    summary = model._model_summary_string
    assert summary.startswith("MixSCVI")
    for part in ("n_components: 3", "prior: mog", "estimator: all_to_all"):
        assert part in summary


@pytest.mark.parametrize("how", ["copy", "subset"])
def test_copies_of_the_trained_data_are_checked_too(make_adata, how):
    """They carry the mark of a registered object, and are not one that was looked at."""
    model = fit(MixSCVI, make_adata(), n_components=2)
    other = model.adata.copy() if how == "copy" else model.adata[:20].copy()
    with pytest.raises(ValueError, match=r"NaN or infinite .*'cell4'"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.get_latent_representation(with_value(other, np.nan))
    with pytest.raises(ValueError, match="10 genes are missing"):
        model.get_latent_representation(model.adata[:, :10].copy())


def test_bad_covariates_and_scaled_values_are_refused(make_adata):
    adata = make_adata()
    adata.obs["age"] = np.linspace(0, 1, adata.n_obs)
    adata.obs.loc[adata.obs_names[3], "age"] = np.nan
    MixSCVI.setup_anndata(adata, continuous_covariate_keys=["age"])
    with pytest.raises(ValueError, match=r"'age'\] is NaN or infinite in 1 of .*'cell3'"):
        MixSCVI(adata, n_components=2)
    scaled = make_adata()
    scaled.X = np.asarray(scaled.X.todense() if hasattr(scaled.X, "todense") else scaled.X) - 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MixSCVI.setup_anndata(scaled)
    with pytest.raises(ValueError, match="values of -1 or less in"):
        MixSCVI(scaled, gene_likelihood="normal")


def test_untrained_models_warn_where_scvi_tools_takes_them(make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    model = MixSCVI(adata, n_components=2)
    for method in (model.get_elbo, model.get_reconstruction_error, model.get_normalized_expression):
        with pytest.warns(UserWarning, match="untrained model"):
            method()
