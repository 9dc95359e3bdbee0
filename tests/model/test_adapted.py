"""Exact posteriors of a trained model's cells, and what is made of them."""

import numpy as np
import pytest
import scvi
import torch

from fitting import COVARIATES, LEARN, fit, seeded
from mixscvi import MixSCVI
from mixscvi.model import adapted as adapted_module

CELLS = [7, 0, 5]
MODELS = {
    "three components": {"n_components": 3},
    "one component": {"n_components": 1},
    "mog, flow": {"n_components": 2, "prior": "mog", "n_prior_components": 4, "n_flow_steps": 1},
    "vamp": {"n_components": 2, "prior": "vamp", "n_prior_components": 5},
    "ln": {"n_components": 2, "latent_distribution": "ln"},
    "modeled library": {"n_components": 2, "use_observed_lib_size": False},
}


@pytest.mark.parametrize("kwargs", MODELS.values(), ids=MODELS)
def test_adapted_posterior_by_cell(kwargs, make_adata):
    model = fit(MixSCVI, make_adata(), COVARIATES, **kwargs, train_kwargs=LEARN)
    posterior = seeded(
        model.get_adapted_posterior, indices=CELLS, n_mc_samples=500, n_draws=40, batch_size=2
    )
    n_components, n_latent = 5, 3 + ("use_observed_lib_size" in kwargs)  # 1 + max(A, 4)
    assert posterior.weights.shape == (3, n_components)
    assert posterior.loc.shape == (3, n_components, n_latent)
    assert posterior.scale_tril.shape == (3, n_components, n_latent, n_latent)
    assert posterior.draws.shape == (40, 3, n_latent)
    np.testing.assert_allclose(posterior.weights.sum(1), 1)
    assert (np.triu(posterior.scale_tril, 1) == 0).all()
    assert np.isfinite(posterior.draws).all()
    assert posterior.dof > 2
    for name in ("pareto_k", "log_likelihood", "standard_error", "n_evaluations"):
        assert getattr(posterior, name).shape == (3,)
    assert (posterior.n_evaluations >= 500).all()
    table = seeded(
        model.get_posterior_diagnostics,
        indices=CELLS,
        n_mc_samples=500,
        batch_size=2,
        proposal="adapted",
    )
    assert list(table.index) == ["cell7", "cell0", "cell5"]
    assert table["effective_sample_size"].between(1, 500.1).all()
    error = np.hypot(posterior.standard_error, table["standard_error"])
    assert (abs(posterior.log_likelihood - table["log_likelihood"]) < 6 * error + 1e-3).all()


def test_posteriors_under_a_normal_likelihood_are_warned_of(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2, gene_likelihood="normal")
    for method in (model.get_adapted_posterior, model.get_marginal_ll):
        kwargs = {"proposal": "adapted"} if method == model.get_marginal_ll else {}
        with pytest.warns(UserWarning, match="gene_likelihood='normal' .* miss the highest mode"):
            method(indices=[0], n_mc_samples=25, **kwargs)


def test_the_mixture_has_the_moments_of_the_draws(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2, train_kwargs=LEARN)
    posterior = seeded(model.get_adapted_posterior, indices=[3], n_mc_samples=20_000, n_draws=5_000)
    weights, loc, tril = posterior.weights[0], posterior.loc[0], posterior.scale_tril[0]
    mean = weights @ loc
    # Scale matrices are fitted to the covariance of the draws; the tails come on top of it.
    within = tril @ tril.transpose(0, 2, 1)
    deviation = loc - mean
    covariance = np.einsum("k,kde->de", weights, within)
    covariance += np.einsum("k,kd,ke->de", weights, deviation, deviation)
    scale = np.sqrt(np.diag(covariance))
    draws = posterior.draws[:, 0]
    assert (abs(draws.mean(0) - mean) < 0.2 * scale).all()
    np.testing.assert_allclose(draws.std(0), scale, rtol=0.25)


def test_draws_are_behind_the_flow(make_adata):
    """Draws have the exact posterior's density: under the prior, the flow's base is no measure."""
    model = fit(MixSCVI, make_adata(), n_components=2, n_flow_steps=2, train_kwargs=LEARN)
    posterior = seeded(model.get_adapted_posterior, indices=[3], n_draws=2_000, n_mc_samples=4_000)
    with torch.no_grad():
        base, _ = model.module.flow.inverse(torch.from_numpy(posterior.draws[:, 0]))
    mean = posterior.weights[0] @ posterior.loc[0]
    spread = posterior.draws[:, 0].std(0)
    assert (abs(base.numpy().mean(0) - mean) < 0.3 * base.numpy().std(0)).all()
    assert (abs(posterior.draws[:, 0].mean(0) - mean) > 0.02 * spread).any()


def test_resampled_draws_follow_the_weights():
    log_weights = torch.tensor([[0.0, -torch.inf], [np.log(3.0), 0.0]])
    draws = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    fields = dict.fromkeys(adapted_module.Adapted._fields)
    some = adapted_module.Adapted(**{**fields, "draws": draws, "log_weights": log_weights})
    torch.manual_seed(0)
    chosen = adapted_module.resample(some, 4_000)
    assert chosen.shape == (4_000, 2, 1)
    assert (chosen[:, 1] == 4).all()
    assert set(chosen[:, 0].flatten().tolist()) == {1.0, 3.0}
    assert (chosen[:, 0] == 3).double().mean().item() == pytest.approx(0.75, abs=0.04)


def test_more_cells_can_be_trusted(make_adata):
    model = fit(MixSCVI, make_adata(n_vars=60), n_components=2, train_kwargs=LEARN)
    cells = np.random.default_rng(0).choice(72, 10, replace=False)
    encoder = seeded(model.get_posterior_diagnostics, indices=cells)
    table = seeded(model.get_posterior_diagnostics, indices=cells, proposal="adapted")
    assert (table["pareto_k"] < 0.7).all()
    assert (encoder["pareto_k"] < 0.7).mean() < 1
    assert table["effective_sample_size"].mean() > 5 * encoder["effective_sample_size"].mean()
    divergences = encoder["jensen_shannon_divergence"], table["jensen_shannon_divergence"]
    np.testing.assert_allclose(*divergences, atol=0.15)
    assert list(table) == [
        "jensen_shannon_divergence",
        "effective_sample_size",
        "pareto_k",
        "log_likelihood",
        "standard_error",
        "n_evaluations",
    ]


def test_cells_that_are_not_to_be_trusted_are_warned_of(make_adata, monkeypatch):
    model = fit(MixSCVI, make_adata(), n_components=2)
    monkeypatch.setattr(adapted_module, "_LARGEST_K", -10.0)  # which no cell is below
    few = {"indices": [0, 1], "n_mc_samples": 25, "progress": False}
    for method, arguments in (
        (model.get_adapted_posterior, few),
        (model.get_marginal_ll, few | {"proposal": "adapted"}),
        (model.get_posterior_diagnostics, few | {"proposal": "adapted"}),
    ):
        with pytest.warns(UserWarning, match="for 100% of the cells the adapted") as caught:
            method(**arguments)
        assert {warning.filename for warning in caught} == {__file__}


def test_adapted_results_repeat_with_the_seed(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2)
    one, other = (
        seeded(model.get_adapted_posterior, indices=CELLS, n_mc_samples=50, n_draws=5)
        for _ in range(2)
    )
    for values, again in zip(one, other, strict=True):
        np.testing.assert_array_equal(values, again)
    assert model.get_adapted_posterior(indices=CELLS, n_mc_samples=50).draws is None


def test_own_dataloader_and_new_data(make_adata):
    adata = make_adata()
    model = fit(MixSCVI, adata, n_components=2)
    loader = model._make_data_loader(adata=adata, indices=CELLS, batch_size=2)
    kwargs = {"n_mc_samples": 50, "adapt_kwargs": {"max_generations": 2}}
    own = seeded(model.get_adapted_posterior, dataloader=loader, **kwargs)
    given = seeded(model.get_adapted_posterior, indices=CELLS, batch_size=2, **kwargs)
    np.testing.assert_array_equal(own.loc, given.loc)
    new = seeded(model.get_adapted_posterior, make_adata(), indices=CELLS, batch_size=2, **kwargs)
    np.testing.assert_array_equal(new.loc, given.loc)
    table = seeded(
        model.get_posterior_diagnostics, dataloader=iter(loader), proposal="adapted", **kwargs
    )
    assert list(table.index) == [0, 1, 2]


def test_the_budget_is_kept(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2)
    options = {"n_draws": 30, "max_generations": 1}
    posterior = model.get_adapted_posterior(
        indices=CELLS, n_mc_samples=25, adapt_kwargs=options, n_mc_samples_per_pass=7
    )
    default = model.get_adapted_posterior(indices=CELLS)
    assert (posterior.n_evaluations < default.n_evaluations - 900).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_mc_samples": 24}, "n_mc_samples must be at least 25"),
        ({"n_mc_samples_per_pass": 0}, "n_mc_samples_per_pass"),
        ({"n_draws": 0}, "n_draws"),
        ({"adapt_kwargs": {"n_final": 3}}, "adapt_kwargs must not hold 'n_final'"),
        ({"adapt_kwargs": {"max_generations": 0}}, "max_generations must be at least 1"),
    ],
)
def test_bad_arguments(kwargs, message, make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2)
    with pytest.raises(ValueError, match=message):
        model.get_adapted_posterior(indices=CELLS, **kwargs)


def test_adapting_needs_training_counts_and_gradients(make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    with pytest.raises(RuntimeError, match="train"):
        MixSCVI(adata, n_components=2).get_adapted_posterior()
    model = fit(MixSCVI, adata, n_components=2)
    with pytest.raises(RuntimeError, match="inference_mode"), torch.inference_mode():
        model.get_adapted_posterior(indices=CELLS)
    model.minify_adata()
    for method, kwargs in (
        (model.get_adapted_posterior, {}),
        (model.get_marginal_ll, {"proposal": "adapted"}),
        (model.get_posterior_diagnostics, {"proposal": "adapted"}),
    ):
        with pytest.raises(ValueError, match="minified"):
            method(**kwargs)


def test_data_minified_with_counts_can_be_adapted(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2)
    before = seeded(model.get_adapted_posterior, indices=CELLS)
    model.minify_adata(minified_data_type="latent_posterior_parameters_with_counts")
    after = seeded(model.get_adapted_posterior, indices=CELLS)
    np.testing.assert_allclose(after.log_likelihood, before.log_likelihood, atol=1e-2)


@pytest.mark.parametrize("style", [None, True, False])
def test_progress(style, make_adata, capsys):
    model = fit(MixSCVI, make_adata(), n_components=2)
    kwargs = {"indices": CELLS, "n_mc_samples": 25, "adapt_kwargs": {"max_generations": 1}}
    verbosity = scvi.settings.verbosity
    try:
        for level, shown in ((20, style is not False), (40, style is True)):
            scvi.settings.verbosity = level
            model.get_adapted_posterior(**kwargs, progress=style)
            assert ("3/3" in capsys.readouterr().err) == shown
    finally:
        scvi.settings.verbosity = verbosity


def test_an_interrupt_leaves_a_working_model(make_adata):
    adata = make_adata()
    model = fit(MixSCVI, adata, n_components=2)

    def loader():
        yield from model._make_data_loader(adata=adata, indices=CELLS, batch_size=3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.get_adapted_posterior(dataloader=loader(), n_mc_samples=25)
    assert np.isfinite(model.get_adapted_posterior(indices=CELLS, n_mc_samples=25).loc).all()
