"""torch's fused optimizers, for parameters of any strides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["fused"]


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

    class InMemoryOrder(optimizer_cls):
        def _init_group(self, group: Any, *tensors: list[Tensor]) -> Any:
            result = super()._init_group(group, *tensors)
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

    InMemoryOrder.__name__ = optimizer_cls.__name__  # by which learning rates are recorded
    return partial(InMemoryOrder, fused=True)
