"""Adapted proposals of a minibatch against naive densities and quadrature."""

import copy

import pytest
import torch
from scvi import REGISTRY_KEYS
from torch.distributions import Normal

from mixscvi.module import adapting
from mixscvi.module.decoding import decode
from naive_module import (
    COVARIATES,
    in_double,
    make_module,
    make_tensors,
    naive_decode,
    naive_flow,
    naive_posterior,
    naive_prior,
)
from quadrature import integrate

VARIANTS = {
    "three components": {},
    "one component": {"n_components": 1},
    "one component, reference": {"n_components": 1, "likelihood": "reference"},
    "reference": {"likelihood": "reference"},
    "mog": {"prior": "mog"},
    "vamp": {"prior": "vamp", **COVARIATES},
    "flow": {"n_flow_steps": 2},
    "flow, mog, nb": {"n_flow_steps": 1, "prior": "mog", "gene_likelihood": "nb"},
    "amortized": {"component_encoder": "amortized"},
    "some to some": {"estimator": "some_to_some", "n_sampled_components": 1},
    "ln": {"latent_distribution": "ln"},
    "ln, flow": {"latent_distribution": "ln", "n_flow_steps": 1},
    "poisson": {"gene_likelihood": "poisson"},
    "normal": {"gene_likelihood": "normal"},
    "covariates": COVARIATES,
    "batch embeddings": {**COVARIATES, "batch_representation": "embedding"},
    "size factors": {**COVARIATES, "use_size_factor_key": True},
    "dispersion by batch": {**COVARIATES, "dispersion": "gene-batch"},
    "dispersion by label": {**COVARIATES, "dispersion": "gene-label"},
    "dispersion by cell": {"dispersion": "gene-cell"},
    "modeled library": {"use_observed_lib_size": False, "n_latent": 1, "n_batch": 2},
    "modeled library, flow": {"use_observed_lib_size": False, "n_latent": 1, "n_flow_steps": 1},
    "modeled library, one component": {
        "use_observed_lib_size": False,
        "n_latent": 1,
        "n_components": 1,
    },
}


def prepare(kwargs):
    module = in_double(make_module(**kwargs))
    return module, make_tensors(module)


def for_scvi_tools(module):
    """A copy whose dispersions by category are in the only precision that scvi-tools takes."""
    module = copy.deepcopy(module)
    if module.dispersion in ("gene-batch", "gene-label"):
        module.px_r.data = module.px_r.data.float()
    return module


def generator():
    return torch.Generator().manual_seed(3)


@pytest.fixture
def target(monkeypatch):
    """What a module hands to the core: log-joint, start and options."""

    def handed_over(module, tensors, **options):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(adapting, "adapt", lambda *args, **kwargs: seen.append((args, kwargs)))
            module.adapt(tensors, **options)
        ((log_joint, start), kwargs) = seen[0]
        return log_joint, start, kwargs

    return handed_over


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)
def test_log_joint_is_the_naive_one(kwargs, target):
    module, tensors = prepare(kwargs)
    log_joint, start, _ = target(module, tensors)
    n_cells = len(tensors[REGISTRY_KEYS.X_KEY])
    draws = start.rsample_stratified(2, generator=generator()).flatten(1, 2)
    draws = draws.unflatten(1, (n_cells, -1)).transpose(1, 2).flatten(0, 1)  # (N, B, D)
    got = log_joint(draws, torch.arange(n_cells))
    for row, of_row in zip(draws, got, strict=True):
        z0, library = row[:, : module.n_latent], row[:, module.n_latent :]
        z, log_det = naive_flow(module, z0)
        expected = naive_prior(module).log_prob(z) + log_det
        if module.use_observed_lib_size:
            library = tensors[REGISTRY_KEYS.X_KEY].sum(1, keepdim=True).log()
        else:
            means, variances = module._compute_local_library_params(
                tensors[REGISTRY_KEYS.BATCH_KEY]
            )
            expected = expected + Normal(means, variances.sqrt()).log_prob(library).sum(-1)
        expected = expected + naive_decode(for_scvi_tools(module), tensors, z, library)
        torch.testing.assert_close(of_row, expected, rtol=1e-6, atol=1e-5)
    some = torch.tensor([1, 4, 6])
    torch.testing.assert_close(log_joint(draws[:, some], some), got[:, some])


@pytest.mark.parametrize("kwargs", [{}, {"use_observed_lib_size": False}])
def test_the_start_is_the_encoders_mixture(kwargs, target):
    module, tensors = prepare(kwargs)
    _, start, _ = target(module, tensors)
    loc, scale = naive_posterior(module, tensors)
    torch.testing.assert_close(start.component_loc[..., :2], loc)
    torch.testing.assert_close(start.component_scale[..., :2], scale)
    assert start.component_loc.shape[-1] == (2 if module.use_observed_lib_size else 3)
    if not module.use_observed_lib_size:
        _, ql, _ = module.encode(**module._get_inference_input(tensors))
        torch.testing.assert_close(start.component_loc[..., 2], ql.loc.expand(-1, 3))
        torch.testing.assert_close(start.component_scale[..., 2], ql.scale.expand(-1, 3))


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)
def test_adapted_posteriors_are_exact(kwargs):
    module, tensors = prepare(kwargs)
    adapted = module.adapt(tensors, generator(), n_final=3000)
    best = adapted.pareto_k.argsort()[:2]  # flows with random weights fold some into far modes
    assert adapted.converged[best].all()
    z = module.adapted_latents(adapted.draws)
    weights = adapted.log_weights.softmax(0)
    for cell in best:
        exact, points, exact_weights = integrate(for_scvi_tools(module), tensors, cell)
        error = adapted.standard_error[cell].item()
        assert error < 0.15
        assert abs(adapted.log_likelihood[cell].item() - exact) < 5 * error + 1e-3
        mean = exact_weights @ points
        variance = exact_weights @ (points - mean).square()
        n_effective = 1 / weights[:, cell].square().sum()
        got = weights[:, cell] @ z[:, cell]
        assert ((got - mean).abs() < 5 * (variance / n_effective).sqrt() + 1e-3).all()


def test_adapting_leaves_the_module_as_it_was():
    module, tensors = prepare({"prior": "vamp", "n_flow_steps": 1})
    module.prior.requires_grad_(False)
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    assert set(before.values()) == {True, False}
    module.adapt(tensors, generator(), n_final=25, max_generations=1)
    assert {name: p.requires_grad for name, p in module.named_parameters()} == before
    assert all(p.grad is None for p in module.parameters())


def test_the_module_survives_an_interrupt(monkeypatch):
    module, tensors = prepare({})
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return decode(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(adapting, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module.adapt(tensors, generator())
    assert len(calls) == 5
    assert all(p.requires_grad for p in module.z_encoder.parameters())
    assert module.adapt(tensors, generator()).converged.all()


def test_passes_bound_the_memory(monkeypatch):
    module, tensors = prepare({})
    rows = []

    def counted(module, z, *args, **kwargs):
        rows.append(z.shape[:-1].numel())
        return decode(module, z, *args, **kwargs)

    monkeypatch.setattr(adapting, "decode", counted)
    whole = module.adapt(tensors, generator(), n_final=400, max_generations=1)
    n_whole = len(rows)
    rows.clear()
    parts = module.adapt(tensors, generator(), 10, n_final=400, max_generations=1)
    assert max(rows) <= 10 * len(tensors[REGISTRY_KEYS.X_KEY])
    assert len(rows) > 3 * n_whole
    torch.testing.assert_close(parts.log_weights, whole.log_weights)
    assert whole.n_evaluations.unique().numel() == 1


def test_inference_mode_is_refused():
    module, tensors = prepare({})
    with pytest.raises(RuntimeError, match="inference_mode"), torch.inference_mode():
        module.adapt(tensors)
