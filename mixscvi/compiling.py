"""How functions are compiled by numba."""

from __future__ import annotations

import numba
from numba import njit

__all__ = ["ERRORS", "cached"]

# What numba raises when it cannot compile, cache or load a function.
ERRORS = (numba.core.errors.NumbaError, NotImplementedError, OSError)


def cached(**options):
    """Compile and keep the machine code across processes, if there is a folder to keep it in."""

    def decorate(function):
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no folder can be written to
            return njit(**options)(function)

    return decorate
