"""Matrix products that skip zeros."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixscvi import compiled
from mixscvi.mixture.mostly_zero import MostlyZero, SparseRows, starts_of

__all__ = ["MOST_NONZERO", "Nonzeros", "few_nonzeros", "product_by_nonzeros"]

# Shares of non-zeros, and multiplications by zeros as well, at which sums of rows take a CPU no
# more time than the dense product, with the time to find the non-zeros.
MOST_NONZERO = 0.25
_LEAST_WORK = 2**23

# Bytes of a table from which a product reads it once, row by row, instead of once for each row of
# the result: about what one core's cache holds. Sums of more rows than that would leave the cache.
_LARGE_TABLE = 2**21
_MOST_SUMS = 2**10

# What one of several threads does at least, in multiplications.
_WORK_PER_TASK = 2**20
_TASKS_PER_THREAD = 2


class Nonzeros:
    """A matrix by its non-zeros.

    Parameters
    ----------
    rows
        Those of its rows.
    n_columns
        Number of columns.
    columns
        Those of its columns, if they are known: the transpose's rows.
    """

    def __init__(self, rows: SparseRows, n_columns: int, columns: SparseRows | None = None) -> None:
        self.rows, self.n_columns = rows, n_columns
        self._columns = columns

    @property
    def columns(self) -> SparseRows:
        """Found when first asked for."""
        if self._columns is None:
            self._columns = _transpose(self.rows, self.n_columns)
        return self._columns

    @property
    def T(self) -> Nonzeros:  # noqa: N802 - as of a tensor
        """The transpose."""
        return Nonzeros(self.columns, len(self.rows.starts) - 1, self.rows)


_KERNELS = "mixscvi.mixture.sparse_kernels"


def _kernels() -> ModuleType | None:
    # Under function transforms tensors may have no memory of their own.
    active = torch._C._are_functorch_transforms_active()
    return None if active else compiled.load(_KERNELS)


def _transpose(rows: SparseRows, n_columns: int) -> SparseRows:
    kernels = _kernels()
    if kernels is not None:
        starts = rows.starts.new_empty(n_columns + 1)
        row, value = torch.empty_like(rows.column), torch.empty_like(rows.value)
        arrays = (t.numpy() for t in (*rows, starts, row, value))
        if compiled.in_blocks(kernels.sort_by_column, [()], *arrays):
            return SparseRows(starts, row, value)
    order = rows.column.argsort(stable=True)
    return SparseRows(starts_of(rows.column, n_columns), rows.row()[order], rows.value[order])


def _by_column(x: Nonzeros, table: Tensor, out: Tensor, kernels: ModuleType) -> bool:
    """Whether the product could be written to `out`."""
    n_tiles = out.shape[1] // kernels.SCATTERED_TILE
    # As few tasks as there are threads, for each goes over all of the table.
    blocks = compiled.split(n_tiles, min(n_tiles, torch.get_num_threads()))
    arrays = (t.numpy() for t in (*x.columns, table, out))
    return compiled.in_blocks(kernels.sums_by_column, blocks, *arrays)


def _by_row(x: Nonzeros, table: Tensor, out: Tensor, kernels: ModuleType) -> bool:
    """Whether the product could be written to `out`."""
    n_rows, n_out = out.shape
    n_tiles = -(-n_out // kernels.TILE)
    work = len(x.rows.column) * n_out
    n_tasks = compiled.n_tasks(work, least=_WORK_PER_TASK, per_thread=_TASKS_PER_THREAD)
    # Each thread has a part of what is larger to itself.
    of_tiles = min(n_tiles, n_tasks) if table.numel() > out.numel() else 1
    of_rows = min(max(n_rows, 1), -(-n_tasks // of_tiles))
    tiles, rows = compiled.split(n_tiles, of_tiles), compiled.split(n_rows, of_rows)
    arrays = (t.numpy() for t in (*x.rows, table, out))
    return compiled.in_blocks(
        kernels.sums_of_rows, [tile + row for tile in tiles for row in rows], *arrays
    )


def _product(x: Nonzeros, table: Tensor) -> Tensor:
    n_rows, n_out = len(x.rows.starts) - 1, table.shape[1]
    kernels = _kernels()
    if table.stride(1) != 1:
        table = table.contiguous()
    if kernels is not None:
        out = table.new_empty(n_rows, n_out)
        large = table.numel() * table.itemsize >= _LARGE_TABLE and n_rows <= _MOST_SUMS
        sums = _by_column if large and n_out % kernels.SCATTERED_TILE == 0 else _by_row
        if sums(x, table, out, kernels):
            return out
    starts, column, value = x.rows
    return F.embedding_bag(column, table, starts[:-1], mode="sum", per_sample_weights=value)


class _ProductByNonzeros(torch.autograd.Function):
    """Sums of a table's rows, whose gradient is such a product too: of the transpose.

    So every derivative and every function transform goes through these three methods.
    """

    @staticmethod
    def forward(table: Tensor, x: Nonzeros) -> Tensor:
        return _product(x, table.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Nonzeros], output: Tensor) -> None:
        ctx.x = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return product_by_nonzeros(ctx.x.T, grad), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, None], table: Tensor, x: Nonzeros
    ) -> tuple[Tensor, int]:
        # Tables side by side are one of more columns; non-zeros are found where they are one's own.
        tables = table.movedim(in_dims[0] or 0, -1)
        y = product_by_nonzeros(x, tables.flatten(1))
        return y.unflatten(1, tables.shape[1:]), 2


def few_nonzeros(x: Tensor, table: Tensor) -> Nonzeros | None:
    """The non-zeros of a matrix, if :func:`product_by_nonzeros` is the faster product.

    It is for a constant `x` on the CPU with few non-zeros, and products that are not small, with a
    table whose rows lie together in memory each. Those of
    :class:`~mixscvi.mixture.mostly_zero.MostlyZero` are known, others are found. Where
    the choice cannot depend on the values, as in compiled functions, within function transforms and
    with fake tensors, and where autocast would choose the type, the dense product is to be used.

    Parameters
    ----------
    x
        `(B, n_in)`.
    table
        `(n_in, n_out)`.

    Examples
    --------
    >>> import torch
    >>> x, table = torch.eye(200), torch.ones(200, 600)
    >>> (
    ...     len(few_nonzeros(x, table).rows.column),
    ...     few_nonzeros(x + 1, table),
    ...     few_nonzeros(x[:2], table),
    ... )
    (200, None, None)
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return None
    if x.requires_grad or x.device.type != "cpu" or type(x) not in (Tensor, MostlyZero):
        return None
    if x.dtype not in (torch.float32, torch.float64) or x.dtype != table.dtype:
        return None
    if table.stride(1) != 1:
        return None
    kernels = _kernels() if x.numel() * table.shape[1] >= _LEAST_WORK else None
    if kernels is None:
        return None
    rows = x.rows if isinstance(x, MostlyZero) else _find(x, kernels)
    if rows is None or len(rows.value) > _most_nonzero(x):
        return None
    return Nonzeros(rows, x.shape[1])


def _most_nonzero(x: Tensor) -> int:
    return int(MOST_NONZERO * x.numel())


def _find(x: Tensor, kernels: ModuleType) -> SparseRows | None:
    """The non-zeros, or ``None`` if they are not few."""
    room = _most_nonzero(x) + kernels.SLACK
    starts, column = (torch.empty(n, dtype=torch.int64) for n in (len(x) + 1, room))
    value = torch.empty(room, dtype=x.dtype)
    arrays = (t.numpy() for t in (x.contiguous(), starts, column, value))
    if not compiled.attempt(kernels.find_nonzeros, *arrays):
        return None
    n = int(starts[-1])
    return SparseRows(starts, column[:n], value[:n])


def product_by_nonzeros(x: Nonzeros, table: Tensor) -> Tensor:
    """`x @ table` as sums of the table's rows, and so its gradient with respect to the table.

    Parameters
    ----------
    x
        The non-zeros of a matrix `(B, n_in)`.
    table
        `(n_in, n_out)`, of the same type.

    Returns
    -------
    `(B, n_out)`.

    Examples
    --------
    >>> import torch
    >>> x = torch.eye(200)
    >>> table = torch.ones(200, 600)
    >>> bool((product_by_nonzeros(few_nonzeros(x, table), table) == x @ table).all())
    True
    """
    product: Tensor = _ProductByNonzeros.apply(table, x)
    return product
