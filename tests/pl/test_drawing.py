import matplotlib.pyplot as plt
import pandas as pd

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
