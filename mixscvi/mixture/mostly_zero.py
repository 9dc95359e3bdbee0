"""Matrices of which the zeros are not stored, for those who know them; dense ones to all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["MostlyZero", "SparseRows", "starts_of"]


class SparseRows(NamedTuple):
    """A matrix by the non-zeros of its rows, in order."""

    starts: Tensor
    """Where each row's begin, and where the last one's end, `(n_rows + 1,)`."""
    column: Tensor
    """Where they are, `(n,)`."""
    value: Tensor
    """`(n,)`."""

    def row(self) -> Tensor:
        """The row of each, `(n,)`."""
        numbers = torch.arange(len(self.starts) - 1, device=self.starts.device)
        return torch.repeat_interleave(numbers, self.starts.diff(), output_size=len(self.value))


def starts_of(row: Tensor, n_rows: int) -> Tensor:
    """Where each row starts, and where the last one ends, `(n_rows + 1,)`, of rows in order.

    Examples
    --------
    >>> starts_of(torch.tensor([0, 2, 2]), n_rows=3)
    tensor([0, 1, 1, 3])
    """
    return F.pad(row.bincount(minlength=n_rows).cumsum(0), (1, 0))


class MostlyZero(Tensor):
    """A constant matrix `(n_rows, n_columns)` that has the non-zeros of its rows.

    Functions of torch take it as any tensor: it becomes dense when one asks for its elements. Its
    logarithm :func:`torch.log1p` and its sums of rows are taken without. It is for counts on their
    way from a loader to a first layer and a likelihood, which would have to find the non-zeros
    again. It has no memory of its own, so there is nothing at its ``data_ptr()``.

    Parameters
    ----------
    rows
        The non-zeros; there may be zeros among them. No column occurs twice in a row.
    n_columns
        Number of columns.

    Examples
    --------
    >>> rows = SparseRows(torch.tensor([0, 1, 3]), torch.tensor([1, 0, 2]), torch.ones(3))
    >>> x = MostlyZero(rows, n_columns=3)
    >>> x
    MostlyZero(n_rows=2, n_columns=3, n_nonzeros=3)
    >>> x + 1
    tensor([[1., 2., 1.],
            [2., 1., 2.]])
    >>> torch.log1p(x)
    MostlyZero(n_rows=2, n_columns=3, n_nonzeros=3)
    """

    _rows: SparseRows
    _dense: Tensor | None
    # Whether elements may have been written to otherwise than `_version` says.
    _written: bool

    @staticmethod
    def __new__(cls, rows: SparseRows, n_columns: int) -> MostlyZero:
        """Make a tensor without memory of its own."""
        matrix: MostlyZero = Tensor._make_wrapper_subclass(
            cls,
            (len(rows.starts) - 1, n_columns),
            dtype=rows.value.dtype,
            device=rows.value.device,
        )
        matrix._rows, matrix._dense, matrix._written = rows, None, False
        return matrix

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = _KNOWN.get(func)
        result = NotImplemented if known is None or kwargs else known(*args)
        if result is not NotImplemented:
            return result

        def dense(matrix: MostlyZero) -> Tensor:
            matrix._written |= func._schema.is_mutable
            return matrix.dense()

        args, kwargs = tree_map_only(MostlyZero, dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        n_rows, n_columns = self.shape
        n_nonzeros = len(self.rows.value)
        return f"MostlyZero(n_rows={n_rows}, n_columns={n_columns}, n_nonzeros={n_nonzeros})"

    @property
    def rows(self) -> SparseRows:
        """The non-zeros; found anew once somebody has written to the matrix or a view of it."""
        if not (self._written or self._version):
            return self._rows
        dense = self.dense()
        row, column = dense.nonzero(as_tuple=True)
        return SparseRows(starts_of(row, len(dense)), column, dense[row, column])

    def dense(self) -> Tensor:
        """The matrix as a tensor of its own memory, made when first asked for."""
        if self._dense is None:
            _, column, value = self._rows
            n_rows, n_columns = self.shape
            dense = torch.zeros(n_rows * n_columns, dtype=value.dtype, device=value.device)
            dense[self._rows.row().mul_(n_columns).add_(column)] = value
            self._dense = dense.view(n_rows, n_columns)
        return self._dense

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """As :meth:`torch.Tensor.numpy`."""
        self._written = True  # perhaps, from now on
        return self.dense().numpy(force=force)

    def tolist(self) -> list[list[float]]:
        """As :meth:`torch.Tensor.tolist`."""
        return self.dense().tolist()


def _log1p(x: MostlyZero) -> MostlyZero:
    rows = x.rows
    return MostlyZero(rows._replace(value=rows.value.log1p()), x.shape[1])


def _sum(x: MostlyZero, axes: list[int] | None, keepdim: bool = False) -> Any:
    if axes not in ([1], [-1]):
        return NotImplemented
    rows = x.rows
    sums = torch.segment_reduce(rows.value, "sum", offsets=rows.starts, unsafe=True)
    return sums.unsqueeze(1) if keepdim else sums


def _detach(x: MostlyZero) -> MostlyZero:
    return MostlyZero(x.rows, x.shape[1])


def _cat(tensors: list[MostlyZero], axis: int = 0) -> Any:
    # As scvi-tools' networks do where there are no covariates.
    return _detach(tensors[0]) if len(tensors) == 1 else NotImplemented


# What is done without making a matrix dense, with these arguments.
_KNOWN: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.cat.default: _cat,
    torch.ops.aten.detach.default: _detach,
    torch.ops.aten.log1p.default: _log1p,
    torch.ops.aten.sum.dim_IntList: _sum,
}
