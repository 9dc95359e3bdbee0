"""Checks of single arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["check_choice", "check_indices", "check_positive_int"]


def check_positive_int(name: str, value: Any, *, least: int = 1) -> int:
    """Return `value` as an int.

    Raises
    ------
    TypeError
        If it is not an integer.
    ValueError
        If it is less than `least`.

    Examples
    --------
    >>> check_positive_int("n_components", 4)
    4
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return `value`, which must be one of `choices`.

    Raises
    ------
    ValueError
        If it is not.

    Examples
    --------
    >>> check_choice("prior", "mog", ("normal", "mog"))
    'mog'
    """
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {expected}, got {value!r}")
    return value


def check_indices(indices: Any, n_obs: int) -> None:
    """Raise if `indices` do not choose cells by position, or by a mask.

    Raises
    ------
    TypeError
        If they are names or other values than integers and booleans.
    ValueError
        If there are none.
    IndexError
        If one is out of range, or a mask is of another length.

    Examples
    --------
    >>> check_indices([0, 5], n_obs=6)
    >>> check_indices(["AAC"], n_obs=6)
    Traceback (most recent call last):
    ...
    TypeError: indices must be positions of cells or a mask, got 'AAC' first: take
    adata.obs_names.get_indexer(names)
    """
    given = np.asarray(indices)
    if given.size == 0 or (given.dtype.kind == "b" and not given.any()):
        raise ValueError("indices must choose at least one cell, got none")
    if given.dtype.kind not in "biu":
        raise TypeError(
            f"indices must be positions of cells or a mask, got {given.ravel().tolist()[0]!r} "
            "first: take adata.obs_names.get_indexer(names)"
        )
    if given.dtype.kind == "b":
        if given.shape != (n_obs,):
            raise IndexError(f"indices as a mask must be of the {n_obs} cells, got {given.shape}")
        return
    outside = given[(given < -n_obs) | (given >= n_obs)]
    if outside.size:
        raise IndexError(f"indices must be below the {n_obs} cells, got {outside.ravel()[0]}")
