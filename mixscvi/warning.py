"""Warnings that name the line of the user's own code."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_user"]

# What may stand between the user's call and a warning.
_PACKAGES = {"contextlib", "lightning", "mixscvi", "scvi", "torch"}


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn as if the innermost line did that is of no package in between.

    Parameters
    ----------
    message
        What there is to say.
    category
        Kind of the warning.

    Examples
    --------
    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn_user("half of the cells have no counts")
    >>> str(caught[0].message)
    'half of the cells have no counts'
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame.f_globals) in _PACKAGES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _package(names: dict[str, object]) -> str:
    """Package of the module that these are the global names of."""
    return str(names.get("__name__", "")).partition(".")[0]
