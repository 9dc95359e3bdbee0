"""Where a model is trained, or put: named, where Lightning knows of no such place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from scvi.model._utils import parse_device_args

__all__ = ["check_device", "naming_trainer_settings"]

# What Lightning has lists of, which others may add to: it is left to say what it knows.
_SETTINGS = (
    "accelerator", "devices", "max_time", "num_nodes", "plugins", "precision", "profiler",
    "strategy", "val_check_interval",
)  # fmt: skip
_REFUSALS = (AttributeError, MisconfigurationException, TypeError, ValueError)


@contextmanager
def naming_trainer_settings(settings: Mapping[str, Any]) -> Iterator[None]:
    """Name the settings that Lightning has lists of, where it makes no trainer of them.

    Parameters
    ----------
    settings
        Of the trainer.

    Raises
    ------
    ValueError
        Naming those that were given, with what Lightning says of them.

    Examples
    --------
    >>> with naming_trainer_settings({"precision": "33-bit", "devices": "auto"}):
    ...     raise TypeError("Precision is invalid.")
    Traceback (most recent call last):
    ...
    ValueError: precision='33-bit' is no setting to train with here: Precision is invalid.
    """
    try:
        yield
    except _REFUSALS as error:
        named = [
            f"{name}={settings[name]!r:.60}"
            for name in _SETTINGS
            if name in settings and not _is_auto(settings[name])
        ]
        if not named:
            raise
        what = "is no setting" if len(named) == 1 else "are no settings"
        raise ValueError(f"{', '.join(named)} {what} to train with here: {error}") from error


def check_device(accelerator: Any, device: Any) -> None:
    """Raise if a model cannot be put onto a device.

    Parameters
    ----------
    accelerator, device
        As in :meth:`mixscvi.MixSCVI.load`.

    Raises
    ------
    ValueError
        Naming both, with what Lightning says of them.

    Examples
    --------
    >>> check_device("cpu", "auto")
    """
    if _is_auto(accelerator) and _is_auto(device):
        return
    try:
        parse_device_args(accelerator, device, return_device="torch", validate_single_device=True)
    except _REFUSALS as error:
        raise ValueError(
            f"accelerator={accelerator!r}, device={device!r}: there is no such device here: {error}"
        ) from error


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"
