"""The marginal likelihood against quadrature."""

import copy
import math
import re
import warnings

import numpy as np
import pytest
import scvi
import torch
from scvi import REGISTRY_KEYS
from scvi.module import VAE
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fitting import BATCH, LEARN, fit, seeded
from mixscvi import MixSCVI
from mixscvi.model import evaluation

QUADRATURES = {
    "one component": {"n_components": 1},
    "one component, 1 dimension": {"n_components": 1, "n_latent": 1},
    "one component, mog": {"n_components": 1, "prior": "mog", "n_prior_components": 4},
    "one component, modeled library": {
        "n_components": 1,
        "n_latent": 1,
        "use_observed_lib_size": False,
    },
    "three components": {},
    "ln": {"latent_distribution": "ln"},
    "modeled library": {"n_latent": 1, "use_observed_lib_size": False},
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

    table = seeded(model.get_posterior_diagnostics, indices=np.arange(24), n_mc_samples=3000)
    hard = [int(name.removeprefix("cell")) for name in table["pareto_k"].nlargest(3).index]
    got, error = seeded(
        model.get_marginal_ll,
        indices=cells + hard,
        n_mc_samples=3000,
        return_mean=False,
        return_std_error=True,
        proposal="adapted",
    )
    expected = np.append(expected, [quadrature(model, cell) for cell in hard])
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
    siwae, iw_miselbo = (
        seeded(model.get_marginal_ll, form=form, return_mean=False, n_mc_samples=90)
        for form in ("siwae", "iw_miselbo")
    )
    assert (iw_miselbo < siwae).all()
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
    with pytest.raises(ValueError, match="proposal must be one of 'encoder', 'adapted'"):
        model.get_marginal_ll(proposal="exact")
    with pytest.raises(ValueError, match="form='iw_miselbo' is the encoder's"):
        model.get_marginal_ll(form="iw_miselbo", proposal="adapted")
    with pytest.raises(ValueError, match="progress is for proposal='adapted'"):
        model.get_marginal_ll(progress=True)
    with pytest.raises(ValueError, match="adapt_kwargs is for proposal='adapted'"):
        model.get_marginal_ll(adapt_kwargs={})
    with pytest.raises(ValueError, match="form='siwae'"):
        model.get_marginal_ll(form="iw_miselbo", return_std_error=True)
    with pytest.raises(ValueError, match="n_mc_samples"):
        model.get_marginal_ll(n_mc_samples=0)
    with pytest.raises(ValueError, match="n_mc_samples_per_pass"):
        model.get_marginal_ll(n_mc_samples_per_pass=0)
    with pytest.raises(ValueError, match="two draws per component"):
        model.get_marginal_ll(n_mc_samples=3, return_std_error=True)


@pytest.mark.parametrize("proposal", ["encoder", "adapted"])
def test_marginal_ll_has_the_types_of_scvi_tools(proposal, make_adata):
    adata = make_adata()
    theirs = fit(scvi.model.SCVI, adata)
    model = fit(MixSCVI, adata, n_components=2)
    kwargs = {"indices": [1, 2, 3], "n_mc_samples": 40}
    for return_mean in (True, False):
        expected = theirs.get_marginal_ll(**kwargs, return_mean=return_mean)
        got = model.get_marginal_ll(
            **kwargs, return_mean=return_mean, return_std_error=True, proposal=proposal
        )
        for value in got:
            assert type(value) is type(expected)
            assert value.shape == expected.shape
            assert value.dtype == expected.dtype
    mean, error = seeded(model.get_marginal_ll, **kwargs, return_std_error=True, proposal=proposal)
    values, errors = seeded(
        model.get_marginal_ll,
        **kwargs,
        return_std_error=True,
        proposal=proposal,
        return_mean=False,
    )
    assert mean == pytest.approx(values.mean().item())
    assert error == pytest.approx(errors.norm().item() / 3)


def test_exponential_of_the_adapted_estimate_is_unbiased(make_adata):
    """Few draws from a coarse proposal: the logarithm is biased, its exponential is not."""
    model = fit(MixSCVI, make_adata(), n_components=2, n_latent=2, train_kwargs=LEARN)
    cell = [0] * 400  # as many independent adaptations of one cell
    (estimates, _) = seeded(
        model.get_marginal_ll,
        indices=cell,
        n_mc_samples=25,
        return_mean=False,
        return_std_error=True,
        proposal="adapted",
        adapt_kwargs={"n_draws": 30, "max_generations": 1},
    )
    ratio = (estimates.double() - quadrature(model, 0)).exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert error < 0.1
    assert abs(ratio.mean() - 1) < 4 * error


def test_an_untrustworthy_proposal_is_told_once(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2, train_kwargs=LEARN)
    with torch.no_grad():  # an encoder that is sure of itself, and wrong
        model.module.z_encoder.encoder.heads.mean.bias += 3.0
    for form in ("siwae", "iw_miselbo"):
        with pytest.warns(UserWarning, match="no good proposal for") as caught:
            model.get_marginal_ll(form=form, n_mc_samples=100, batch_size=20)
        assert len(caught) == 1
        assert "lower bound" in str(caught[0].message)
        assert 'proposal="adapted"' in str(caught[0].message)
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="no good proposal for") as caught:
        table = model.get_posterior_diagnostics(n_mc_samples=100)
    assert [warning.filename for warning in caught] == [__file__]
    untrusted = (table["pareto_k"] > 0.7).mean()
    told = float(re.search(r"for (\d+)%", str(caught[0].message))[1])
    assert told == pytest.approx(100 * untrusted, abs=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.get_marginal_ll(n_mc_samples=24)
        model.get_marginal_ll(n_mc_samples=100, proposal="adapted", indices=[0, 1])


def test_a_tenth_of_the_cells_may_be_untrustworthy(make_adata, monkeypatch):
    model = fit(MixSCVI, make_adata(), n_components=2)
    share = {}

    def tail_index(log_weights):
        return torch.where(torch.arange(len(log_weights)) < share["n"], 0.8, 0.1)

    monkeypatch.setattr(evaluation, "pareto_k", tail_index)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        share["n"] = 2
        model.get_marginal_ll(n_mc_samples=30, indices=np.arange(20))
        share["n"] = 3
        with pytest.raises(UserWarning, match="for 15% of the cells"):
            model.get_marginal_ll(n_mc_samples=30, indices=np.arange(20))


@pytest.mark.parametrize("kwargs", [{}, {"n_components": 1}, {"proposal": "adapted"}])
@pytest.mark.parametrize("return_mean", [True, False])
def test_types_are_those_of_scvi(return_mean, kwargs, make_adata):
    """Whatever the installed scvi-tools returns."""
    adata, call = make_adata(), {"indices": [0, 5, 9, 2], "batch_size": 3, "n_mc_samples": 30}
    model_kwargs = {name: value for name, value in kwargs.items() if name == "n_components"}
    call_kwargs = {name: value for name, value in kwargs.items() if name != "n_components"}
    theirs = fit(scvi.model.SCVI, adata).get_marginal_ll(**call, return_mean=return_mean)
    model = fit(MixSCVI, adata, **model_kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few draws
        ours = model.get_marginal_ll(**call, **call_kwargs, return_mean=return_mean)
    assert type(ours) is type(theirs)
    assert np.shape(ours) == np.shape(theirs) == (() if return_mean else (4,))
    assert ours.dtype == theirs.dtype
    (tensors,) = model._make_data_loader(adata=adata, indices=[0, 5, 9, 2])
    of_module = model.module.marginal_ll(tensors, 30, return_mean)
    assert type(of_module) is (float if return_mean else torch.Tensor)


@pytest.mark.parametrize("n_components", [1, 2])
def test_too_few_draws_for_a_standard_error(n_components, make_adata):
    model = fit(MixSCVI, make_adata(), n_components=n_components)
    n = 2 * model.module.n_components
    assert len(model.get_marginal_ll(n_mc_samples=n, return_std_error=True)) == 2
    with pytest.raises(ValueError, match="True needs two draws per component, .* got"):
        model.get_marginal_ll(n_mc_samples=n // 2, return_std_error=True)
