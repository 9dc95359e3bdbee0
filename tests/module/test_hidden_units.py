"""What is the same for all draws of a cell enters once per cell, with scvi-tools' values."""

import copy

import pytest
import torch
from scvi.nn import FCLayers

from mixscvi.module.hidden_units import hidden_units, hidden_units_by_columns
from tensor_sizes import LargestTensor

LEADS = ((6,), (5, 6), (5, 6, 4))  # of 6 cells
N_CATS = (7, 1, 3)


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("inject_covariates", [True, False])
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_values_statistics_and_gradients_are_those_of_repeated_columns(
    lead, inject_covariates, norm
):
    torch.manual_seed(0)
    layers = FCLayers(
        n_in=2 + 3,
        n_out=8,
        n_cat_list=N_CATS,
        n_layers=3,
        n_hidden=9,
        inject_covariates=inject_covariates,
        use_batch_norm=norm == "batch",
        use_layer_norm=norm == "layer",
        dropout_rate=0,
    ).double()
    z = torch.randn(*lead, 2, dtype=torch.float64)
    continuous = [torch.randn(6, 1).double(), torch.randn(6, 2).double()]
    categories = [torch.randint(n, (6, 1)) for n in N_CATS]
    got = []
    for through in (hidden_units, hidden_units_by_columns):
        network = copy.deepcopy(layers)
        inputs = [tensor.clone().requires_grad_() for tensor in (z, *continuous)]
        hidden = through(network, inputs[0], inputs[1:], categories)
        (hidden * torch.arange(hidden.numel()).view_as(hidden).sin()).sum().backward()
        gradients = [t.grad for t in (*inputs, *network.parameters())]
        got.append([hidden, *gradients, *network.buffers()])
    assert got[0][0].shape == (*lead, 8)
    assert any((gradient != 0).any() for gradient in got[0][1:4])
    torch.testing.assert_close(*got, rtol=1e-10, atol=1e-12)


def test_no_covariates_are_the_layers_themselves():
    layers, z = FCLayers(n_in=2, n_out=8, dropout_rate=0), torch.randn(5, 6, 4, 2)
    hidden = hidden_units(layers, z, [], [])
    assert torch.equal(hidden, layers(z.flatten(0, 2)).view(5, 6, 4, 8))


def test_no_column_of_a_covariate_exists_per_draw():
    n_cats, n_draws = 500, 20 * 6
    layers = FCLayers(n_in=2, n_out=8, n_cat_list=[n_cats])
    inputs = (layers, torch.zeros(20, 6, 1, 2), [], [torch.zeros(6, 1, dtype=torch.long)])
    with LargestTensor() as largest:
        hidden_units(*inputs)
    assert largest.numel < n_draws * n_cats
    with LargestTensor() as largest:
        hidden_units_by_columns(*inputs)
    assert largest.numel >= n_draws * n_cats


def test_missing_categories_are_an_error():
    layers = FCLayers(n_in=2, n_out=8, n_cat_list=[3])
    with pytest.raises(ValueError, match="shorter"):
        hidden_units(layers, torch.zeros(6, 2), [], [])
