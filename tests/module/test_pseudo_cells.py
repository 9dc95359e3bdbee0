"""The cells that a VampPrior learns."""

import pytest
import torch
from scvi import REGISTRY_KEYS

from mixscvi.module import PseudoCells
from naive_module import COVARIATES, N_BATCH, N_CATS, make_module, make_tensors


@pytest.mark.parametrize("likelihood", ["zinb", "normal"])
def test_pseudo_cells_start_as_real_cells(likelihood):
    module = make_module(prior="vamp", gene_likelihood=likelihood, **COVARIATES)
    tensors = make_tensors(module, 4)
    if likelihood == "normal":
        tensors[REGISTRY_KEYS.X_KEY][:, 1] = -0.5
    module.initialise_pseudo_cells(tensors)
    dense, batch, *covariates = module.prior.pseudo_inputs()
    expected = torch.cat(
        [tensors[REGISTRY_KEYS.X_KEY].log1p(), tensors[REGISTRY_KEYS.CONT_COVS_KEY]], dim=1
    )
    torch.testing.assert_close(dense, expected, rtol=0, atol=0.006)
    assert torch.equal(batch.argmax(-1), tensors[REGISTRY_KEYS.BATCH_KEY][:, 0])
    for i, covariate in enumerate(covariates):
        assert torch.equal(covariate.argmax(-1), tensors[REGISTRY_KEYS.CAT_COVS_KEY][:, i])
        torch.testing.assert_close(covariate.sum(-1), torch.ones(4))
        assert covariate.amax(-1).min() > 0.8


def test_pseudo_expression_is_never_negative():
    pseudo = PseudoCells(5, 3, 4, [2], non_negative=True)
    with torch.no_grad():
        pseudo.dense.fill_(-1.0)
    dense, _ = pseudo()
    assert (dense[:, :3] >= 0).all()
    assert (dense[:, 3] == -1).all()


def test_categories_are_indices_or_weights():
    module = make_module(**COVARIATES).eval()
    tensors = make_tensors(module, 5)
    dense, categories = module._encoder_input(**module._get_inference_input(tensors))
    sizes = [N_BATCH, *N_CATS]
    weights = [
        torch.nn.functional.one_hot(c[:, 0], n).float()
        for c, n in zip(categories, sizes, strict=True)
    ]
    by_index = module.z_encoder(dense, *categories)
    by_weight = module.z_encoder(dense, *weights)
    torch.testing.assert_close(by_index.component_loc, by_weight.component_loc)
    other = module.z_encoder(dense, 1 - categories[0], *categories[1:])
    assert (by_index.component_loc != other.component_loc).any()
