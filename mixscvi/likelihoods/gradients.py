"""Gradients that were computed along with a value, handed to autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixscvi.likelihoods.eager import sum_to_dispersion
from mixscvi.likelihoods.native import Gradients

__all__ = ["attach", "gradient_buffers", "needs_grad"]


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient by one of these tensors."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def gradient_buffers(
    mean: Tensor,
    theta: Tensor | None,
    zi: Tensor | None,
    log_library: Tensor | None = None,
    *,
    overwrite: bool = False,
) -> Gradients | None:
    """Room for the gradients of each row, or ``None`` if autograd will ask for none.

    With `overwrite`, gradients by `mean` and `zi` take the place of these.
    """
    if not needs_grad(mean, theta, zi, log_library):
        return None

    def room(like: Tensor | None) -> Tensor | None:
        return None if like is None else torch.empty(like.shape, dtype=like.dtype)

    if overwrite and mean.is_contiguous() and (zi is None or zi.is_contiguous()):
        d_mean, d_zi = mean.detach(), None if zi is None else zi.detach()
    else:
        d_mean, d_zi = torch.empty(mean.shape, dtype=mean.dtype), room(zi)
    return Gradients(d_mean, None if theta is None else room(mean), d_zi, room(log_library))


def attach(
    value: Tensor,
    gradients: Gradients | None,
    mean: Tensor,
    theta: Tensor | None = None,
    zi: Tensor | None = None,
    log_library: Tensor | None = None,
) -> Tensor:
    """Give a value of rows, `(L, B, S)`, the gradients that were computed with it."""
    if gradients is None:
        return value
    return _Attached.apply((value, gradients), mean, theta, zi, log_library)


class _Attached(torch.autograd.Function):
    """A value whose gradients are known; tensors inside a tuple are not tracked."""

    @staticmethod
    def forward(
        ctx: Any,
        computed: tuple[Tensor, Gradients],
        mean: Tensor,
        theta: Tensor | None,
        zi: Tensor | None,
        log_library: Tensor | None,
    ) -> Tensor:
        value, gradients = computed
        ctx.save_for_backward(theta, *gradients[:4])
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        theta, d_mean, d_theta, d_zi, d_log_library = ctx.saved_tensors
        _, by_mean, by_theta, by_zi, by_library = ctx.needs_input_grad
        return (
            None,
            grad.unsqueeze(-1) * d_mean if by_mean else None,
            sum_to_dispersion(grad, d_theta, theta) if by_theta else None,
            grad.unsqueeze(-1) * d_zi if by_zi else None,
            grad * d_log_library if by_library else None,
        )
