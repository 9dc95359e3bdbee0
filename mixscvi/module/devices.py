"""Minibatches where the module is, and no waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.distributions import Distribution

__all__ = ["auto_move_data", "moved_ahead", "without_waiting"]

T = TypeVar("T")


def auto_move_data(method: Callable[..., T]) -> Callable[..., T]:
    """Have a module's method take its arguments to the device of the module, outside training.

    It is scvi-tools' decorator of this name for modules on one device, where that looks at every
    parameter in every call, which took a tenth of the time to encode a minibatch.

    Parameters
    ----------
    method
        Of a :class:`torch.nn.Module` with parameters.

    Examples
    --------
    >>> import torch
    >>> class Shift(nn.Linear):
    ...     @auto_move_data
    ...     def device_of(self, x):
    ...         return x.device
    >>> Shift(2, 2, device="meta").eval().device_of(torch.zeros(1))
    device(type='meta')
    """

    @wraps(method)
    def moved(self: nn.Module, *args: Any, **kwargs: Any) -> T:
        if not self.training:
            device = next(self.parameters()).device
            args, kwargs = move_data_to_device((args, kwargs), device)
        return method(self, *args, **kwargs)

    return moved


def moved_ahead(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, while the host goes on.

    Parameters
    ----------
    values
        On the CPU.
    device
        The device.

    Examples
    --------
    >>> import torch
    >>> moved_ahead(torch.tensor([1, 2]), torch.device("cpu"))
    tensor([1, 2])
    """
    if device.type == "cuda" and torch.cuda.is_available():
        values = values.pin_memory()  # from other memory the driver may wait
    return values.to(device, non_blocking=True)


@contextmanager
def without_waiting(module: nn.Module) -> Iterator[None]:
    """Have torch's distributions not check their arguments, if a module is on an accelerator.

    scvi-tools' encoders make distributions in every step, and the host would wait for the checks.

    Parameters
    ----------
    module
        Has parameters.

    Examples
    --------
    >>> import torch
    >>> with without_waiting(torch.nn.Linear(2, 2, device="meta")):
    ...     torch.distributions.Normal(0.0, torch.tensor(-1.0)).scale
    tensor(-1.)
    """
    checks = Distribution._validate_args
    if not checks or next(module.parameters()).device.type == "cpu":
        yield
        return
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(True)
