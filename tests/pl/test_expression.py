import pandas as pd
import pytest

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
    assert [text.get_text() for text in axes.texts] == ["down", "up"]


def test_volcano_names_what_is_wrong(table):
    with pytest.raises(ValueError, match="table must have a column 'proba_not_de'"):
        pl.volcano(table[["lfc_mean"]])
    with pytest.raises(ValueError, match="fdr must be between 0 and 1, got 5"):
        pl.volcano(table, fdr=5)
