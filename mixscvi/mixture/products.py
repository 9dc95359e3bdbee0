"""Matrix products: by the faster of two libraries, and such that skip zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixscvi import compiled

__all__ = ["SparseRows", "few_nonzeros", "linear", "product_by_nonzeros", "product_with_transpose"]

# Shares of non-zeros, and multiplications by zeros as well, at which sums of rows take a CPU no
# more time than the dense product, with the time to find the non-zeros.
_MOST_NONZERO = 0.25
_LEAST_WORK = 2**23

# What one of several threads does at least, in multiplications.
_WORK_PER_TASK = 2**20
_TASKS_PER_THREAD = 2

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
    """A matrix by the non-zeros of its rows, in order: what :func:`few_nonzeros` finds."""

    starts: Tensor
    """Where each row's begin, and where the last one's end, `(n_rows + 1,)`."""
    column: Tensor
    """Where they are, `(n,)`."""
    value: Tensor
    """`(n,)`."""
    n_columns: int


_KERNELS = "mixscvi.mixture.sparse_kernels"


def _kernels() -> ModuleType | None:
    # Under function transforms tensors may have no memory of their own.
    active = torch._C._are_functorch_transforms_active()
    return None if active else compiled.load(_KERNELS)


def _in_blocks(
    kernel: Callable[..., None], blocks: Sequence[tuple[int, ...]], *arrays: Any
) -> bool:
    """Run a compiled function; whether it could be compiled."""
    try:
        compiled.run_tasks(lambda *block: kernel(*block, *arrays), blocks, torch.get_num_threads())
    except compiled.errors() as error:
        compiled.give_up(error)
        return False
    return True


def _split(n: int, n_blocks: int) -> list[tuple[int, int]]:
    bounds = [n * i // n_blocks for i in range(n_blocks + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


def _n_tasks(work: int) -> int:
    n_threads = torch.get_num_threads()
    most = 1 if n_threads == 1 else _TASKS_PER_THREAD * n_threads
    return max(1, min(most, work // _WORK_PER_TASK))


def _transpose(rows: SparseRows) -> SparseRows:
    n_rows = len(rows.starts) - 1
    kernels = _kernels()
    if kernels is not None:
        starts = rows.starts.new_empty(rows.n_columns + 1)
        row, value = torch.empty_like(rows.column), torch.empty_like(rows.value)
        arrays = (t.numpy() for t in (*rows[:3], starts, row, value))
        if _in_blocks(kernels.sort_by_column, [()], *arrays):
            return SparseRows(starts, row, value, n_rows)
    order = rows.column.argsort(stable=True)
    of_row = torch.repeat_interleave(torch.arange(n_rows), rows.starts.diff())
    starts = F.pad(rows.column.bincount(minlength=rows.n_columns).cumsum(0), (1, 0))
    return SparseRows(starts, of_row[order], rows.value[order], n_rows)


def _sums_of_rows(rows: SparseRows, table: Tensor) -> Tensor:
    """The product with a table."""
    n_rows, n_out = len(rows.starts) - 1, table.shape[1]
    kernels = _kernels()
    if table.stride(1) != 1:
        table = table.contiguous()
    if kernels is not None:
        out = table.new_empty(n_rows, n_out)
        n_tiles = -(-n_out // kernels.TILE)
        n_tasks = _n_tasks(len(rows.column) * n_out)
        # Each thread has a part of what is larger to itself.
        of_tiles = min(n_tiles, n_tasks) if table.numel() > out.numel() else 1
        of_rows = min(max(n_rows, 1), -(-n_tasks // of_tiles))
        blocks = [t + r for t in _split(n_tiles, of_tiles) for r in _split(n_rows, of_rows)]
        arrays = (t.numpy() for t in (*rows[:3], table, out))
        if _in_blocks(kernels.sums_of_rows, blocks, *arrays):
            return out
    return F.embedding_bag(
        rows.column, table, rows.starts[:-1], mode="sum", per_sample_weights=rows.value
    )


class _ProductByNonzeros(torch.autograd.Function):
    """Sums of a table's rows, whose gradient is such a product too: of the transpose.

    So every derivative and every function transform goes through these three methods.
    """

    @staticmethod
    def forward(
        table: Tensor, starts: Tensor, column: Tensor, value: Tensor, n_columns: int
    ) -> Tensor:
        return _sums_of_rows(SparseRows(starts, column, value, n_columns), table.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *nonzeros, ctx.n_columns = inputs
        ctx.save_for_backward(*nonzeros)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        starts, column, value = ctx.saved_tensors
        transposed = _transpose(SparseRows(starts, column, value, ctx.n_columns))
        return product_by_nonzeros(transposed, grad), None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        table: Tensor,
        starts: Tensor,
        column: Tensor,
        value: Tensor,
        n_columns: int,
    ) -> tuple[Tensor, int]:
        # Tables side by side are one of more columns; non-zeros are found where they are one's own.
        tables = table.movedim(in_dims[0] or 0, -1)
        y: Tensor = _ProductByNonzeros.apply(tables.flatten(1), starts, column, value, n_columns)
        return y.unflatten(1, tables.shape[1:]), 2


def few_nonzeros(x: Tensor, table: Tensor) -> SparseRows | None:
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
    >>> len(few_nonzeros(x, table).column), few_nonzeros(x + 1, table), few_nonzeros(x[:2], table)
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
    # The kernel writes a zero before it moves on, so the last one needs a place, too.
    room = int(_MOST_NONZERO * x.numel()) + 1
    starts, column = (torch.empty(n, dtype=torch.int64) for n in (n_rows + 1, room))
    value = torch.empty(room, dtype=x.dtype)
    try:
        found = kernels.find_nonzeros(*(t.numpy() for t in (x.contiguous(), starts, column, value)))
    except compiled.errors() as error:
        compiled.give_up(error)
        return None
    if not found:
        return None
    n = int(starts[-1])
    return SparseRows(starts, column[:n], value[:n], n_columns)


def product_by_nonzeros(rows: SparseRows, table: Tensor) -> Tensor:
    """`x @ table` as sums of the table's rows, and so its gradient with respect to the table.

    Parameters
    ----------
    rows
        The non-zeros of `x`, `(B, n_in)`.
    table
        `(n_in, n_out)`, of the same type.

    Returns
    -------
    `(B, n_out)`.

    Examples
    --------
    >>> import torch
    >>> x = SparseRows(torch.tensor([0, 1, 1]), torch.tensor([1]), torch.tensor([2.0]), 3)
    >>> product_by_nonzeros(x, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    tensor([[6., 8.],
            [0., 0.]])
    """
    product: Tensor = _ProductByNonzeros.apply(table, *rows)
    return product
