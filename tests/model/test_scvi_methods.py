"""What SCVI offers works with a mixture."""

import math
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scvi import REGISTRY_KEYS

from fitting import LEARN, WORKING, fit, seeded
from mixscvi import MixSCVI
from mixscvi.mixture import MixturePosterior


@pytest.fixture(params=WORKING.values(), ids=WORKING, scope="module")
def trained(request, make_adata):
    """A trained model; tests must leave it as it is."""
    setup = {"batch_key": "batch", "labels_key": "label"}
    longer = {**LEARN, "max_epochs": 60}
    return fit(MixSCVI, make_adata(), setup, n_components=3, train_kwargs=longer, **request.param)


def test_normalized_expression(trained):
    shape = trained.adata.shape
    one = seeded(trained.get_normalized_expression)
    assert isinstance(one, pd.DataFrame)
    assert one.shape == shape
    np.testing.assert_allclose(one.sum(axis=1), 1, rtol=1e-4)
    draws = seeded(trained.get_normalized_expression, n_samples=5, return_mean=False)
    assert draws.shape == (5, *shape)
    assert draws.std(0).max() > 0
    mean = seeded(trained.get_normalized_expression, n_samples=5, return_numpy=True)
    np.testing.assert_allclose(mean, draws.mean(0), rtol=1e-5)
    moved = trained.get_normalized_expression(
        transform_batch="b1", gene_list=["gene3", "gene5"], indices=[0, 2], library_size="latent"
    )
    assert list(moved.columns) == ["gene3", "gene5"]
    assert list(moved.index) == ["cell0", "cell2"]
    overall = seeded(
        trained.get_normalized_expression,
        n_samples_overall=50,
        weights="importance",
        return_mean=False,
        return_numpy=True,
    )
    assert overall.shape == (50, shape[1])
    np.testing.assert_allclose(overall.sum(1), 1, rtol=1e-4)


def test_importance_weights_follow_the_model(trained):
    """Scored by hand: p(x_j | z) p(z) / (p(x_j) mean_i q_i(z)), in the terms scvi-tools uses."""
    module, adata = trained.module, trained.adata
    indices = np.array([0, 5, 9])
    tensors = next(iter(trained._make_data_loader(adata=adata, indices=indices, batch_size=8)))
    scvi.settings.seed = 0
    with torch.no_grad():
        inference, generative = module(
            tensors, inference_kwargs={"n_samples": 4}, compute_loss=False
        )
        z = inference.get("untransformed_z", inference["z"])
        weights = seeded(
            trained.get_importance_weights,
            adata,
            indices,
            inference["qz"],
            generative["px"],
            inference["z"],
            n_mc_samples=3000,
        )
        counts = tensors[REGISTRY_KEYS.X_KEY]
        log_px = seeded(
            trained.get_marginal_ll, indices=indices, n_mc_samples=3000, return_mean=False
        )
        prior = module.prior_distribution().log_prob(z)
        base, log_det = (z, 0.0) if module.flow is None else module.flow.inverse(z)
        qz = inference["qz"]
        posterior = MixturePosterior(qz.component_loc, qz.component_scale)
        log_q = posterior.log_prob(base.unsqueeze(-2))
        log_q = log_q - torch.as_tensor(log_det)[..., None]
        px = generative["px"]
        per_anchor = []
        for anchor in counts:
            px.mu = px.scale * anchor.sum()
            per_anchor.append(px.log_prob(anchor).sum(-1))
        log_px_z = torch.stack(per_anchor, dim=-1)
        ratio = (log_px_z - log_px).logsumexp(-1) + prior - log_q.logsumexp(-1)
        expected = ratio.flatten().softmax(0)
    assert weights.size == 12
    np.testing.assert_allclose(np.ravel(weights), expected, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("mode", ["vanilla", "change"])
def test_differential_expression(trained, mode):
    table = seeded(
        trained.differential_expression,
        groupby="label",
        group1="type0",
        group2="type1",
        mode=mode,
        silent=True,
    )
    assert set(table.index) == set(trained.adata.var_names)
    assert np.isfinite(table["bayes_factor"]).all()
    assert (table["raw_mean1"] >= 0).all()
    if mode == "change":
        assert table["proba_de"].between(0, 1).all()
        counts = pd.DataFrame(trained.adata.X, columns=trained.adata.var_names)
        means = counts.groupby(trained.adata.obs["label"].to_numpy()).mean()
        fold = np.log2((means.loc["type0"] + 0.1) / (means.loc["type1"] + 0.1))
        assert np.corrcoef(fold, table["lfc_mean"].reindex(fold.index))[0, 1] > 0.5


def test_differential_expression_with_importance_weights(trained):
    table = seeded(
        trained.differential_expression,
        groupby="label",
        group1="type0",
        mode="change",
        weights="importance",
        silent=True,
        importance_weighting_kwargs={"n_mc_samples": 60},
    )
    assert table["proba_de"].between(0, 1).all()


def test_samples_and_parameters(trained):
    shape = trained.adata.shape
    sample = trained.posterior_predictive_sample(n_samples=3, gene_list=["gene2", "gene4"])
    assert sample.shape == (shape[0], 2, 3)
    values = sample.todense()
    assert (values >= 0).all()
    assert (values == np.round(values)).all()
    everything = seeded(trained.posterior_predictive_sample, n_samples=50).todense()
    assert np.corrcoef(everything.mean((0, 2)), trained.adata.X.mean(0))[0, 1] > 0.6
    parameters = trained.get_likelihood_parameters(n_samples=2, give_mean=True)
    assert {"mean", "dispersions", "dropout"} <= set(parameters)
    for value in parameters.values():
        assert value.shape == shape
        assert np.isfinite(value).all()
    several = trained.get_likelihood_parameters(n_samples=2, give_mean=False)
    assert several["mean"].shape == (2, *shape)
    library = trained.get_latent_library_size(give_mean=False)
    np.testing.assert_allclose(library[:, 0], trained.adata.X.sum(1), rtol=1e-4)


@pytest.mark.parametrize("correlation_type", ["pearson", "spearman"])
def test_feature_correlation(trained, correlation_type):
    matrix = trained.get_feature_correlation_matrix(n_samples=2, correlation_type=correlation_type)
    assert matrix.shape == (20, 20)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    np.testing.assert_allclose(np.diag(matrix), 1, rtol=1e-5)


@pytest.mark.parametrize("dof", [3.0, None])
def test_aggregated_posterior(trained, dof):
    aggregated = trained.get_aggregated_posterior(dof=dof)
    assert aggregated.event_shape == (3,)
    module = trained.module
    with torch.no_grad():
        z = aggregated.sample((500,))
        log_density = aggregated.log_prob(z)
        assert log_density.shape == (500,)
        if dof is None:
            loader = trained._make_data_loader(adata=trained.adata, batch_size=100)
            qz = module.posterior(next(iter(loader)))
            base, log_det = (z, 0.0) if module.flow is None else module.flow.inverse(z)
            per_cell = qz.log_prob(base[:, None]) - torch.as_tensor(log_det)[..., None]
            expected = per_cell.logsumexp(-1) - math.log(trained.adata.n_obs)
            torch.testing.assert_close(log_density, expected, rtol=1e-3, atol=1e-3)
    mean = trained.get_latent_representation().mean(0)
    if dof is None:
        error = z.std(0).numpy() / math.sqrt(500)
        assert (abs(z.mean(0).numpy() - mean) < 5 * error + 0.02).all()
    some = trained.get_aggregated_posterior(indices=[0, 1], dof=dof)
    assert some.sample((2,)).shape == (2, 3)
    for none in ([], np.array([])):
        with pytest.warns(UserWarning, match="indices choose no cell: all cells"):
            everyone = trained.get_aggregated_posterior(indices=none, dof=dof)
        with torch.no_grad():
            torch.testing.assert_close(everyone.log_prob(z), log_density)


@pytest.mark.filterwarnings("ignore:Using .* after custom Dataloader:UserWarning")  # scvi 1.5
def test_differential_abundance(trained):
    adata = trained.adata.copy()
    trained.differential_abundance(adata, sample_key="donor")
    added = adata.obsm["da_log_probs"]
    assert added.shape == (adata.n_obs, 3)
    assert np.isfinite(np.asarray(added, dtype=float)).all()


def test_modules_that_are_wrapped(make_adata):
    """scvi-tools' own tests give methods a module of mocks: data say what there is of them."""
    model = fit(MixSCVI, make_adata(), n_components=2)
    expected = model.get_latent_representation()
    module = model.module
    model.module = mock.Mock(wraps=module)
    model.module.inference.side_effect = module.inference
    np.testing.assert_allclose(model.get_latent_representation(), expected, atol=1e-5)
