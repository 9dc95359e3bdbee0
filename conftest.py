"""What the tests and the examples in docstrings share."""

import sys

import pytest
import torch

_N_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def closed_figures():
    """Close the figures that pyplot keeps open: more than twenty are a warning."""
    yield
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close("all")


@pytest.fixture(autouse=True)
def threads_as_at_the_start():
    """Set torch's threads back: scanpy's compiled functions leave them at all cores.

    Sums round by their number, and some tests compare with processes of their own, to the bit.
    """
    yield
    if torch.get_num_threads() != _N_THREADS:
        torch.set_num_threads(_N_THREADS)


@pytest.fixture(autouse=True)
def verbosity_as_before():
    """Set scvi-tools' verbosity back, on which progress bars depend."""
    scvi = sys.modules.get("scvi")
    before = None if scvi is None else scvi.settings.verbosity
    yield
    if before is not None and scvi.settings.verbosity != before:
        scvi.settings.verbosity = before
