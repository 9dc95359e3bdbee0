"""Where the models of runs are."""

from __future__ import annotations

import torch

__all__ = ["resolve_device"]


def resolve_device(device: torch.device | str | None = None) -> torch.device:
    """The given device; by default an accelerator if there is one.

    Raises
    ------
    ValueError
        If it is none that models are trained on, or this machine has none of its kind.

    Examples
    --------
    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if device is not None:
        return _checked_device(device)
    from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

    if MPSAccelerator.is_available():
        return torch.device("mps")
    return torch.device("cuda" if CUDAAccelerator.is_available() else "cpu")


def _checked_device(device: torch.device | str) -> torch.device:
    given = device
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {given!r}") from error
    kinds = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if device.type not in kinds:
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {str(given)!r}")
    here = kinds[device.type]
    if (device.index or 0) >= here:
        number = f"has {here} of them" if here else "has none, or torch's build cannot use it"
        raise ValueError(f"device={str(given)!r}, but this machine {number}: give device='cpu'")
    return device
