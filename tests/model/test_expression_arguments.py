"""Arguments of expression that is decoded: weights, and draws of all cells together."""

import numpy as np
import pandas as pd
import pytest
import torch

from fitting import fit, seeded
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
    for mask in (np.arange(72) < 9, [i < 9 for i in range(72)]):
        same = [
            seeded(
                model.get_normalized_expression,
                indices=indices,
                weights="importance",
                n_samples_overall=7,
                n_mc_samples=10,
            )
            for indices in (mask, np.arange(9))
        ]
        np.testing.assert_array_equal(*same)
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


@pytest.fixture
def grouped(model):
    """Groups "1" and "2" of cells, and a level without any."""
    obs = model.adata.obs
    obs["group"] = pd.Categorical(1 + np.arange(72) % 2, categories=[1, 2, 7])
    yield model
    del obs["group"]


@pytest.mark.parametrize(
    ("mode", "weights"), [("vanilla", "uniform"), ("change", "uniform"), ("change", "adapted")]
)
def test_levels_without_cells_are_left_out(grouped, mode, weights):
    """SCVI ends in a ZeroDivisionError."""
    expected = r"groupby='group' has groups without cells, which are left out: \['7'\]"
    with pytest.warns(UserWarning, match=expected):
        table = grouped.differential_expression(
            groupby="group", mode=mode, weights=weights, silent=True
        )
    assert set(table["comparison"]) == {"1 vs Rest", "2 vs Rest"}


def test_groups_of_a_subset(grouped):
    half = np.arange(72) < 36
    ones = half & (np.arange(72) % 2 == 0)
    with pytest.warns(UserWarning, match="without cells in subset_idx.*'2', '7'"):
        table = grouped.differential_expression(groupby="group", subset_idx=ones, silent=True)
    assert set(table["comparison"]) == {"1 vs Rest"}
    # Numbers are groups, too.
    table = grouped.differential_expression(
        groupby="group", group1=1, group2=2, subset_idx=half, silent=True
    )
    assert len(table) == 20
    for kwargs in ({"group1": "1", "group2": "2"}, {"group1": 1, "group2": "other"}):
        table = grouped.differential_expression(
            groupby="group", subset_idx=half, silent=True, **kwargs
        )
        assert set(table["group1"]) == {"1"}
    given = (group for group in (1, 2))
    assert len(grouped.differential_expression(groupby="group", group1=given, silent=True)) == 40
    for kwargs, expected in (
        ({"group1": 2}, "group1=2 has no cells in subset_idx"),
        ({"group1": [1, 2]}, "group1=2 has no cells in subset_idx"),
        ({"group1": 1, "group2": 2}, "group2=2 has no cells in subset_idx"),
    ):
        with pytest.raises(ValueError, match=expected):
            grouped.differential_expression(groupby="group", subset_idx=ones, silent=True, **kwargs)
