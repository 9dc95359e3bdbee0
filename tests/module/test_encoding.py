"""Between scvi-tools' inputs and the core's encoders."""

import torch

from mixscvi.module.encoding import encoder_input
from naive_module import COVARIATES, N_BATCH, N_CATS, make_module, make_tensors


def test_categories_are_indices_or_weights():
    module = make_module(**COVARIATES).eval()
    tensors = make_tensors(module, 5)
    dense, categories = encoder_input(module, **module._get_inference_input(tensors))
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
