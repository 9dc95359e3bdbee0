import pytest

from mixscvi.mixture import products


@pytest.fixture(params=["product", "sums of rows"])
def first_layer(request, monkeypatch):
    """Both ways in which a dense encoder multiplies images; small ones do not reach the second."""
    if request.param == "sums of rows":
        monkeypatch.setattr(products, "_LEAST_WORK", 0)
        monkeypatch.setattr(products, "_MOST_NONZERO", 1.0)
