import numpy as np
import pandas as pd
import pytest

from mixscvi import pl


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
