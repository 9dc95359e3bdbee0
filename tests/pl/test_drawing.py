import matplotlib.pyplot as plt
import pandas as pd
import pytest

from mixscvi import pl

HISTORY = {"A = 4": {"elbo_train": pd.DataFrame({"elbo_train": [3.0, 2.0]})}}


def test_figures_are_drawn_where_they_are_told():
    _, axes = plt.subplots()
    assert pl.training(HISTORY, axes=axes) is axes


def test_a_figure_is_saved_and_shown(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    assert pl.training(HISTORY, save=tmp_path / "training.png") is not None
    assert (tmp_path / "training.png").stat().st_size > 0
    assert not shown
    assert pl.training(HISTORY, show=True) is None
    assert shown == [True]


TABLE = pd.DataFrame(
    {
        "pareto_k": [0.1, 0.9],
        "effective_sample_size": [9.0, 1.0],
        "log_likelihood": [-9.0, -8.0],
        "jensen_shannon_divergence": [0.1, 0.2],
        "lfc_mean": [1.0, -1.0],
        "proba_not_de": [0.1, 0.9],
    }
)
WRONG = {
    "axes": (pl.volcano, (TABLE,), {"axes": 3}, "axes must be axes of matplotlib, got 3"),
    "two axes": (pl.adaptation, (TABLE, TABLE), {"axes": [3, 3]}, "axes must be two axes"),
    "file": (pl.volcano, (TABLE,), {"save": 3}, "save must be the path of a file, got 3"),
    "no table": (pl.volcano, (3,), {}, "table .* must be a table, got 3"),
    "no rows": (pl.volcano, (TABLE[:0],), {}, "table .* must have rows"),
    "names": (pl.volcano, (TABLE,), {"n_labels": -1}, "n_labels must be an integer of at least 0"),
    "one table": (pl.reliability, (TABLE,), {}, "diagnostics must be a dictionary by name, got a"),
    "no tables": (pl.reliability, ({},), {}, "diagnostics must name at least one"),
    "columns": (
        pl.reliability,
        ({"a": TABLE[["pareto_k"]]},),
        {},
        r"diagnostics\['a'\] must have columns \['effective_sample_size'\]",
    ),
    "before": (pl.adaptation, (3, TABLE), {}, "before must be a table"),
    "after": (pl.adaptation, (TABLE, TABLE[["pareto_k"]]), {}, "after must have columns"),
    "history": (pl.training, ({"a": 3},), {}, r"histories\['a'\] must be model.history"),
    "histories": (pl.training, (3,), {}, "histories must be a dictionary by name"),
    "outcomes": (pl.calibration, ({"a": ([0.5], [7])},), {}, "whether it came true, 0 or 1"),
    "pair": (pl.calibration, ({"a": 3},), {}, r"predictions\['a'\] must be two arrays of numbers"),
    "nothing": (pl.calibration, ({"a": ([], [])},), {}, r"predictions\['a'\] must hold at least"),
    "bins": (pl.calibration, ({"a": ([0.5], [1])},), {"n_bins": 0}, "n_bins must be an integer"),
    "weights": (pl.component_weights, (3,), {}, "posterior must be what get_adapted_posterior"),
    "posterior": (pl.posterior, (3, 3), {}, "adapted must be what get_adapted_posterior"),
    "groups": (pl.divergence, (TABLE, 3), {}, "groups must be a column, or one label"),
    "components": (
        pl.divergence,
        (TABLE, ["a", "b"]),
        {"n_components": "x"},
        "n_components must be an integer",
    ),
    "model": (pl.component_means, (3,), {}, "model must be a MixSCVI that holds data, got int"),
}


@pytest.mark.parametrize(("figure", "args", "kwargs", "expected"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(figure, args, kwargs, expected):
    with pytest.raises((TypeError, ValueError), match=expected):
        figure(*args, **kwargs)
