"""torch's fused optimizers, for parameters of any strides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

__all__ = ["check_restored_optimizer", "fused"]

_OF_ADAM = ("step", "exp_avg", "exp_avg_sq")
# What torch's fused kernels read of a parameter's state, as large as the parameter.
_OF_KERNELS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A view of all elements of a tensor that is contiguous, if there is one."""
    if tensor.is_contiguous():
        return tensor
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    view = tensor.permute(order)
    return view if view.is_contiguous() else tensor


def _copy_lying_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor with a parameter's strides: torch's kernel pairs elements by place in memory."""
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def fused(optimizer_cls: Any) -> Callable[..., Optimizer]:
    """Have torch's fused kernel update parameters of any strides in place.

    It copies what is not contiguous, which takes longer than the update, and updates the wrong
    elements where a gradient or a moment lies in memory otherwise than its parameter. Usually all
    lie alike, such as those of layers with weights by feature
    (:class:`~mixscvi.mixture.StackedLinear`); a gradient that a hook made, or moments that were
    read from elsewhere, are copied to the parameter's strides.

    Parameters
    ----------
    optimizer_cls
        :class:`torch.optim.Adam` or :class:`torch.optim.AdamW`.

    Examples
    --------
    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(3, 2).T)
    >>> optimizer = fused(torch.optim.Adam)([weight], lr=0.1)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight.detach()
    tensor([[0.9000, 0.9000, 0.9000],
            [0.9000, 0.9000, 0.9000]])
    """
    return partial(_FUSED[optimizer_cls], fused=True)


class _InMemoryOrder(Optimizer):
    """What comes ahead of torch's class."""

    def _init_group(self, group: Any, *tensors: list[Tensor]) -> Any:
        result = super()._init_group(group, *tensors)  # type: ignore[misc]
        parameters, gradients, *moments, _steps = tensors
        for i, parameter in enumerate(parameters):
            strides = parameter.stride()
            if gradients[i].stride() != strides:
                gradients[i] = _copy_lying_as(parameter, gradients[i])
            for listed in filter(None, moments):  # one list is of "amsgrad" alone
                if listed[i].stride() != strides:
                    listed[i].data = _copy_lying_as(parameter, listed[i])  # the optimizer's own
                listed[i] = _in_memory_order(listed[i])
            gradients[i] = _in_memory_order(gradients[i])
            parameters[i] = _in_memory_order(parameter)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        # torch's own is a tenth of the update, for what it could do besides.
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class _FusedAdam(_InMemoryOrder, Adam):
    """As :class:`torch.optim.Adam`."""


class _FusedAdamW(_InMemoryOrder, AdamW):
    """As :class:`torch.optim.AdamW`."""


_FUSED: dict[Any, Any] = {Adam: _FusedAdam, AdamW: _FusedAdamW}
for _base, _class in _FUSED.items():
    _class.__name__ = _base.__name__  # by which learning rates are recorded


def check_restored_optimizer(optimizer: Optimizer) -> None:
    """Raise if what a file gave back to an optimizer is not of its parameters.

    torch looks at none of it, and its fused kernels read and write beyond the end of moments that
    are smaller than their parameters. Of classes made from the four that have such kernels,
    these moments alone are looked at, where the kernels are asked for; of others, nothing.

    Parameters
    ----------
    optimizer
        With the state that was read.

    Raises
    ------
    TypeError, ValueError
        Naming what is wrong.

    Examples
    --------
    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(3, 2))
    >>> optimizer = torch.optim.Adam([weight])
    >>> check_restored_optimizer(optimizer)
    >>> optimizer.state[weight] = {
    ...     "step": torch.tensor(1.0),
    ...     "exp_avg": torch.zeros(1, 2),
    ...     "exp_avg_sq": torch.zeros(3, 2),
    ... }
    >>> check_restored_optimizer(optimizer)
    Traceback (most recent call last):
    ...
    ValueError: exp_avg of an optimizer must be dense, real and of shape (3, 2), got (1, 2)
    """
    if not isinstance(optimizer, (Adam, AdamW, SGD, Adagrad)):
        return
    of_torch = type(optimizer) in (Adam, AdamW, SGD, Adagrad)
    if not of_torch and type(optimizer).__module__ != __name__:
        by_kernels = [group["params"] for group in optimizer.param_groups if group.get("fused")]
        for parameter in chain.from_iterable(by_kernels):
            state = optimizer.state.get(parameter, {})
            kept = {name: state[name] for name in _OF_KERNELS if name in state}
            _check_state(kept, parameter, ())
        return
    for group in optimizer.param_groups:
        for name, usual in optimizer.defaults.items():
            _check_option(name, group.get(name), usual)
        needed: tuple[str, ...] = _OF_ADAM if isinstance(optimizer, (Adam, AdamW)) else ()
        if needed and group["amsgrad"]:
            needed = (*needed, "max_exp_avg_sq")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state:
                _check_state(state, parameter, needed)


def _check_option(name: str, value: Any, usual: Any) -> None:
    """Raise unless an option is like the usual one: a number where that is one, for instance."""
    if usual is None or isinstance(usual, (bool, np.bool_)):
        good = value is None or isinstance(value, bool)
    elif isinstance(usual, (list, tuple)):
        good = isinstance(value, (list, tuple)) and len(value) == len(usual)
        good = good and all(map(_is_one_number, value))
    elif isinstance(usual, Tensor):
        good = isinstance(value, Tensor) and value.shape == usual.shape
    else:
        good = _is_one_number(value)
    if not good:
        raise ValueError(f"{name} of an optimizer must be like {usual!r}, got {value!r:.60}")


def _is_one_number(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, Tensor) and value.numel() == 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _check_state(state: Any, parameter: Tensor, needed: tuple[str, ...]) -> None:
    """Raise unless what is remembered of a parameter can be."""
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"the state of an optimizer lacks {', '.join(missing)}")
    for name, value in state.items():
        if isinstance(value, Tensor):
            shape = () if name == "step" else tuple(parameter.shape)
            if (
                tuple(value.shape) != shape
                or value.layout is not torch.strided
                or not value.is_floating_point()
            ):
                raise ValueError(
                    f"{name} of an optimizer must be dense, real and of shape {shape}, got "
                    f"{tuple(value.shape)}"
                )
        elif value is not None or name in needed:  # SGD's momentum may be none
            if not _is_number(value) or name != "step":
                raise TypeError(f"{name} of an optimizer must be a tensor, got {value!r:.60}")
