"""Matrix products by the faster of two libraries."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear", "product_with_transpose"]

# Multiplications from which a product is left to oneDNN. On AMD's AVX-512 processors its products
# take 7 to 25 % less time than those of torch's BLAS, which is Intel's; smaller ones are about
# equal, the smallest slower.
_LEAST_MULTIPLICATIONS = 2**26
_CPUINFO = Path("/proc/cpuinfo")  # on Linux


@lru_cache
def _is_intel() -> bool:
    """Whether the processor is Intel's, whose own BLAS is the faster one there."""
    if not torch.backends.mkl.is_available():
        return False
    return "GenuineIntel" in (_CPUINFO.read_text() if _CPUINFO.exists() else platform.processor())


def _for_onednn(x: Tensor, y: Tensor) -> bool:
    """Whether the product is large, and of a kind that nothing but its value depends on."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == y.dtype == torch.float32
        and x.dim() == y.dim() == 2
        and len(x) * y.numel() >= _LEAST_MULTIPLICATIONS
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not _is_intel()
    )


class _ProductWithTranspose(torch.autograd.Function):
    """`x @ y.T`, whose derivatives are such products too."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        # oneDNN reads `y` along rows or columns, but would copy `x` itself.
        if not (y.is_contiguous() or y.T.is_contiguous()):
            y = y.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), y, None, "none", [], "")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        by_x, by_y = ctx.needs_input_grad
        d_y = None
        if by_y and y.is_contiguous():
            d_y = product_with_transpose(grad.T, x.T)
        elif by_y:  # in the layout of y, which an optimizer would have it copied to
            d_y = (x.T @ grad).T
        return product_with_transpose(grad, y.T) if by_x else None, d_y

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, y_tangent: Tensor | None) -> Tensor:
        x, y = ctx.saved_tensors
        tangent = x.new_zeros(len(x), len(y))
        if x_tangent is not None:
            tangent = tangent + x_tangent @ y.T
        if y_tangent is not None:
            tangent = tangent + x @ y_tangent.T
        return tangent

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, y: Tensor
    ) -> tuple[Tensor, int]:
        x, y = (
            t if at is None else t.movedim(at, 0) for t, at in zip((x, y), in_dims, strict=True)
        )
        return x @ y.mT, 0


def product_with_transpose(x: Tensor, y: Tensor) -> Tensor:
    """`x @ y.T`, by oneDNN where that is faster.

    Values and derivatives of every order are those of :func:`torch.matmul` to rounding. Nothing
    changes on other devices, in other types, under autocast and in compiled functions, or with
    ``torch.backends.mkldnn.enabled = False``.

    Parameters
    ----------
    x, y
        Matrices, `(n, k)` and `(m, k)`, of any strides.

    Returns
    -------
    `(n, m)`.

    Examples
    --------
    >>> import torch
    >>> product_with_transpose(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([[11.]])
    """
    if not _for_onednn(x, y):
        return x @ y.T
    if not x.is_contiguous() and x.numel() > y.numel():
        return _ProductWithTranspose.apply(y, x).T  # the smaller one is copied
    return _ProductWithTranspose.apply(x, y)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As :func:`torch.nn.functional.linear`, by :func:`product_with_transpose` where it is faster.

    Parameters
    ----------
    x
        Inputs, `(B, n_in)`.
    weight, bias
        `(n_out, n_in)` and `(n_out,)`.

    Returns
    -------
    `(B, n_out)`.

    Examples
    --------
    >>> import torch
    >>> linear(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0.0, 1.0, 2.0]))
    tensor([[2., 3., 4.]])
    """
    if not _for_onednn(x, weight):
        return F.linear(x, weight, bias)
    y = product_with_transpose(x, weight)
    return y if bias is None else y + bias
