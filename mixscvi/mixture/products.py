"""Matrix products: by the faster of two libraries, and such that skip zeros."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixscvi import compiled

__all__ = [
    "Nonzeros",
    "SparseRows",
    "few_nonzeros",
    "linear",
    "product_by_nonzeros",
    "product_with_transpose",
]

# Shares of non-zeros, and multiplications by zeros as well, at which sums of rows take a CPU no
# more time than the dense product, with the time to find the non-zeros.
_MOST_NONZERO = 0.25
_LEAST_WORK = 2**23

# Bytes of a table from which a product reads it once, row by row, instead of once for each row of
# the result: about what one core's cache holds. Sums of more rows than that would leave the cache.
_LARGE_TABLE = 2**21
_MOST_SUMS = 2**10

# What one of several threads does at least, in multiplications.
_WORK_PER_TASK = 2**20
_TASKS_PER_THREAD = 2

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


class SparseRows(NamedTuple):
    """A matrix by the non-zeros of its rows, in order."""

    starts: Tensor
    """Where each row's begin, and where the last one's end, `(n_rows + 1,)`."""
    column: Tensor
    """Where they are, `(n,)`."""
    value: Tensor
    """`(n,)`."""


class Nonzeros(NamedTuple):
    """A matrix by its non-zeros, row by row and column by column."""

    rows: SparseRows
    columns: SparseRows
    """The transpose's rows."""

    @property
    def T(self) -> Nonzeros:  # noqa: N802 - as of a tensor
        """The transpose."""
        return Nonzeros(self.columns, self.rows)


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
    of_row = torch.repeat_interleave(torch.arange(len(rows.starts) - 1), rows.starts.diff())
    starts = F.pad(rows.column.bincount(minlength=n_columns).cumsum(0), (1, 0))
    return SparseRows(starts, of_row[order], rows.value[order])


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
    def forward(table: Tensor, *nonzeros: Tensor) -> Tensor:
        return _product(_nonzeros(nonzeros), table.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x = _nonzeros(ctx.saved_tensors)
        return product_by_nonzeros(x.T, grad), *(None,) * len(ctx.saved_tensors)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], table: Tensor, *nonzeros: Tensor
    ) -> tuple[Tensor, int]:
        # Tables side by side are one of more columns; non-zeros are found where they are one's own.
        tables = table.movedim(in_dims[0] or 0, -1)
        y: Tensor = _ProductByNonzeros.apply(tables.flatten(1), *nonzeros)
        return y.unflatten(1, tables.shape[1:]), 2


def _nonzeros(tensors: Sequence[Tensor]) -> Nonzeros:
    return Nonzeros(SparseRows(*tensors[:3]), SparseRows(*tensors[3:]))


def few_nonzeros(x: Tensor, table: Tensor) -> Nonzeros | None:
    """The non-zeros of a matrix, if :func:`product_by_nonzeros` is the faster product.

    It is for a constant `x` on the CPU with few non-zeros, and products that are not small, with a
    table whose rows lie together in memory each. Where
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
    if x.requires_grad or x.device.type != "cpu" or type(x) is not Tensor:
        return None
    if x.dtype not in (torch.float32, torch.float64) or x.dtype != table.dtype:
        return None
    if table.stride(1) != 1:
        return None
    kernels = _kernels() if x.numel() * table.shape[1] >= _LEAST_WORK else None
    if kernels is None:
        return None
    n_rows, n_columns = x.shape
    room = int(_MOST_NONZERO * x.numel()) + kernels.SLACK
    starts, column = (torch.empty(n, dtype=torch.int64) for n in (n_rows + 1, room))
    value = torch.empty(room, dtype=x.dtype)
    arrays = (t.numpy() for t in (x.contiguous(), starts, column, value))
    found = compiled.attempt(kernels.find_nonzeros, *arrays)
    if not found:
        return None
    n = int(starts[-1])
    rows = SparseRows(starts, column[:n], value[:n])
    return Nonzeros(rows, _transpose(rows, n_columns))


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
    product: Tensor = _ProductByNonzeros.apply(table, *x.rows, *x.columns)
    return product
