"""Matrix products: by the faster of two libraries, and such that skip zeros."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear", "mostly_zero", "product_by_nonzeros", "product_with_transpose"]

# About where both products take a CPU equally long: finding the non-zeros takes
# time, and adding rows waits for memory, which a dense product does not. A training step of four
# dense image encoders takes 6 % (small) to 11 % (the papers' sizes) less time than without.
_LEAST_COLUMNS = 512
_MOST_NONZERO = 0.2

# Multiplications from which a product is left to oneDNN. On AVX-512 processors its products take 7
# to 25 % less time than those of torch's BLAS; smaller ones are about equal, the smallest slower.
_LEAST_MULTIPLICATIONS = 2**26


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
        return (
            product_with_transpose(grad, y.T) if by_x else None,
            product_with_transpose(grad.T, x.T) if by_y else None,
        )

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


def _sums_of_rows(
    table: Tensor, index: Tensor, weight: Tensor, of_sum: Tensor, n_sums: int
) -> Tensor:
    """Sums of weighted rows of a table; `of_sum` says for each to which it belongs, in order."""
    n_rows = torch.bincount(of_sum, minlength=n_sums)
    start = n_rows.cumsum(0) - n_rows
    return F.embedding_bag(index, table.contiguous(), start, mode="sum", per_sample_weights=weight)


class _ProductByNonzeros(torch.autograd.Function):
    """As embedding_bag, but the gradient is such a product too: of the transpose and the gradient.

    So every derivative and every function transform goes through these three methods.
    """

    @staticmethod
    def forward(table: Tensor, row: Tensor, column: Tensor, value: Tensor, n_rows: int) -> Tensor:
        return _sums_of_rows(table, column, value, row, n_rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        table, *nonzeros, _ = inputs
        ctx.n_in = len(table)
        ctx.save_for_backward(*nonzeros)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        row, column, value = ctx.saved_tensors
        order = column.argsort(stable=True)
        by_column: Tensor = _ProductByNonzeros.apply(
            grad, column[order], row[order], value[order], ctx.n_in
        )
        return by_column, None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        table: Tensor,
        row: Tensor,
        column: Tensor,
        value: Tensor,
        n_rows: int,
    ) -> tuple[Tensor, int]:
        # Tables side by side are one of more columns; non-zeros are found where they are one's own.
        tables = table.movedim(in_dims[0] or 0, -1)
        y: Tensor = _ProductByNonzeros.apply(tables.flatten(1), row, column, value, n_rows)
        return y.unflatten(1, tables.shape[1:]), 2


def mostly_zero(x: Tensor, table: Tensor) -> bool:
    """Whether :func:`product_by_nonzeros` is the faster product.

    It is for a constant `x` on the CPU with few non-zeros, and a table of many columns. Where the
    choice cannot depend on the values, as in compiled functions, under vmap over `x` and with fake
    tensors, and where autocast would choose the type, the dense product is used.

    Examples
    --------
    >>> import torch
    >>> mostly_zero(torch.eye(10), torch.ones(10, 600)), mostly_zero(torch.eye(10), torch.eye(10))
    (True, False)
    """
    if x.requires_grad or x.device.type != "cpu" or table.shape[1] < _LEAST_COLUMNS:
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    try:
        n_nonzero = int(x.count_nonzero())
    except RuntimeError:  # raised by tensors without values (fake tensors, vmap)
        return False
    return n_nonzero <= _MOST_NONZERO * x.numel()


def product_by_nonzeros(x: Tensor, table: Tensor) -> Tensor:
    """`x @ table` as sums of the table's rows, and so its gradient with respect to the table.

    Parameters
    ----------
    x
        A matrix that needs no gradient, `(B, n_in)`.
    table
        `(n_in, n_out)`, of the same type.

    Returns
    -------
    `(B, n_out)`.

    Raises
    ------
    ValueError
        If `x` needs a gradient, which would be lost.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    >>> product_by_nonzeros(x, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    tensor([[6., 8.],
            [0., 0.]])
    """
    if x.requires_grad:
        raise ValueError("x must not need a gradient: only the table gets one")
    row, column = x.nonzero(as_tuple=True)
    value = x[row, column]
    return _ProductByNonzeros.apply(table, row, column.contiguous(), value, len(x))
