"""MixSCVI from the outside: against SCVI, against brute force, and against misuse."""

import copy
import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy.sparse import csr_matrix, issparse
from scvi import REGISTRY_KEYS
from scvi.model import SCVI
from scvi.module import VAE
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from mixscvi import MixSCVI
from mixscvi.mixture import GaussianMixture

SMALL = {"n_hidden": 12, "n_latent": 3}
COVARIATES = {
    "batch_key": "batch",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age", "depth"],
}
BATCH = {"batch_key": "batch"}

# name: arguments of the data, of setup_anndata, and of the model
CONFIGURATIONS = {
    "zinb, dense": ({}, {}, {}),
    "zinb, gene-batch, sparse": ({"sparse": True}, BATCH, {"dispersion": "gene-batch"}),
    "zinb, gene-cell, 2 layers": ({}, BATCH, {"dispersion": "gene-cell", "n_layers": 2}),
    "zinb, gene-label": ({}, {"labels_key": "label"}, {"dispersion": "gene-label"}),
    "nb, batch": ({"sparse": True}, BATCH, {"gene_likelihood": "nb"}),
    "nb, gene-cell": ({}, {}, {"gene_likelihood": "nb", "dispersion": "gene-cell"}),
    "nb, gene-label, sparse": (
        {"sparse": True},
        {"labels_key": "label", **BATCH},
        {"gene_likelihood": "nb", "dispersion": "gene-label"},
    ),
    "poisson, sparse layer": (
        {"sparse": True, "layer": "counts"},
        {"layer": "counts"},
        {"gene_likelihood": "poisson"},
    ),
    "normal, dense layer": ({"layer": "raw"}, {"layer": "raw"}, {"gene_likelihood": "normal"}),
    "normal, gene-batch": ({}, BATCH, {"gene_likelihood": "normal", "dispersion": "gene-batch"}),
    "covariates": ({}, COVARIATES, {}),
    "encoded covariates": ({}, COVARIATES, {"encode_covariates": True}),
    "encoded covariates, 2 layers": (
        {"sparse": True},
        COVARIATES,
        {"encode_covariates": True, "n_layers": 2, "gene_likelihood": "nb"},
    ),
    "covariates at the first layer": (
        {},
        COVARIATES,
        {"encode_covariates": True, "n_layers": 2, "deeply_inject_covariates": False},
    ),
    "size factor": ({}, {"size_factor_key": "factor", **BATCH}, {"gene_likelihood": "nb"}),
    "modelled library": ({}, {}, {"use_observed_lib_size": False}),
    "modelled library, covariates": (
        {"sparse": True},
        COVARIATES,
        {"use_observed_lib_size": False, "encode_covariates": True, "gene_likelihood": "nb"},
    ),
    "ln": ({}, {}, {"latent_distribution": "ln"}),
    "ln, modelled library": (
        {},
        BATCH,
        {"latent_distribution": "ln", "use_observed_lib_size": False},
    ),
    "embedding": ({}, BATCH, {"batch_representation": "embedding"}),
    "embedding, encoded covariates": (
        {},
        COVARIATES,
        {"batch_representation": "embedding", "encode_covariates": True, "n_layers": 2},
    ),
    "layer norm": (
        {},
        BATCH,
        {"use_batch_norm": "none", "use_layer_norm": "both", "n_layers": 2},
    ),
    "raw inputs, softplus": (
        {},
        {},
        {
            "log_variational": False,
            "var_activation": torch.nn.functional.softplus,
            "dropout_rate": 0.0,
        },
    ),
}


def train(model, **kwargs):
    defaults = {"max_epochs": 2, "batch_size": 32, "train_size": 0.75}
    model.train(**{**defaults, **kwargs}, accelerator="cpu", enable_progress_bar=False, logger=None)
    return model


def fit(cls, adata, setup=None, *, seed=0, train_kwargs=None, **model_kwargs):
    """Register, make and train a model from one seed."""
    cls.setup_anndata(adata, **(setup or {}))
    scvi.settings.seed = seed
    model = cls(adata, **{**SMALL, **model_kwargs})
    return train(model, **(train_kwargs or {}))


def seeded(function, *args, seed=1, **kwargs):
    scvi.settings.seed = seed
    return function(*args, **kwargs)


def as_arrays(result):
    """Whatever a method returns, as a list of arrays."""
    if isinstance(result, dict):
        return [array for value in result.values() for array in as_arrays(value)]
    if isinstance(result, (tuple, list)):
        return [array for value in result for array in as_arrays(value)]
    return [np.asarray(result.todense() if hasattr(result, "todense") else result)]


def assert_same_history(one, other):
    assert set(one.history) == set(other.history)
    assert {"elbo_train", "elbo_validation", "validation_loss"} <= set(one.history)
    for key, values in one.history.items():
        assert np.isfinite(values.to_numpy(dtype=float)).all(), key
        pd.testing.assert_frame_equal(values, other.history[key], check_exact=True)


def assert_same_state(one, other):
    expected = other.module.state_dict()
    assert list(one.module.state_dict()) == list(expected)
    for name, value in one.module.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture(params=CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def configuration(request):
    return request.param


EARLY = {"early_stopping": True, "early_stopping_patience": 5}


def test_one_component_is_scvi(configuration, make_adata):
    data, setup, kwargs = configuration
    adata = make_adata(**data)
    ours = fit(MixSCVI, adata, setup, n_components=1, train_kwargs=EARLY, **kwargs)
    theirs = fit(SCVI, adata, setup, train_kwargs=EARLY, **kwargs)

    assert_same_history(ours, theirs)
    assert_same_state(ours, theirs)

    def same(name, *args, **kwargs):
        got = seeded(getattr(ours, name), *args, **kwargs)
        expected = seeded(getattr(theirs, name), *args, **kwargs)
        assert type(got) is type(expected)
        for a, b in zip(as_arrays(got), as_arrays(expected), strict=True):
            assert np.array_equal(a, b), name
            assert np.isfinite(a).all(), name

    same("get_latent_representation")
    same("get_latent_representation", give_mean=False)
    same("get_latent_representation", return_dist=True)
    same("get_elbo")
    same("get_elbo", return_mean=False)
    same("get_reconstruction_error", return_mean=False)
    same("get_normalized_expression", return_numpy=True)
    if "batch_representation" not in kwargs:  # several draws are more than SCVI can do there
        same("get_normalized_expression", return_numpy=True, n_samples=3)
        same("get_normalized_expression", n_samples=2, return_mean=False, library_size="latent")
        same("posterior_predictive_sample", n_samples=3, indices=[4, 1, 7])
    same("get_latent_library_size", give_mean=not kwargs.get("use_observed_lib_size", True))
    same("posterior_predictive_sample", n_samples=1)


@pytest.mark.parametrize("n_components", [1, 3])
def test_several_draws_with_an_embedded_batch(n_components, make_adata):
    kwargs = {"n_components": n_components, "batch_representation": "embedding"}
    model = fit(MixSCVI, make_adata(), BATCH, **kwargs)
    expression = model.get_normalized_expression(n_samples=3, return_mean=False)
    assert expression.shape == (3, 72, 20)
    np.testing.assert_allclose(expression.sum(-1), 1, rtol=1e-4)


def test_one_component_is_scvi_where_users_continue(make_adata, tmp_path):
    adata = make_adata()
    ours, theirs = (fit(cls, adata, BATCH) for cls in (_OneComponent, SCVI))
    scvi.settings.seed = 3
    train(ours, max_epochs=1)
    scvi.settings.seed = 3
    train(theirs, max_epochs=1)
    assert_same_state(ours, theirs)

    def tables(model):
        frame = seeded(model.differential_expression, groupby="label", mode="change", silent=True)
        return frame.drop(columns=[name for name in frame if frame[name].dtype == object])

    pd.testing.assert_frame_equal(tables(ours), tables(theirs), check_exact=True)
    theirs.save(tmp_path / "scvi")
    ours.save(tmp_path / "ours")
    ours = _OneComponent.load(tmp_path / "ours", adata=adata)
    theirs = SCVI.load(tmp_path / "scvi", adata=adata)
    assert_same_state(ours, theirs)
    for model in (ours, theirs):
        mean, variance = model.get_latent_representation(return_dist=True)
        model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = mean, variance
        model.minify_adata()
    latents = [model.get_latent_representation() for model in (ours, theirs)]
    assert np.array_equal(*latents)


class _OneComponent(MixSCVI):
    def __init__(self, adata=None, **kwargs):
        super().__init__(adata, n_components=1, **kwargs)
        self.init_params_ = self._get_init_params(locals())


def test_three_components(configuration, make_adata, tmp_path):
    data, setup, kwargs = configuration
    adata = make_adata(**data)
    model = fit(MixSCVI, adata, setup, n_components=3, train_kwargs=EARLY, **kwargs)
    n, d = adata.n_obs, SMALL["n_latent"]

    assert len(model.history["elbo_validation"]) == 2
    for key, values in model.history.items():
        assert np.isfinite(values.to_numpy(dtype=float)).all(), key
    assert model.trainer.early_stopping_callback.monitor == "elbo_validation"

    loc, scale = model.get_latent_mixture()
    assert loc.shape == scale.shape == (n, 3, d)
    assert (scale > 0).all()
    assert np.ptp(loc, axis=1).min() > 0
    latents = {
        name: model.get_latent_representation(representation=name)
        for name in ("mean", "components", "parameters")
    }
    np.testing.assert_array_equal(latents["components"], loc.reshape(n, 3 * d))
    expected = np.concatenate([latents["components"], (scale**2).reshape(n, 3 * d)], axis=1)
    np.testing.assert_allclose(latents["parameters"], expected, rtol=1e-6)
    mean, variance = model.get_latent_representation(return_dist=True)
    np.testing.assert_allclose(mean, loc.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, (scale**2).mean(1) + loc.var(1), rtol=1e-4, atol=1e-5)
    if kwargs.get("latent_distribution") == "ln":
        np.testing.assert_allclose(latents["mean"].sum(1), 1, rtol=1e-4)
    else:
        np.testing.assert_array_equal(latents["mean"], mean)
    one_draw = model.get_latent_representation(give_mean=False)
    assert one_draw.shape == (n, d)
    assert (one_draw != latents["mean"]).any()

    elbo = seeded(model.get_elbo, return_mean=False)
    error = seeded(model.get_reconstruction_error, return_mean=False)
    error = error["reconstruction_loss"] if isinstance(error, dict) else error
    log_likelihood = seeded(model.get_marginal_ll, return_mean=False, n_mc_samples=300)
    for values in (elbo, error, log_likelihood):
        assert values.shape == (n,)
        assert np.isfinite(np.asarray(values)).all()
    assert float(seeded(model.get_elbo)) == pytest.approx(np.asarray(elbo).mean(), rel=1e-4)
    # The bound is a single draw for each component of each cell.
    gap = log_likelihood.numpy() - np.asarray(elbo)
    assert gap.mean() > -3 * gap.std() / math.sqrt(n)

    expression = model.get_normalized_expression(n_samples=4, return_numpy=True)
    assert expression.shape == adata.shape
    if "size_factor_key" not in setup:
        np.testing.assert_allclose(expression.sum(1), 1, rtol=1e-3)
    assert model.posterior_predictive_sample(n_samples=2).shape == (*adata.shape, 2)

    model.save(tmp_path / "model")
    loaded = MixSCVI.load(tmp_path / "model", adata=adata, accelerator="cpu")
    assert_same_state(loaded, model)
    assert loaded.module.n_components == 3
    np.testing.assert_array_equal(loaded.get_latent_representation(), latents["mean"])


def test_early_stopping_stops(make_adata):
    stop = {"early_stopping": True, "early_stopping_patience": 2, "max_epochs": 30}
    stop["early_stopping_min_delta"] = 1e9
    model = fit(MixSCVI, make_adata(), train_kwargs=stop)
    assert len(model.history["elbo_validation"]) == 3
    assert model.is_trained


def test_training_improves_the_bound(make_adata):
    plan = {"lr": 1e-2, "n_epochs_kl_warmup": 1}
    model = fit(MixSCVI, make_adata(), train_kwargs={"max_epochs": 40, "plan_kwargs": plan})
    history = model.history["elbo_train"].to_numpy(dtype=float).ravel()
    assert history[-1] < history[0] - 5
    assert np.mean(model.get_marginal_ll()) > np.mean(np.asarray(model.get_elbo()))


# --- options of the mixture

OPTIONS = {
    "some_to_all, 1": {"estimator": "some_to_all", "n_sampled_components": 1},
    "some_to_all, 2": {"estimator": "some_to_all", "n_sampled_components": 2},
    "some_to_some, 1": {"estimator": "some_to_some", "n_sampled_components": 1},
    "some_to_some, 2": {"estimator": "some_to_some", "n_sampled_components": 2},
    "amortized": {"component_encoder": "amortized", "n_components": 6},
    "amortized, some_to_some": {
        "component_encoder": "amortized",
        "estimator": "some_to_some",
        "n_sampled_components": 1,
        "n_layers": 2,
    },
    "mog": {"prior": "mog", "n_prior_components": 5},
    "vamp": {"prior": "vamp", "n_prior_components": 7, "encode_covariates": True},
    "vamp, embedding": {
        "prior": "vamp",
        "n_prior_components": 7,
        "encode_covariates": True,
        "batch_representation": "embedding",
    },
    "flow": {"n_flow_steps": 2},
    "flow, vamp": {"n_flow_steps": 1, "prior": "vamp", "n_prior_components": 5},
    "flow, modelled library": {"n_flow_steps": 1, "use_observed_lib_size": False},
    "2 samples": {"n_samples": 2},
    "siwae": {"n_samples": 2, "objective": "siwae"},
    "one component, mog": {"n_components": 1, "prior": "mog"},
    "one component, flow": {"n_components": 1, "n_flow_steps": 2},
    "one component, 2 samples": {"n_components": 1, "n_samples": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_train_repeat_and_reload(options, make_adata, tmp_path):
    adata = make_adata()
    kwargs = {"n_components": 3, **options}
    model = fit(MixSCVI, adata, COVARIATES, train_kwargs=EARLY, **kwargs)
    again = fit(MixSCVI, adata, COVARIATES, train_kwargs=EARLY, **kwargs)
    assert_same_history(model, again)
    assert_same_state(model, again)
    latent = model.get_latent_representation(mc_samples=300)
    assert latent.shape == (adata.n_obs, 3)
    np.testing.assert_array_equal(latent, again.get_latent_representation(mc_samples=300))
    other = fit(MixSCVI, adata, COVARIATES, seed=5, **kwargs)
    assert (latent != other.get_latent_representation(mc_samples=300)).any()

    def evaluate(any_model):
        return [
            seeded(any_model.get_marginal_ll, n_mc_samples=60),
            float(seeded(any_model.get_elbo)),
            seeded(any_model.get_normalized_expression, n_samples=2, return_numpy=True).sum(),
        ]

    results = evaluate(model)
    assert np.isfinite(results).all()
    model.save(tmp_path / "model")
    loaded = MixSCVI.load(tmp_path / "model", adata=adata, accelerator="cpu")
    assert_same_state(loaded, model)
    np.testing.assert_array_equal(loaded.get_latent_representation(mc_samples=300), latent)
    assert evaluate(loaded) == results
    name = next(iter(options))
    assert loaded.init_params_["non_kwargs"][name] == options[name]


@pytest.mark.parametrize("sparse", [False, True])
def test_pseudo_cells_start_as_distinct_real_cells(sparse, make_adata):
    adata = make_adata(sparse=sparse)
    MixSCVI.setup_anndata(adata, **COVARIATES)
    scvi.settings.seed = 0
    model = MixSCVI(adata, prior="vamp", n_prior_components=9, encode_covariates=True)
    with torch.no_grad():
        dense, batch, donor = model.module.prior.pseudo_inputs()
    counts = adata.X.toarray() if issparse(adata.X) else adata.X
    real = np.concatenate([np.log1p(counts), adata.obs[["age", "depth"]].to_numpy()], axis=1)
    distance = abs(dense.numpy()[:, None] - real[None]).max(-1)
    nearest = distance.argmin(1)
    assert distance.min(1).max() < 0.01
    assert len(set(nearest)) == 9
    for weights, name in ((batch, "batch"), (donor, "donor")):
        codes = pd.Categorical(adata.obs[name]).codes
        np.testing.assert_array_equal(weights.argmax(1), codes[nearest])


# --- evaluation


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"component_encoder": "amortized"}, {"prior": "vamp", "n_prior_components": 5}],
    ids=["separate", "amortized", "vamp"],
)
def test_latents_do_not_depend_on_the_batch_size(kwargs, make_adata):
    adata = make_adata()
    model = fit(MixSCVI, adata, COVARIATES, n_components=3, encode_covariates=True, **kwargs)
    for representation in ("mean", "components", "parameters"):
        alone, together = (
            model.get_latent_representation(batch_size=size, representation=representation)
            for size in (1, 64)
        )
        np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)
    some = model.get_latent_representation(indices=[5, 2])
    np.testing.assert_allclose(some, model.get_latent_representation()[[5, 2]], atol=1e-5)
    new = make_adata()
    np.testing.assert_allclose(
        model.get_latent_representation(new), model.get_latent_representation(), atol=1e-6
    )


def test_latents_behind_a_flow_repeat(make_adata):
    model = fit(MixSCVI, make_adata(), n_flow_steps=2)
    one, other = (
        model.get_latent_representation(batch_size=size, mc_samples=2_000) for size in (24, 72)
    )
    again = model.get_latent_representation(batch_size=24, mc_samples=2_000)
    np.testing.assert_array_equal(one, again)
    draws = np.mean(
        [seeded(model.get_latent_representation, give_mean=False, seed=i) for i in range(100)],
        axis=0,
    )
    _, variance = model.get_latent_representation(return_dist=True, mc_samples=2_000)
    assert (abs(one - other) < 6 * np.sqrt(variance / 1000)).all()
    assert (abs(draws - one) < 6 * np.sqrt(variance / 100)).all()


def test_own_dataloader(make_adata):
    adata = make_adata()
    model = fit(MixSCVI, adata, n_components=3)
    loader = model._make_data_loader(adata=adata, batch_size=20)
    latent = model.get_latent_representation(batch_size=20)
    np.testing.assert_array_equal(model.get_latent_representation(dataloader=loader), latent)
    mixture = model.get_latent_mixture(dataloader=loader)
    np.testing.assert_array_equal(mixture.loc, model.get_latent_mixture(batch_size=20).loc)
    values = seeded(model.get_marginal_ll, dataloader=loader, n_mc_samples=30)
    assert values == seeded(model.get_marginal_ll, batch_size=20, n_mc_samples=30)
    with pytest.raises(ValueError, match="dataloader"):
        model.get_latent_mixture(adata, dataloader=loader)


# --- the likelihood, by brute force

LEARN = {"max_epochs": 20, "plan_kwargs": {"lr": 2e-2, "n_epochs_kl_warmup": 1}}
QUADRATURES = {
    "one component": {"n_components": 1},
    "one component, 1 dimension": {"n_components": 1, "n_latent": 1},
    "one component, mog": {"n_components": 1, "prior": "mog", "n_prior_components": 4},
    "one component, modelled library": {
        "n_components": 1,
        "n_latent": 1,
        "use_observed_lib_size": False,
    },
    "three components": {},
    "ln": {"latent_distribution": "ln"},
    "modelled library": {"n_latent": 1, "use_observed_lib_size": False},
    "mog": {"prior": "mog", "n_prior_components": 4},
    "vamp": {"prior": "vamp", "n_prior_components": 5},
    "flow": {"n_flow_steps": 2},
    "flow, mog, nb": {
        "n_flow_steps": 1,
        "prior": "mog",
        "n_prior_components": 3,
        "gene_likelihood": "nb",
    },
    "flow, 1 dimension": {"n_flow_steps": 2, "n_latent": 1},
    "amortized, some_to_some": {
        "component_encoder": "amortized",
        "estimator": "some_to_some",
        "n_sampled_components": 1,
    },
    "one component, flow": {"n_components": 1, "n_flow_steps": 1},
}


def easy_cells(model):
    """Cells whose posterior the proposal covers well, so that an error estimate can be trusted."""
    table = seeded(model.get_posterior_diagnostics, indices=np.arange(24), n_mc_samples=3000)
    chosen = table["pareto_k"].nsmallest(3)
    assert chosen.max() < 0.5
    return [int(name.removeprefix("cell")) for name in chosen.index]


def prior_density(module):
    """log p(z), written out from the prior's parameters."""
    prior = getattr(module, "prior", None)
    if hasattr(prior, "pseudo_inputs"):
        dense, *categories = prior.pseudo_inputs()
        posterior = module.z_encoder(dense, *categories)
        loc = posterior.component_loc.flatten(0, 1)
        scale, weights = posterior.component_scale.flatten(0, 1), torch.ones(len(loc))
        return MixtureSameFamily(Categorical(weights), Independent(Normal(loc, scale), 1))
    if hasattr(prior, "logits"):
        return MixtureSameFamily(
            Categorical(logits=prior.logits),
            Independent(Normal(prior.loc, prior.log_scale.exp()), 1),
        )
    zeros = torch.zeros(module.n_latent, dtype=torch.float64)
    return Independent(Normal(zeros, torch.ones_like(zeros)), 1)


@torch.no_grad()
def quadrature(model, cell):
    """log p(x) of one cell by the rectangle rule in double precision: no encoder takes part."""
    module = copy.deepcopy(model.module).double().eval()
    if not module.use_observed_lib_size:
        # scvi-tools multiplies these two by a one-hot matrix that is always in single precision.
        module.library_log_means = module.library_log_means.float()
        module.library_log_vars = module.library_log_vars.float()
    loader = model._make_data_loader(adata=model.adata, indices=[cell], batch_size=1)
    tensors = next(iter(loader))
    counts = tensors[REGISTRY_KEYS.X_KEY].double()
    one_axis = torch.arange(-12.0, 12.0, 0.1, dtype=torch.float64)
    axes = [one_axis] * module.n_latent
    if module.use_observed_lib_size:
        axes_of_z = torch.meshgrid(*axes, indexing="ij")
        z = torch.stack(axes_of_z, dim=-1).flatten(0, -2)
        library = counts.sum().log().expand(len(z), 1)
        log_prior = prior_density(module).log_prob(z)
        log_volume = module.n_latent * math.log(0.1)
    else:
        loc = module.library_log_means[0, 0].item()
        scale = math.sqrt(module.library_log_vars[0, 0].item())
        library_axis = loc + scale * torch.arange(-7.0, 7.0, 0.05, dtype=torch.float64)
        z, library = torch.meshgrid(one_axis, library_axis, indexing="ij")
        z, library = z.flatten()[:, None], library.flatten()[:, None]
        log_prior = prior_density(module).log_prob(z) + Normal(loc, scale).log_prob(library)[:, 0]
        log_volume = math.log(0.1) + math.log(0.05 * scale)
    if module.latent_distribution == "ln":
        latent = z.softmax(-1)
    else:
        latent = z
    batch = torch.zeros(len(z), 1, dtype=torch.long)
    px = VAE.generative(module, latent, library.contiguous(), batch)["px"]
    log_joint = px.log_prob(counts).sum(-1) + log_prior
    return (log_joint.logsumexp(0) + log_volume).item()


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", QUADRATURES.values(), ids=QUADRATURES)
def test_marginal_ll_is_the_integral(kwargs, make_adata):
    defaults = {"n_components": 3, "n_latent": 2, "train_kwargs": LEARN}
    model = fit(MixSCVI, make_adata(), **{**defaults, **kwargs})
    cells = easy_cells(model)
    expected = np.array([quadrature(model, cell) for cell in cells])
    got, error = seeded(
        model.get_marginal_ll,
        indices=cells,
        n_mc_samples=12_000,
        return_mean=False,
        return_std_error=True,
    )
    assert error.max() < 0.1
    np.testing.assert_array_less(abs(got.numpy() - expected), 5 * error.numpy() + 2e-3)


def test_marginal_ll_of_one_component_is_scvis(make_adata):
    model = fit(MixSCVI, make_adata(), BATCH, n_components=1, train_kwargs=LEARN)
    ours, error = seeded(
        model.get_marginal_ll, n_mc_samples=3000, return_mean=False, return_std_error=True
    )
    loader = model._make_data_loader(adata=model.adata, batch_size=100)
    scvi.settings.seed = 9
    theirs = VAE.marginal_ll(model.module, next(iter(loader)), 3000, n_mc_samples_per_pass=100)
    assert (abs(ours - theirs) < 6 * math.sqrt(2) * error + 1e-2).all()
    assert abs((ours - theirs).mean()) < 0.02 + 5 * error.mean() / math.sqrt(len(ours))


def test_marginal_ll_error_is_honest_and_shrinks(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=3, n_latent=2, train_kwargs=LEARN)
    cells = easy_cells(model)

    def estimate(n, seed):
        return seeded(
            model.get_marginal_ll,
            indices=cells,
            n_mc_samples=n,
            return_mean=False,
            return_std_error=True,
            seed=seed,
        )

    runs = [estimate(600, seed) for seed in range(60)]
    spread = torch.stack([value for value, _ in runs]).std(0)
    error = torch.stack([error for _, error in runs]).mean(0)
    ratio = spread / error
    assert (ratio > 0.65).all()
    assert (ratio < 1.5).all()
    _, error_of_more = estimate(600 * 25, 0)
    assert (error / error_of_more).mean().item() == pytest.approx(5, rel=0.3)

    mean, error_of_mean = seeded(
        model.get_marginal_ll, indices=cells, n_mc_samples=600, return_std_error=True, seed=0
    )
    values, errors = runs[0]
    assert mean == pytest.approx(values.mean().item(), rel=1e-5)
    assert error_of_mean == pytest.approx(errors.norm().item() / len(cells), rel=1e-4)


def test_marginal_ll_forms_and_passes(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=3)
    siwae, paper = (
        seeded(model.get_marginal_ll, form=form, return_mean=False, n_mc_samples=90)
        for form in ("siwae", "paper")
    )
    assert (paper < siwae).all()
    assert seeded(model.get_marginal_ll, n_mc_samples=90) == pytest.approx(siwae.mean().item())
    whole, error = seeded(
        model.get_marginal_ll, n_mc_samples=3000, return_mean=False, return_std_error=True
    )
    parts = seeded(
        model.get_marginal_ll, n_mc_samples=3000, return_mean=False, n_mc_samples_per_pass=70
    )
    assert (abs(whole - parts) < 7 * math.sqrt(2) * error + 1e-3).all()
    with pytest.raises(ValueError, match="form"):
        model.get_marginal_ll(form="iwae")
    with pytest.raises(ValueError, match="form='siwae'"):
        model.get_marginal_ll(form="paper", return_std_error=True)
    with pytest.raises(ValueError, match="n_mc_samples"):
        model.get_marginal_ll(n_mc_samples=0)
    with pytest.raises(ValueError, match="n_mc_samples_per_pass"):
        model.get_marginal_ll(n_mc_samples_per_pass=0)
    with pytest.raises(ValueError, match="two draws per component"):
        model.get_marginal_ll(n_mc_samples=3, return_std_error=True)


@pytest.mark.parametrize("kwargs", [{}, {"n_components": 1}, {"n_flow_steps": 1, "prior": "mog"}])
def test_diagnostics(kwargs, make_adata):
    adata = make_adata()
    model = fit(MixSCVI, adata, **{"n_components": 3, **kwargs})
    n_components = model.module.n_components
    cells = [7, 0, 5]
    table = seeded(model.get_posterior_diagnostics, indices=cells, n_mc_samples=600)
    assert list(table.index) == ["cell7", "cell0", "cell5"]
    assert np.isfinite(table.to_numpy()).all()
    divergence = table["jensen_shannon_divergence"]
    assert (divergence >= -0.1).all()
    assert (divergence <= math.log(n_components) + 1e-5).all()
    assert table["effective_sample_size"].between(1, 600.1).all()
    expected = seeded(model.get_marginal_ll, indices=cells, n_mc_samples=600, return_mean=False)
    np.testing.assert_allclose(table["log_likelihood"], expected, rtol=1e-5)
    assert (table["miselbo"] <= table["log_likelihood"]).all()

    parts = seeded(model.get_component_diagnostics, indices=cells, n_mc_samples=600)
    assert parts.elbo.shape == parts.specialisation.shape == (3, n_components)
    np.testing.assert_allclose(
        (parts.elbo + parts.specialisation).mean(1), table["miselbo"], rtol=1e-5
    )
    np.testing.assert_allclose(parts.specialisation.mean(1), divergence, rtol=1e-4, atol=1e-5)
    everyone = model.get_posterior_diagnostics(n_mc_samples=90, batch_size=50)
    assert list(everyone.index) == list(adata.obs_names)
    units = model.get_active_units()
    assert units.shape == (3,)
    variance = model.get_latent_representation().var(0)
    np.testing.assert_array_equal(units, variance > 0.01)


def test_boolean_and_array_indices(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2)
    chosen = np.array([4, 9, 60])
    table = model.get_posterior_diagnostics(indices=chosen, n_mc_samples=60)
    assert list(table.index) == ["cell4", "cell9", "cell60"]
    mixture = model.get_latent_mixture()
    part = model.get_latent_mixture(indices=chosen)
    np.testing.assert_allclose(part.loc, mixture.loc[chosen], rtol=1e-4, atol=1e-5)
    mask = np.isin(np.arange(72), chosen)
    np.testing.assert_array_equal(model.get_latent_mixture(indices=mask).loc, part.loc)
    masked = model.get_posterior_diagnostics(indices=mask, n_mc_samples=60)
    assert list(masked.index) == list(table.index)


# --- training and files


@pytest.mark.filterwarnings("ignore:Last batch will have a small size")
@pytest.mark.parametrize("n_components", [1, 3])
@pytest.mark.parametrize("kwargs", [{}, {"component_encoder": "amortized", "prior": "mog"}])
def test_a_last_minibatch_of_one_cell(n_components, kwargs, make_adata):
    adata = make_adata(n_obs=75)
    sizes = {"train_size": 65 / 75, "validation_size": 10 / 75, "batch_size": 32}
    model = fit(MixSCVI, adata, n_components=n_components, train_kwargs=sizes, **kwargs)
    assert len(model.train_indices) == 65
    assert model.trainer.global_step == 4
    assert np.isfinite(model.history["elbo_train"].to_numpy(dtype=float)).all()
    latent = model.get_latent_representation(batch_size=37)
    assert np.isfinite(latent).all()
    assert latent.shape == (75, 3)


@pytest.mark.filterwarnings("ignore:Last batch will have a small size")
def test_a_last_validation_minibatch_of_one_cell(make_adata):
    sizes = {"train_size": 39 / 72, "validation_size": 33 / 72, "batch_size": 32}
    model = fit(MixSCVI, make_adata(), n_components=3, train_kwargs={**sizes, **EARLY})
    assert len(model.validation_indices) == 33
    assert np.isfinite(model.history["elbo_validation"].to_numpy(dtype=float)).all()


def test_all_training_cells_are_used_otherwise(make_adata):
    sizes = {"train_size": 68 / 72, "validation_size": 4 / 72, "batch_size": 32}
    model = fit(MixSCVI, make_adata(), train_kwargs=sizes)
    assert model.trainer.global_step == 6


class _InterruptedSave:
    """Writes the first half of a file, then is interrupted."""

    def __init__(self):
        self.original = torch.save

    def __call__(self, obj, path, *args, **kwargs):
        self.original(obj, path, *args, **kwargs)
        with open(path, "rb+") as file:
            file.truncate(len(file.read()) // 2)
        raise KeyboardInterrupt


@pytest.mark.parametrize("n_components", [1, 3])
def test_an_interrupted_save(n_components, make_adata, tmp_path, monkeypatch):
    """It leaves the earlier model as it was, and nothing beside it."""
    adata = make_adata()
    model = fit(MixSCVI, adata, n_components=n_components)
    path = tmp_path / "model"
    model.save(path, save_anndata=True)
    files = sorted(file.name for file in path.iterdir())
    latent = model.get_latent_representation()
    train(model, max_epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", _InterruptedSave())
        with pytest.raises(KeyboardInterrupt):
            model.save(path, overwrite=True, save_anndata=True)
        with pytest.raises(KeyboardInterrupt):
            model.save(tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert sorted(file.name for file in path.iterdir()) == files
    loaded = MixSCVI.load(path, accelerator="cpu")
    np.testing.assert_array_equal(loaded.get_latent_representation(), latent)


def test_save_and_overwrite(make_adata, tmp_path):
    adata = make_adata()
    model = fit(MixSCVI, adata, n_components=2)
    path = tmp_path / "deep" / "model"
    model.save(str(path))
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"dir_path .*model' already exists.*overwrite=True"):
        model.save(path)
    train(model, max_epochs=1)
    model.save(path, overwrite=True)
    assert (path / "notes.txt").read_text() == "mine"
    assert sorted(file.name for file in path.iterdir()) == ["model.pt", "notes.txt"]
    assert [file.name for file in path.parent.iterdir()] == ["model"]
    loaded = MixSCVI.load(path, adata=adata, accelerator="cpu")
    assert_same_state(loaded, model)
    model.save(path, overwrite=True, prefix="best_")
    loaded = MixSCVI.load(path, adata=adata, prefix="best_", accelerator="cpu")
    assert_same_state(loaded, model)


def test_a_saved_folder_has_the_usual_permissions(make_adata, tmp_path):
    model = fit(MixSCVI, make_adata(), n_components=2)
    model.save(tmp_path / "model")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_loaded_model_trains_on(make_adata, tmp_path):
    adata = make_adata()
    model = fit(MixSCVI, adata, n_components=3, prior="vamp", n_prior_components=4)
    model.save(tmp_path / "model")
    loaded = MixSCVI.load(tmp_path / "model", adata=adata, accelerator="cpu")
    for one in (model, loaded):
        scvi.settings.seed = 4
        train(one, max_epochs=1)
    assert_same_state(loaded, model)


# --- misuse


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


# --- all that SCVI offers

WORKING = {
    "three components": {},
    "mog, flow": {"prior": "mog", "n_flow_steps": 1},
    "vamp": {"prior": "vamp", "n_prior_components": 5},
}


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
        log_q = inference["qz"].joint().log_prob(base.unsqueeze(-2))
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
            per_cell = qz.joint().log_prob(base[:, None]) - torch.as_tensor(log_det)[..., None]
            expected = per_cell.logsumexp(-1) - math.log(trained.adata.n_obs)
            torch.testing.assert_close(log_density, expected, rtol=1e-3, atol=1e-3)
    mean = trained.get_latent_representation().mean(0)
    if dof is None:
        error = z.std(0).numpy() / math.sqrt(500)
        assert (abs(z.mean(0).numpy() - mean) < 5 * error + 0.02).all()
    some = trained.get_aggregated_posterior(indices=[0, 1], dof=dof)
    assert some.sample((2,)).shape == (2, 3)


@pytest.mark.filterwarnings("ignore:Using .* after custom Dataloader:UserWarning")  # scvi 1.5
def test_differential_abundance(trained):
    adata = trained.adata.copy()
    trained.differential_abundance(adata, sample_key="donor")
    added = adata.obsm["da_log_probs"]
    assert added.shape == (adata.n_obs, 3)
    assert np.isfinite(np.asarray(added, dtype=float)).all()


MINIFIED = ["latent_posterior_parameters", "latent_posterior_parameters_with_counts"]


@pytest.mark.parametrize("kwargs", WORKING.values(), ids=WORKING)
@pytest.mark.parametrize("kind", MINIFIED)
def test_minify(kind, kwargs, make_adata, tmp_path):
    adata = make_adata()
    counts = adata.X.copy()
    model = fit(MixSCVI, adata, BATCH, n_components=3, **kwargs)
    mixture = model.get_latent_mixture()

    def observe():
        return [
            model.get_latent_representation(),
            model.get_latent_representation(representation="parameters"),
            seeded(model.get_normalized_expression, n_samples=3, return_numpy=True),
            seeded(model.posterior_predictive_sample, n_samples=2).todense(),
        ]

    before = observe()
    model.minify_adata(minified_data_type=kind)
    assert model.minified_data_type == kind
    after = observe()
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.get_latent_mixture().scale, mixture.scale, rtol=1e-5)
    np.testing.assert_array_equal(adata.X, counts)
    if kind == MINIFIED[0]:
        assert model.adata.X.sum() == 0
        with pytest.raises(ValueError, match="minified"):
            model.get_marginal_ll()
        with pytest.raises(ValueError, match="minified"):
            model.get_elbo()
    else:
        np.testing.assert_array_equal(np.asarray(model.adata.X), counts)

    model.save(tmp_path / "model", save_anndata=True)
    loaded = MixSCVI.load(tmp_path / "model", accelerator="cpu")
    np.testing.assert_allclose(loaded.get_latent_representation(), before[0], atol=1e-5)


def test_minify_takes_the_usual_recipe(make_adata):
    """scvi-tools' tutorial stores mean and variance first; a mixture is more than those."""
    model = fit(MixSCVI, make_adata(), n_components=3)
    mixture = model.get_latent_mixture()
    mean, variance = model.get_latent_representation(return_dist=True)
    model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = mean, variance
    model.minify_adata()
    np.testing.assert_allclose(model.get_latent_mixture().loc, mixture.loc, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.get_latent_representation(), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encode_covariates", [False, True])
@pytest.mark.parametrize("component_encoder", ["separate", "amortized"])
def test_query_data(encode_covariates, component_encoder, make_adata):
    kwargs = {"encode_covariates": encode_covariates, "component_encoder": component_encoder}
    reference = make_adata()
    model = fit(MixSCVI, reference, BATCH, n_components=3, n_layers=2, **kwargs)
    latent = model.get_latent_representation()
    old = {name: value.clone() for name, value in model.module.state_dict().items()}

    query = make_adata(n_obs=40, seed=3, batches=("new",))
    mapped = MixSCVI.load_query_data(query, model, accelerator="cpu", freeze_batchnorm_decoder=True)
    start = {name: value.clone() for name, value in mapped.module.state_dict().items()}
    train(mapped, plan_kwargs={"weight_decay": 0.0})
    assert np.isfinite(mapped.get_latent_representation()).all()
    assert mapped.get_latent_representation().shape == (40, 3)

    moved = set()
    for name, parameter in mapped.module.named_parameters():
        known = old[name]
        kept = parameter[tuple(slice(n) for n in known.shape)]
        assert torch.equal(kept, known), name
        if not torch.equal(parameter, start[name]):
            moved.add(name)
    assert any(name.startswith("decoder") for name in moved)
    assert any(name.startswith("z_encoder") for name in moved) == encode_covariates
    # The reference keeps its place, so query and reference can be shown together.
    np.testing.assert_allclose(mapped.get_latent_representation(make_adata()), latent, atol=1e-5)
    np.testing.assert_array_equal(model.get_latent_representation(), latent)


def test_query_data_from_a_saved_reference(make_adata, tmp_path):
    model = fit(MixSCVI, make_adata(), BATCH, n_components=3, prior="mog", n_flow_steps=1)
    model.save(tmp_path / "model")
    query = make_adata(n_obs=40, seed=3, batches=("new",))
    mapped = MixSCVI.load_query_data(query, str(tmp_path / "model"), accelerator="cpu")
    train(mapped, plan_kwargs={"weight_decay": 0.0})
    state = mapped.module.state_dict()
    for name, value in model.module.state_dict().items():
        if name.startswith(("prior", "flow")):
            assert torch.equal(state[name], value), name
    assert np.isfinite(mapped.get_marginal_ll(n_mc_samples=30))


def test_minified_data_train_the_decoder_alone(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=3)
    model.minify_adata(minified_data_type=MINIFIED[1])
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    plan = {"update_only_decoder": True, "weight_decay": 0.0}
    train(model, max_epochs=1, plan_kwargs=plan)
    moved = {
        name for name, p in model.module.named_parameters() if not torch.equal(p, before[name])
    }
    assert moved
    assert all(name.startswith(("decoder", "px_r")) for name in moved)


# What a first reading of the code found


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


def test_a_vamp_model_meets_fewer_cells_than_pseudo_cells(make_adata, tmp_path):
    adata = make_adata()
    model = fit(MixSCVI, adata, n_components=2, prior="vamp", n_prior_components=40)
    model.save(tmp_path / "model")
    few = adata[:20].copy()
    loaded = MixSCVI.load(tmp_path / "model", adata=few)
    np.testing.assert_array_equal(
        loaded.get_latent_representation(), model.get_latent_representation(few)
    )
    MixSCVI.setup_anndata(few)
    fresh = MixSCVI(few, n_components=2, prior="vamp", n_prior_components=40)
    start = fresh.module.prior.pseudo_inputs()[0]
    assert torch.cdist(start, start).fill_diagonal_(1).min() > 1e-3


def test_a_last_cell_trains_where_nothing_is_normalised(make_adata):
    """SCVI without batch norm takes a minibatch of one cell, so one component does."""
    adata = make_adata()
    train_kwargs = {
        "batch_size": 32,
        "datasplitter_kwargs": {
            "external_indexing": [np.arange(33), np.arange(33, adata.n_obs), np.arange(0)]
        },
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Last batch will have a small size")
        ours = fit(MixSCVI, adata, n_components=1, use_batch_norm="none", train_kwargs=train_kwargs)
        theirs = fit(SCVI, adata, use_batch_norm="none", train_kwargs=train_kwargs)
    assert (ours.history["elbo_train"].values == theirs.history["elbo_train"].values).all()


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


def test_latents_under_a_flow_do_not_depend_on_the_batch(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2, n_flow_steps=2)
    whole = model.get_latent_representation(mc_samples=200)
    alone = model.get_latent_representation(indices=[5], mc_samples=200)
    np.testing.assert_allclose(alone[0], whole[5], rtol=1e-4, atol=1e-5)
    _, variance = model.get_latent_representation(return_dist=True, mc_samples=200)
    assert (variance > 0).all()


def test_an_interrupt_between_two_files_leaves_the_old_pair(make_adata, tmp_path, monkeypatch):
    target = tmp_path / "model"
    model = fit(MixSCVI, make_adata(), n_components=2)
    model.save(target, save_anndata=True)
    (target / "notes.txt").write_text("mine")
    old = {path.name: path.read_bytes() for path in target.iterdir()}
    other = fit(MixSCVI, make_adata(seed=1), n_components=2, seed=5)
    rename = Path.rename

    def interrupted(self, to):
        if self.name == "complete":
            raise KeyboardInterrupt
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            other.save(target, overwrite=True, save_anndata=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == old
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    other.save(target, overwrite=True, save_anndata=True)
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "model.pt").read_bytes() != old["model.pt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: choose a folder"):
        model.save(tmp_path / "file", overwrite=True)


def test_new_batches_leave_the_prior_of_the_reference(make_adata):
    adata = make_adata()
    options = {"prior": "vamp", "n_prior_components": 6, "encode_covariates": True}
    setup = {"batch_key": "batch"}
    model = fit(MixSCVI, adata, setup, n_components=2, **options)
    query = make_adata(seed=3)
    query.obs["batch"] = "new"
    mapped = MixSCVI.load_query_data(query, model)
    _, before = model.module.prior.pseudo_inputs()
    _, after = mapped.module.prior.pseudo_inputs()
    assert after.shape[1] == before.shape[1] + 1
    torch.testing.assert_close(after[:, :-1], before)
    assert (after[:, -1] == 0).all()


def test_a_prior_object_is_copied_and_must_fit(make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    prior = GaussianMixture(n_latent=SMALL.get("n_latent", 10), n_components=3)
    model = MixSCVI(adata, n_components=2, prior=prior, **SMALL)
    assert model.module.prior is not prior
    with pytest.raises(ValueError, match=r"prior must have event shape .* got \(1,\)"):
        MixSCVI(adata, n_components=2, prior=GaussianMixture(1, 3), **SMALL)
    with pytest.raises(ValueError, match=r"or an instance of mixscvi.mixture.Prior"):
        MixSCVI(adata, n_components=2, prior=GaussianMixture, **SMALL)


def test_untrained_models_refuse_scvi_tools_methods_too(make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    model = MixSCVI(adata, n_components=2)
    for method in (model.get_elbo, model.get_reconstruction_error, model.get_normalized_expression):
        with pytest.raises(RuntimeError, match="[Tt]rain"):
            method()
