import numpy as np
import pandas as pd
import pytest

import mixscvi
from mixscvi import pl
from mixscvi.model import AdaptedPosterior


@pytest.fixture
def diagnostics():
    return pd.DataFrame(
        {
            "jensen_shannon_divergence": [0.9, 0.8, 0.1, 0.2],
            "cell_type": pd.Categorical(["T", "T", "B", "B"]),
        },
        index=["w", "x", "y", "z"],
    )


@pytest.mark.parametrize("groups", ["cell_type", ["T", "T", "B", "B"]])
def test_divergence_orders_the_groups_and_marks_the_most(diagnostics, groups):
    axes = pl.divergence(diagnostics, groups, n_components=4)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["B (2)", "T (2)"]
    assert any(np.allclose(line.get_xdata(), np.log(4)) for line in axes.lines)
    assert "nats" in axes.get_xlabel()


def test_divergence_names_what_is_wrong_with_groups(diagnostics):
    with pytest.raises(KeyError, match="groups='type' is not a column"):
        pl.divergence(diagnostics, "type")
    with pytest.raises(ValueError, match="groups must name 4 cells, got 3"):
        pl.divergence(diagnostics, ["T", "T", "B"])


def test_component_means_are_one_point_a_component_and_cell():
    adata = mixscvi.datasets.pbmc68k()[:60].copy()
    mixscvi.MixSCVI.setup_anndata(adata)
    model = mixscvi.MixSCVI(adata, n_components=3, n_hidden=8)
    model.train(max_epochs=1, enable_progress_bar=False, batch_size=30)
    axes = pl.component_means(model, groups="cell_type", indices=np.arange(20))
    assert sum(len(points.get_offsets()) for points in axes.collections) == 60
    types = set(adata.obs["cell_type"][:20])
    assert {text.get_text() for text in axes.get_legend().get_texts()} == types
    with pytest.raises(ValueError, match="groups must name 60 cells, got 5"):
        pl.component_means(model, groups=["a"] * 5)
    with pytest.raises(TypeError, match="indices must be positions .*, got 'cell' first"):
        pl.component_means(model, groups="cell_type", indices=["cell"])


def test_component_weights_fill_every_cell():
    weights = np.array([[0.1, 0.9], [0.6, 0.4], [0.5, 0.5]])
    axes = pl.component_weights(AdaptedPosterior(weights, *[None] * 8))
    lower, upper = (area.get_paths()[0].vertices for area in axes.collections)
    assert lower[:, 1].max() == pytest.approx(0.9)  # components are ordered within a cell
    assert upper[:, 1].max() == pytest.approx(1)
    assert axes.get_xlim() == (0, 3)


def test_a_series_gives_each_cell_the_label_of_its_name(diagnostics):
    labels = diagnostics["cell_type"][::-1]
    axes = pl.divergence(diagnostics[:3], labels)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["B (1)", "T (2)"]
    by_place = pd.Series(["T", "B", "B"], index=[0, 1, 2])
    axes = pl.divergence(diagnostics[:3], by_place)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["B (2)", "T (1)"]
