import pytest

from mixscvi.mixture import nonzeros


@pytest.fixture(params=["product", "sums of rows"])
def first_layer(request, monkeypatch):
    """Both ways in which a dense encoder multiplies images; small ones do not reach the second."""
    if request.param == "sums of rows":
        monkeypatch.setattr(nonzeros, "_LEAST_WORK", 0)
        monkeypatch.setattr(nonzeros, "MOST_NONZERO", 1.0)
