import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from mixscvi import pl


@pytest.fixture
def table():
    return pd.DataFrame(
        {"lfc_mean": [2.0, -3.0, 1.0, 0.0], "proba_not_de": [0.02, 0.0, 0.12, 0.9]},
        index=["up", "down", "unsure", "same"],
    )


def test_volcano_calls_as_many_genes_as_the_rate_allows(table):
    # Mean probabilities of no change: 0, 0.01, 0.047, 0.26.
    for fdr, n_called in ((0.005, 1), (0.02, 2), (0.05, 3), (0.5, 4)):
        assert pl.volcano(table, fdr=fdr).get_title().startswith(f"{n_called} of 4 genes")


def test_volcano_agrees_with_scvi_tools(table):
    from scvi.model.base._de_core import _fdr_de_prediction

    called = _fdr_de_prediction(1 - table["proba_not_de"], fdr=0.05)
    assert pl.volcano(table, fdr=0.05).get_title().startswith(f"{called.sum()} of")


def test_volcano_names_the_largest_changes(table):
    axes = pl.volcano(table, n_labels=2)
    assert {text.get_text() for text in axes.texts} == {"down", "up"}


@pytest.mark.parametrize("height", [1e-9, 0.01, 0.04])
def test_volcano_writes_names_inside_the_frame_and_not_over_each_other(height):
    # All genes in one point of each side, at the top or at the bottom among higher ones.
    changes = [5.0] * 8 + [-5.0] * 8 + [0.0, 1.0, -1.0]
    names = [f"TMEM{place:03d}A" for place in range(16)] + ["same", "top", "low"]
    table = pd.DataFrame(
        {"lfc_mean": changes, "proba_not_de": [height] * 16 + [0.9, 1e-9, 1e-9]}, index=names
    )
    axes = pl.volcano(table, n_labels=16)
    axes.figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without their lines
    assert len(boxes) == 16
    for place, box in enumerate(boxes):
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
        assert axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:place])


@pytest.mark.parametrize("font", [8, 10, 14])
@pytest.mark.parametrize("name", ["GNLY", "ENSG00000115523"])
def test_volcano_writes_names_beside_the_points(name, font):
    rng = np.random.default_rng(0)
    change = 2 * rng.normal(size=300)
    table = pd.DataFrame(
        {"lfc_mean": change, "proba_not_de": np.exp(-np.abs(change) * rng.gamma(2, size=300))},
        index=[f"{name}{place}" for place in range(300)],
    )
    with matplotlib.rc_context({"font.size": font}):
        axes = pl.volcano(table, n_labels=12)
        axes.figure.canvas.draw()
    points = np.vstack([dots.get_offsets() for dots in axes.collections])
    shown = axes.transData.transform(points)
    assert axes.bbox.contains(*shown.min(0)) and axes.bbox.contains(*shown.max(0))
    for text in axes.texts:
        box = Text.get_window_extent(text)
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
        assert not box.count_contains(shown)


def test_volcano_names_what_is_wrong(table):
    with pytest.raises(ValueError, match="must have columns .'proba_not_de'."):
        pl.volcano(table[["lfc_mean"]])
    with pytest.raises(ValueError, match="fdr must be a finite number from 0 to 1, got 5"):
        pl.volcano(table, fdr=5)
