"""Small modules, minibatches, and naive computations: one component, draw and cell at a time."""

import dataclasses
import itertools
import math

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.module import VAE
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from mixscvi.module import FusedVAE, MixtureOptions, MixVAE, ScviVAE
from mixscvi.module.encoding import encoder_input

N_GENES, N_BATCH, N_LABELS, N_CATS, N_CONT = 9, 2, 3, [3, 4], 2
COVARIATES = {
    "n_batch": N_BATCH,
    "n_labels": N_LABELS,
    "n_continuous_cov": N_CONT,
    "n_cats_per_cov": N_CATS,
    "encode_covariates": True,
}


def make_tensors(module, n_cells=7, *, seed=0):
    """A minibatch with what the module was made for and nothing else."""
    dtype = next(module.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    rate = 4 * torch.rand(n_cells, N_GENES, generator=generator)
    x = torch.poisson(rate, generator=generator)
    x[:, 0] += 1

    def category(n):
        return torch.randint(max(n, 1), (n_cells, 1), generator=generator)

    tensors = {
        REGISTRY_KEYS.X_KEY: x.to(dtype),
        REGISTRY_KEYS.BATCH_KEY: category(module.n_batch),
        REGISTRY_KEYS.LABELS_KEY: category(module.n_labels),
    }
    if module.encode_covariates:
        continuous = torch.randn(n_cells, N_CONT, generator=generator)
        tensors[REGISTRY_KEYS.CONT_COVS_KEY] = continuous.to(dtype)
        tensors[REGISTRY_KEYS.CAT_COVS_KEY] = torch.cat([category(n) for n in N_CATS], dim=1)
    if module.use_size_factor_key:
        factor = 1 + torch.rand(n_cells, 1, generator=generator)
        tensors[REGISTRY_KEYS.SIZE_FACTOR_KEY] = factor.to(dtype)
    return tensors


OPTIONS = {field.name for field in dataclasses.fields(MixtureOptions)}


def make_module(*, seed=0, **kwargs):
    torch.manual_seed(seed)
    given = {"n_components": 3, "n_prior_components": 4, **kwargs}
    mixture = MixtureOptions(**{name: given[name] for name in OPTIONS & given.keys()})
    kwargs = {name: value for name, value in kwargs.items() if name not in OPTIONS}
    defaults = {"n_latent": 2, "n_hidden": 6}
    if not kwargs.get("use_observed_lib_size", True):
        n_batch = kwargs.get("n_batch", 1)
        defaults["library_log_means"] = np.full((1, n_batch), 2.5)
        defaults["library_log_vars"] = np.full((1, n_batch), 0.4)
    kwargs = {**defaults, **kwargs}
    if mixture.is_scvi:
        cls = FusedVAE if mixture.likelihood == "fused" else ScviVAE
        return cls(N_GENES, **kwargs)
    module = MixVAE(N_GENES, mixture=mixture, **kwargs)
    if mixture.n_flow_steps:
        spread_out(module.flow)
    return module


def in_double(module):
    """The module in evaluation mode and double precision, for tight comparisons."""
    module = module.double().eval()
    if not module.use_observed_lib_size:
        # scvi-tools multiplies these two by a one-hot matrix that is always in single precision.
        module.library_log_means = module.library_log_means.float()
        module.library_log_vars = module.library_log_vars.float()
    return module


def spread_out(flow):
    """Move a flow well away from where it starts."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def take(tensors, cells):
    return {name: values[cells] for name, values in tensors.items()}


def standard_normal(n_latent, dtype=torch.float64):
    return Independent(Normal(torch.zeros(n_latent, dtype=dtype), 1.0), 1)


def naive_posterior(module, tensors):
    """The components' parameters, from one call of the encoder per component: `(B, A, D)`."""
    dense, categories = encoder_input(module, **module._get_inference_input(tensors))
    parts = [
        module.z_encoder(dense, *categories, components=torch.tensor([a]))
        for a in range(module.n_components)
    ]
    loc = torch.cat([part.component_loc for part in parts], dim=1)
    scale = torch.cat([part.component_scale for part in parts], dim=1)
    return loc, scale


def naive_mixture(loc, scale):
    weights = Categorical(torch.ones(loc.shape[-2], dtype=loc.dtype))
    weights = weights.expand(loc.shape[:-2])
    return MixtureSameFamily(weights, Independent(Normal(loc, scale), 1))


def naive_prior(module):
    if hasattr(module.prior, "pseudo_inputs"):
        training = module.z_encoder.training
        module.z_encoder.eval()
        dense, *categories = module.prior.pseudo_inputs()
        posterior = module.z_encoder(dense, *categories)
        module.z_encoder.train(training)
        return naive_mixture(
            posterior.component_loc.flatten(0, 1), posterior.component_scale.flatten(0, 1)
        )
    if hasattr(module.prior, "logits"):
        prior = module.prior
        components = Independent(Normal(prior.loc, prior.log_scale.exp()), 1)
        return MixtureSameFamily(Categorical(logits=prior.logits), components)
    dtype = next(module.parameters()).dtype
    return standard_normal(module.n_latent, dtype)


def naive_flow(module, z0):
    """f(z0) and log |det|, the latter from the whole Jacobian of one point after another."""
    if module.flow is None:
        return z0, torch.zeros(z0.shape[:-1], dtype=z0.dtype)
    log_dets = [
        torch.autograd.functional.jacobian(
            lambda point: module.flow(point)[0], point, create_graph=True
        )
        .det()
        .abs()
        .log()
        for point in z0
    ]
    return module.flow(z0)[0], torch.stack(log_dets)


def naive_decode(module, tensors, z, library):
    """log p(x | z) of one draw `(B, D)` per cell, by scvi-tools' decoder and likelihood."""
    inputs = module._get_generative_input(
        tensors, {"z": module.z_encoder.z_transformation(z), "library": library, "qz": None}
    )
    px = VAE.generative(module, **inputs)["px"]
    return px.log_prob(tensors[REGISTRY_KEYS.X_KEY]).sum(-1)


def naive_loss(module, tensors, noise, library, kl_weight, chosen):
    """The loss from a double loop over draws and components, with the same noise."""
    loc, scale = naive_posterior(module, tensors)
    mixture, prior = naive_mixture(loc, scale), naive_prior(module)
    rows = []
    for layer in range(noise.shape[0]):
        for s, a in enumerate(chosen):
            z0 = loc[:, a] + scale[:, a] * noise[layer, :, s]
            z, log_det = naive_flow(module, z0)
            log_q = mixture.log_prob(z0) - log_det
            log_px = naive_decode(module, tensors, z, library)
            rows.append(log_px + kl_weight * (prior.log_prob(z) - log_q))
    log_w = torch.stack(rows).unflatten(0, (noise.shape[0], len(chosen)))
    if module.mixture.objective == "siwae":
        bound = log_w.flatten(0, 1).logsumexp(0) - math.log(noise.shape[0] * len(chosen))
    else:
        per_component = log_w.logsumexp(0) - math.log(noise.shape[0])
        bound = per_component.mean(0)
    return -bound


def gradients(loss, module):
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    values = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True, retain_graph=True)
    return dict(zip([name for name, _ in named], values, strict=True))


COMBINATIONS = {
    f"{encoder}-{estimator}-{prior}-{n_flow_steps}": {
        "component_encoder": encoder,
        "estimator": estimator,
        "n_sampled_components": None if estimator == "all_to_all" else 2,
        "prior": prior,
        "n_flow_steps": n_flow_steps,
    }
    for encoder, estimator, prior, n_flow_steps in itertools.product(
        ("separate", "amortized"),
        ("all_to_all", "some_to_all", "some_to_some"),
        ("normal", "mog", "vamp"),
        (0, 2),
    )
}
