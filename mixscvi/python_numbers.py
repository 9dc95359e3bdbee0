"""Numbers of Python's for those of other packages."""

from __future__ import annotations

import numbers
from decimal import Decimal
from typing import Any

import numpy as np

__all__ = ["in_python"]


def in_python(value: Any) -> Any:
    """Numbers of Python's for those of other packages, which torch does not take everywhere.

    Files that are read without running what they hold have none of these either.

    Parameters
    ----------
    value
        A number, or anything else; lists, tuples and dictionaries are gone through.

    Returns
    -------
    The same; arrays with axes, and all that is no number, as they are.

    Examples
    --------
    >>> in_python({"lr": np.float64(0.5), "betas": (np.longdouble(0.5), 0.75), "name": "Adam"})
    {'lr': 0.5, 'betas': (0.5, 0.75), 'name': 'Adam'}
    """
    if type(value) in (list, tuple):
        return type(value)(map(in_python, value))
    if type(value) is dict:
        return {name: in_python(one) for name, one in value.items()}
    if isinstance(value, np.generic) or (type(value) is np.ndarray and value.ndim == 0):
        value = value.item()
    if isinstance(value, (bool, int, float)) or not isinstance(value, (numbers.Real, Decimal)):
        return value
    return float(value)  # of extended precision, or a fraction
