import numpy as np
import pandas as pd
import pytest

import mixscvi
from mixscvi import pl


@pytest.fixture
def diagnostics():
    return pd.DataFrame(
        {
            "jensen_shannon_divergence": [0.9, 0.8, 0.1, 0.2],
            "pareto_k": [0.5, 0.6, 0.65, 1.2],
            "effective_sample_size": [300.0, 200.0, 100.0, 2.0],
        }
    )


def test_divergence_orders_the_groups_and_marks_the_most(diagnostics):
    axes = pl.divergence(diagnostics, ["T", "T", "B", "B"], n_components=4)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["B", "T"]
    assert any(np.allclose(line.get_xdata(), np.log(4)) for line in axes.lines)


def test_reliability_counts_the_good_cells(diagnostics):
    k_axes, size_axes = pl.reliability({"A = 1": diagnostics.iloc[2:], "A = 4": diagnostics})
    labels = [text.get_text() for text in k_axes.get_legend().get_texts()]
    assert labels == ["A = 1: 50% under 0.7", "A = 4: 75% under 0.7"]
    assert size_axes.get_xscale() == "log"


def test_training_draws_both_curves():
    history = {
        key: pd.DataFrame({key: [3.0, 2.0]}, index=[0, 1])
        for key in ("elbo_train", "elbo_validation")
    }
    axes = pl.training({"A = 4": history})
    assert [line.get_linestyle() for line in axes.lines] == ["--", "-"]
    assert np.allclose(axes.lines[1].get_ydata(), [3, 2])


def test_training_names_an_unknown_metric():
    with pytest.raises(ValueError, match="metric='loss' is not in the history of 'A = 4'"):
        pl.training({"A = 4": {}}, metric="loss")


def test_component_means_are_one_point_a_component_and_cell():
    adata = mixscvi.datasets.pbmc68k()[:60].copy()
    mixscvi.MixSCVI.setup_anndata(adata)
    model = mixscvi.MixSCVI(adata, n_components=3, n_hidden=8)
    model.train(max_epochs=1, enable_progress_bar=False, batch_size=30)
    axes = pl.component_means(model, groups=adata.obs["cell_type"], indices=np.arange(20))
    assert sum(len(points.get_offsets()) for points in axes.collections) == 60
    with pytest.raises(ValueError, match="groups must name 60 cells, got 5"):
        pl.component_means(model, groups=["a"] * 5)
