"""Single-cell variational inference with mixture posteriors."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixscvi import datasets, images, pl
    from mixscvi.model import MixSCANVI, MixSCVI

__all__ = ["MixSCANVI", "MixSCVI", "__version__", "datasets", "images", "pl"]

__version__ = version("mixscvi")


def __getattr__(name: str) -> Any:
    """Import each side of the package when it is first used: neither needs the other's."""
    if name in ("MixSCANVI", "MixSCVI"):
        return getattr(importlib.import_module("mixscvi.model"), name)
    if name in ("datasets", "images", "pl"):
        return importlib.import_module(f"mixscvi.{name}")
    raise AttributeError(f"module 'mixscvi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
