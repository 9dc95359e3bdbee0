"""Signatures that scvi-tools reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["signed_as"]

T = TypeVar("T")


def signed_as(original: Callable[..., Any], **keywords: Any) -> Callable[[T], T]:
    """Show the signature of a function or class, with further keywords and their defaults.

    scvi-tools reads signatures: that of ``generative`` for ``transform_batch``, and that of the
    module to rebuild one that was trained on a data module.

    Examples
    --------
    >>> import inspect
    >>> @signed_as(lambda z, library=None: None, mixture=4)
    ... def decode(*args, **kwargs): ...
    >>> print(inspect.signature(decode))
    (z, library=None, *, mixture=4)
    """
    signature = inspect.signature(original)
    further = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in keywords.items()
    ]

    given = list(signature.parameters.values())
    # What takes all other keywords comes last.
    others = [p for p in given if p.kind is inspect.Parameter.VAR_KEYWORD]
    named = [p for p in given if p.kind is not inspect.Parameter.VAR_KEYWORD]

    def decorate(own: T) -> T:
        own.__signature__ = signature.replace(parameters=[*named, *further, *others])
        return own

    return decorate
