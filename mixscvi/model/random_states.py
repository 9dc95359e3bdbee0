"""States of the random number generators that a training draws from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["get_random_states", "set_random_states"]


def get_random_states(device: torch.device) -> dict[str, Any]:
    """States of Python's, numpy's and torch's own generators, and of that of a device.

    Examples
    --------
    >>> import torch
    >>> states = get_random_states(torch.device("cpu"))
    >>> drawn = torch.rand(3)
    >>> set_random_states(states, torch.device("cpu"))
    >>> bool((torch.rand(3) == drawn).all())
    True
    """
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Set the states that :func:`get_random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"])
