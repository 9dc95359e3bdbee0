"""Arguments of expression that is decoded: weights, and draws of all cells together."""

import numpy as np
import pytest
import torch

from fitting import fit
from mixscvi import MixSCVI


@pytest.fixture(scope="module", params=[1, 2], ids=["A1", "A2"])
def model(request, make_adata):
    return fit(MixSCVI, make_adata(), n_components=request.param)


@pytest.mark.parametrize("weights", [None, "uniform", "importance", "adapted"])
def test_arguments_of_weights(model, weights):
    with pytest.raises(TypeError, match=r"expression\(\) takes no argument 'n_sample', got 25"):
        model.get_normalized_expression(weights=weights, n_sample=25)


def test_importance_weights_of_listed_cells(model):
    """SCVI takes arrays of positions alone here."""
    draws = model.get_normalized_expression(
        indices=[0, 1, 5], weights="importance", n_samples_overall=7, n_mc_samples=10
    )
    assert draws.shape == (7, 20)
    assert np.isfinite(draws).all()
    with pytest.raises(ValueError, match="weights='importance' needs adata"):
        model.get_normalized_expression(
            dataloader=[{"X": torch.ones(2, 20), "batch": torch.zeros(2, 1)}], weights="importance"
        )


@pytest.mark.parametrize("n", [3, 72, 200])
@pytest.mark.parametrize("weights", [None, "uniform"])
def test_draws_overall_are_an_array(model, n, weights):
    """SCVI fails to name so many rows by the cells."""
    draws = model.get_normalized_expression(n_samples_overall=n, weights=weights)
    assert isinstance(draws, np.ndarray)
    assert draws.shape == (n, 20)
    with pytest.warns(UserWarning, match="return_numpy=False has no cells to name"):
        model.get_normalized_expression(n_samples_overall=n, return_numpy=False)
    with pytest.raises(ValueError, match="n_samples_overall takes the place of n_samples"):
        model.get_normalized_expression(n_samples_overall=n, n_samples=2)
