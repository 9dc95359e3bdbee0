import numpy as np
import pandas as pd
import pytest

from mixscvi import pl


@pytest.fixture
def diagnostics():
    return pd.DataFrame(
        {
            "pareto_k": [0.5, 0.6, 0.65, 1.2],
            "effective_sample_size": [300.0, 200.0, 100.0, 2.0],
            "log_likelihood": [-10.0, -20.0, -30.0, -40.0],
        }
    )


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_reliability_counts_the_good_cells(diagnostics):
    k_axes, size_axes = pl.reliability({"A = 1": diagnostics.iloc[2:], "A = 4": diagnostics})
    assert legend(k_axes) == ["A = 1: 50% under 0.7", "A = 4: 75% under 0.7"]
    assert size_axes.get_xscale() == "log"


def test_adaptation_shows_the_gain_of_every_cell(diagnostics):
    after = diagnostics.assign(pareto_k=0.2, log_likelihood=diagnostics["log_likelihood"] + 2)
    gain_axes, k_axes = pl.adaptation(diagnostics, after)
    assert np.allclose(gain_axes.collections[0].get_offsets()[:, 1], 2)
    assert gain_axes.get_title() == "log p(x), adapted: +2.00 nats per cell"
    assert legend(k_axes) == ["encoder: 75% under 0.7", "adapted: 100% under 0.7"]


def test_adaptation_draws_infinite_k(diagnostics):
    before = diagnostics.assign(pareto_k=[np.inf, 0.6, 0.65, 1.2])
    gain_axes, k_axes = pl.adaptation(before, diagnostics)
    assert len(gain_axes.collections[0].get_offsets()) == 3
    assert legend(k_axes)[0] == "encoder: 50% under 0.7"


def test_adaptation_needs_the_same_cells(diagnostics):
    with pytest.raises(ValueError, match="tables of the same cells"):
        pl.adaptation(diagnostics, diagnostics.iloc[::-1])


def test_calibration_of_a_predictor_that_knows():
    probability = np.repeat([0.0, 1.0], 50)
    axes = pl.calibration({"knows": (probability, probability == 1)}, n_bins=2)
    assert legend(axes) == ["knows (error 0.000)"]
    axes = pl.calibration({"errs": (probability, probability == 0)}, n_bins=2)
    assert legend(axes) == ["errs (error 1.000)"]


def test_calibration_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"predictions\['a'\] must hold one outcome"):
        pl.calibration({"a": ([0.5], [True, False])})
    with pytest.raises(ValueError, match=r"predictions\['a'\] must hold probabilities"):
        pl.calibration({"a": ([1.5], [True])})
