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


def test_groups_of_a_subset_by_values_that_are_written_otherwise(model):
    obs = model.adata.obs
    days = pd.to_datetime(["2020-01-01", "2020-01-02"])
    columns = {
        "day": days[np.arange(72) % 2],
        "single": np.array([0.1, 0.2], dtype=np.float32)[np.arange(72) % 2],
        "double": (np.arange(72) % 2).astype(float),
        "flag": np.arange(72) % 2 == 0,
    }
    half = np.arange(72) < 36
    try:
        for name, values in columns.items():
            obs[name] = values
            table = model.differential_expression(groupby=name, subset_idx=half, silent=True)
            assert table["group1"].nunique() == 2
        for name, group, text in (("day", days[0], "2020-01-01"), ("double", 1, "1.0")):
            table = model.differential_expression(
                groupby=name, group1=group, subset_idx=half, silent=True
            )
            assert set(table["group1"]) == {text}
    finally:
        for name in columns.keys() & {*obs}:
            del obs[name]


def test_chosen_cells_and_a_subset(model):
    for kwargs, expected in (
        ({"idx1": [0, 1]}, "idx1 must have cells in subset_idx, and has none there"),
        ({"idx1": [12], "idx2": [1]}, "idx2 must have cells in subset_idx, and has none there"),
    ):
        with pytest.raises(ValueError, match=expected):
            model.differential_expression(subset_idx=np.arange(10, 30), silent=True, **kwargs)
    table = model.differential_expression(
        idx1=[1, 12, 13], idx2=[2, 14], subset_idx=np.arange(10, 30), silent=True
    )
    x = model.adata.X[[12, 13]]
    gene = model.adata.var_names[0]
    assert table.loc[gene, "raw_mean1"] == pytest.approx(np.asarray(x.mean(0)).ravel()[0])


def test_an_interrupted_comparison_leaves_no_column(model, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "get_normalized_expression", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.differential_expression(idx1=[0, 1], idx2=[2, 3], silent=True)
    assert "_scvi_temp_de" not in model.adata.obs


def test_groups_that_cannot_be_told(model):
    obs = model.adata.obs
    obs["missing"] = pd.array([pd.NA, *np.arange(71) % 2], dtype="Int64")
    obs["two"] = pd.Categorical(np.array(["a", "b"])[np.arange(72) % 2])
    try:
        for kwargs, expected in (
            ({"groupby": "missing"}, "groupby='missing' has missing values, pd.NA"),
            ({"groupby": "two", "group1": ["a", None]}, "group1 must name groups, got None among"),
        ):
            with pytest.raises(ValueError, match=expected):
                model.differential_expression(silent=True, **kwargs)
        table = model.differential_expression(
            groupby="missing", group1=np.array(1), subset_idx=np.arange(36), silent=True
        )
        assert set(table["group1"]) == {"1"}
        obs["missing"] = obs["missing"].astype("string").astype("category")  # as the message says
        table = model.differential_expression(groupby="missing", group1="1", silent=True)
        assert set(table["comparison"]) == {"1 vs Rest"}
        with pytest.raises(TypeError, match=r"group2 must be one value of .*, got \['b'\]"):
            model.differential_expression(groupby="two", group1="a", group2=["b"], silent=True)
    finally:
        del obs["missing"], obs["two"]
