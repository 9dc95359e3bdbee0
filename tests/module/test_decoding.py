"""Draws of any leading shape are decoded as scvi-tools decodes each of them."""

import itertools

import pytest
import torch
from scvi import REGISTRY_KEYS
from scvi.module import VAE

from mixscvi.module import CountLikelihood, decode
from naive_module import COVARIATES, N_BATCH, N_GENES, N_LABELS, make_module, make_tensors

CASES = {
    "embedding": {
        **COVARIATES,
        "batch_representation": "embedding",
        "dispersion": "gene-cell",
        "use_size_factor_key": True,
    },
    "gene-batch": {**COVARIATES, "dispersion": "gene-batch"},
    "gene-label": {"n_labels": N_LABELS, "n_batch": N_BATCH, "dispersion": "gene-label"},
    "gene": {"n_layers": 2, "n_batch": N_BATCH},
    "layer norm": {"use_batch_norm": "none", "use_layer_norm": "both", **COVARIATES},
}
LIKELIHOODS = {
    "zinb": ("mu", "theta", "zi_logits", "scale"),
    "nb": ("mu", "theta", "scale"),
    "poisson": ("rate", "scale"),
    "normal": ("loc", "scale"),
}


def log_libraries(*shape):
    """Far below one count and up to a million: bounds of the decoder's rates would show."""
    return 21 * torch.rand(*shape, 1) - 7


@pytest.mark.parametrize("transform_batch", [None, 1])
@pytest.mark.parametrize("gene_likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kwargs", CASES.values(), ids=CASES)
def test_decode_is_scvi_tools_generative_of_each_draw(kwargs, gene_likelihood, transform_batch):
    module = make_module(**kwargs, gene_likelihood=gene_likelihood).eval()
    tensors = make_tensors(module, 4)
    z, library = 2 * torch.randn(3, 4, 5, 2), log_libraries(3, 4, 5)

    def inputs(z, library):
        drawn = {"z": z, "library": library}
        return module._get_generative_input(tensors, drawn) | {"transform_batch": transform_batch}

    likelihood = decode(module, **inputs(z, library))
    assert isinstance(module.generative(**inputs(z, library))["px"], CountLikelihood)
    px = likelihood.distribution()
    assert px.mean.shape == (3, 4, 5, N_GENES)
    log_prob = likelihood.log_prob(tensors[REGISTRY_KEYS.X_KEY])
    reference = decode(module, **inputs(z, library), fused=False)
    torch.testing.assert_close(
        log_prob, reference.log_prob(tensors[REGISTRY_KEYS.X_KEY]), rtol=1e-5, atol=1e-4
    )
    for layer, s in itertools.product(range(3), range(5)):
        alone = VAE.generative(module, **inputs(z[layer, :, s], library[layer, :, s]))["px"]
        for name in LIKELIHOODS[gene_likelihood]:
            got = getattr(px, name)[layer, :, s]
            torch.testing.assert_close(got, getattr(alone, name), rtol=1e-4, atol=1e-5)
        expected = alone.log_prob(tensors[REGISTRY_KEYS.X_KEY]).sum(-1)
        torch.testing.assert_close(log_prob[layer, :, s], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("gene_likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kwargs", CASES.values(), ids=CASES)
def test_plain_draws_are_distributions_of_scvi_tools(kwargs, gene_likelihood):
    module = make_module(**kwargs, gene_likelihood=gene_likelihood).eval()
    tensors = make_tensors(module, 4)
    for shape in ((4,), (3, 4)):
        z, library = 2 * torch.randn(*shape, 2), log_libraries(*shape)
        inputs = module._get_generative_input(tensors, {"z": z, "library": library})
        px = module.generative(**inputs)["px"]
        log_prob = decode(module, **inputs).log_prob(tensors[REGISTRY_KEYS.X_KEY])
        each = zip(z.view(-1, 4, 2), library.view(-1, 4, 1), strict=True)
        alone = [VAE.generative(module, **{**inputs, "z": a, "library": b})["px"] for a, b in each]
        assert type(px) is type(alone[0])
        for name in LIKELIHOODS[gene_likelihood]:
            expected = torch.stack([getattr(one, name) for one in alone])
            got = getattr(px, name).view_as(expected)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        expected = torch.stack(
            [one.log_prob(tensors[REGISTRY_KEYS.X_KEY]).sum(-1) for one in alone]
        )
        torch.testing.assert_close(log_prob, expected.view_as(log_prob), rtol=1e-5, atol=1e-4)
