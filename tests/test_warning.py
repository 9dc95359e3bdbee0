"""Warnings point to the user's line, through whatever frames there are in between."""

import warnings

import pytest
import torch

from mixscvi.warning import warn_user


def called_from(module, function):
    """A function of a module of this name that calls another."""
    names = {"__name__": module, "function": function}
    exec(compile("def call():\n    function()\n", f"{module}.py", "exec"), names)
    return names["call"]


@pytest.mark.parametrize(
    "modules",
    [
        ["mixscvi.model"],
        ["mixscvi.checks", "scvi.model.base", "torch.utils", "lightning.pytorch", "mixscvi"],
    ],
    ids=["one", "several"],
)
def test_packages_in_between_are_passed_over(modules):
    call = called_from(modules[0], warning_itself())
    for module in modules[1:]:
        call = called_from(module, call)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.inference_mode()(call)()
    assert [(w.filename, w.category) for w in caught] == [(__file__, RuntimeWarning)]


def warning_itself():
    names = {"__name__": "mixscvi.innermost", "warn_user": warn_user}
    exec(compile("def call():\n    warn_user('so', RuntimeWarning)", "inner.py", "exec"), names)
    return names["call"]


def test_users_code_that_the_package_calls_is_named():
    """A callback of the user's, say: the line in it, not the one that started the training."""
    of_the_user = called_from("users_callback", warning_itself())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        called_from("lightning.pytorch", of_the_user)()
    assert [w.filename for w in caught] == ["users_callback.py"]
