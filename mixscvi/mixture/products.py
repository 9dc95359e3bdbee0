"""Products with what is mostly zero, at the cost of what is not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["mostly_zero", "product_by_nonzeros"]

# About where a CPU takes as long for the one product as for the other: finding the non-zeros has
# its price, and adding rows waits for memory, which a dense product does not.
_LEAST_COLUMNS = 512
_MOST_NONZERO = 0.2


def _sum_of_rows(x: Tensor, table: Tensor) -> Tensor:
    """`x @ table` as sums of the table's rows, weighted by the non-zeros of x."""
    row, column = x.nonzero(as_tuple=True)
    n_nonzero = x.count_nonzero(1)
    return F.embedding_bag(
        column.contiguous(),
        table.contiguous(),
        n_nonzero.cumsum(0) - n_nonzero,
        mode="sum",
        per_sample_weights=x[row, column],
    )


class _ProductByNonzeros(torch.autograd.Function):
    # As embedding_bag, but its gradient is made of sums of rows as well.

    @staticmethod
    def forward(x: Tensor, table: Tensor) -> Tensor:
        return _sum_of_rows(x, table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        return None, _sum_of_rows(x.T.contiguous(), grad)


def mostly_zero(x: Tensor, table: Tensor) -> bool:
    """Whether :func:`product_by_nonzeros` of them is possible, and the faster product.

    It is for a constant `x` on a CPU, a table of many columns, and few non-zeros.

    Examples
    --------
    >>> import torch
    >>> mostly_zero(torch.eye(10), torch.ones(10, 600)), mostly_zero(torch.eye(10), torch.eye(10))
    (True, False)
    """
    if x.requires_grad or x.device.type != "cpu" or table.shape[1] < _LEAST_COLUMNS:
        return False
    return int(x.count_nonzero()) <= _MOST_NONZERO * x.numel()


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

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    >>> product_by_nonzeros(x, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    tensor([[6., 8.],
            [0., 0.]])
    """
    return _ProductByNonzeros.apply(x, table)
