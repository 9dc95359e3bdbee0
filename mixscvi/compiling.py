"""How functions are compiled by numba."""

from __future__ import annotations

import importlib.util
import zlib

import numba
from numba import njit

__all__ = ["ERRORS", "cached", "checksum"]

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


def checksum(*modules):
    """A number that changes with the source of the modules.

    numba finds what it cached by the time of the file of a function alone. As the default of an
    argument that is left out, the number is part of the function's signature, and another version
    of what it inlines from these modules compiles anew.
    """
    total = 0
    for module in modules:
        loader = importlib.util.find_spec(module).loader
        total = zlib.crc32(loader.get_data(loader.path), total)
    return total
