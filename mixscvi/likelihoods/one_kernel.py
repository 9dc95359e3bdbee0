"""Tensor operations compiled to one kernel of an accelerator, where that pays."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from mixscvi import compiled
from mixscvi.warning import warn_user

__all__ = ["in_one_kernel"]

Terms = Callable[..., tuple[Tensor, ...]]

# An accelerator is done with fewer sooner than each of some dozens of operations is launched, and
# compiling takes some ten seconds once (torch keeps the kernel on disk).
_LEAST_ELEMENTS = 4_000_000
_DEVICES = ("cuda",)
_BACKEND = "inductor"
_failed = False


def in_one_kernel(function: Terms, *args: Tensor | bool | None, size: Tensor) -> tuple[Tensor, ...]:
    """What a function of tensors returns, computed by one kernel where that pays.

    Operations one by one write a tensor of the full size each; one kernel writes its results alone.
    It is made by the first call, for nearly all sizes: axes of length one, and of equal length,
    are cases of their own. ``torch.compiler.set_stance("force_eager")`` turns it off.

    Parameters
    ----------
    function
        Pure, elementwise but for sums.
    *args
        Its arguments.
    size
        The largest of them. It pays for 4 million elements on a GPU of CUDA.

    Warns
    -----
    RuntimeWarning
        Once, with the cause, if the function cannot be compiled. From then on nothing is.

    Examples
    --------
    >>> import torch
    >>> x = torch.zeros(3)
    >>> in_one_kernel(lambda x: (x + 1, x - 1), x, size=x)
    (tensor([1., 1., 1.]), tensor([-1., -1., -1.]))
    """
    global _failed
    pays = (
        type(size) is Tensor
        and size.device.type in _DEVICES
        and size.numel() >= _LEAST_ELEMENTS
        and not compiled.traced()
    )
    if not pays or _failed:
        return function(*args)
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    try:
        return _compile(function)(*args)
    except TorchDynamoException as error:
        terms = function(*args)  # raises what is the arguments' fault
        _failed = True
        cause = getattr(error, "inner_exception", error)
        first_line = str(cause).strip().partition("\n")[0]
        warn_user(
            "torch cannot compile the likelihoods for this accelerator, so their operations run "
            f"one by one ({type(cause).__name__}: {first_line})",
            RuntimeWarning,
        )
        return terms


@lru_cache
def _compile(function: Terms) -> Terms:
    fused: Terms = torch.compile(function, dynamic=True, backend=_BACKEND)
    return fused
