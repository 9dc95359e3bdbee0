"""How functions are compiled by numba."""

from __future__ import annotations

import importlib.util
import zlib

from numba import njit

__all__ = ["cached"]


def cached(*sources, **options):
    """Compile and keep the machine code across processes, if there is a folder to keep it in.

    Parameters
    ----------
    *sources
        Modules of which the function inlines something. numba finds what it kept by the time of
        the function's own file alone. So that another version of these modules compiles anew, the
        function's qualified name, by which it is kept too, ends in a checksum of their sources.
    **options
        Of :func:`numba.njit`.
    """

    def decorate(function):
        if sources:
            function.__qualname__ += f"_{_checksum(sources):08x}"
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no folder can be written to
            return njit(**options)(function)

    return decorate


def _checksum(modules):
    """A number that changes with the source of the modules."""
    total = 0
    for module in modules:
        loader = importlib.util.find_spec(module).loader
        total = zlib.crc32(loader.get_data(loader.path), total)
    return total
