"""When the compiled kernels run, on which blocks, and what happens when they cannot."""

from __future__ import annotations

from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixscvi import compiled
from mixscvi.mixture.mostly_zero import MostlyZero, SparseRows

__all__ = ["Gradients", "SparseCounts", "evaluate", "usable"]

_ELEMENTS_PER_TASK = 2**16
_TASKS_PER_THREAD = 4
_CELLS_PER_TABLE = 16  # fewer cells do not look up often enough


class SparseCounts(NamedTuple):
    """Counts `(B, G)` as compressed sparse rows.

    Parameters
    ----------
    indptr
        Where the entries of each cell start, `(B + 1,)`.
    indices, data
        Genes and counts, `(nnz,)`. No gene occurs twice in a cell.
    n_genes
        Number of genes, `G`.

    Examples
    --------
    >>> import torch
    >>> indptr, indices = torch.tensor([0, 1, 3]), torch.tensor([1, 0, 2])
    >>> counts = SparseCounts(indptr, indices, torch.tensor([3.0, 1.0, 2.0]), n_genes=3)
    >>> counts.to_dense()
    tensor([[0., 3., 0.],
            [1., 0., 2.]])
    """

    indptr: Tensor
    indices: Tensor
    data: Tensor
    n_genes: int

    def cells(self, selection: slice) -> SparseCounts:
        """Some consecutive cells."""
        indptr = self.indptr[selection.start : selection.stop + 1]
        entries = slice(int(indptr[0]), int(indptr[-1]))
        return SparseCounts(
            indptr - indptr[0], self.indices[entries], self.data[entries], self.n_genes
        )

    def to_dense(self) -> Tensor:
        """The counts as a dense tensor `(B, G)`."""
        rows = SparseRows(self.indptr, self.indices, self.data)
        return MostlyZero(rows, self.n_genes).dense()


class Gradients(NamedTuple):
    """Gradients of each row's value, as :func:`evaluate` writes them."""

    mean: Tensor
    theta: Tensor | None
    zi: Tensor | None
    log_library: Tensor | None
    sums: Tensor | None = None
    """Sums over all rows of the gradients by mean, theta and zi, `(3, G)`; not in memory as rows
    where only they are asked for."""


def usable(counts: Tensor | SparseCounts, *tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: plain ones, of one real type, on the CPU."""
    data = counts.data if isinstance(counts, SparseCounts) else counts
    dtype = data.dtype
    if dtype not in (torch.float32, torch.float64):
        return False
    for tensor in (data, *(tensor for tensor in tensors if tensor is not None)):
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.device.type != "cpu" or tensor.dtype != dtype:
            return False
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and _kernels() is not None
    )


def _kernels() -> ModuleType | None:
    return compiled.load("mixscvi.likelihoods.kernels")


def _tasks(n_cells: int, n_draws: int, n_genes: int) -> list[tuple[int, ...]]:
    """Blocks of rows, numbered: `(first cell, last cell, first draw, last draw, number)`.

    Cells are split before draws.
    """
    n_tasks = compiled.n_tasks(n_cells * n_draws * n_genes, _ELEMENTS_PER_TASK, _TASKS_PER_THREAD)
    cell_blocks = min(n_cells, n_tasks)
    draw_blocks = min(n_draws, -(-n_tasks // cell_blocks))
    blocks = product(compiled.split(n_cells, cell_blocks), compiled.split(n_draws, draw_blocks))
    return [(*cells, *draws, number) for number, (cells, draws) in enumerate(blocks)]


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().contiguous().numpy()


def evaluate(
    counts: Tensor | SparseCounts,
    mean: Tensor,
    theta: Tensor | None,
    zi: Tensor | None = None,
    *,
    mean_bias: Tensor | None = None,
    zi_bias: Tensor | None = None,
    log_library: Tensor | None = None,
    gradients: Gradients | None = None,
) -> Tensor | None:
    """Log-likelihoods of all draws, `(L, B, S)`, or ``None`` if the kernels failed.

    Parameters
    ----------
    counts
        `(B, G)`.
    mean
        Means, or with `log_library` logits of a softmax, `(L, B, S, G)`.
    theta
        Inverse dispersions, `(G,)`, `(B, 1, G)` or `(L, B, S, G)`; ``None`` for Poisson.
    zi
        Logits of dropping out, `(L, B, S, G)`, or ``None`` for a negative binomial.
    mean_bias, zi_bias
        Added to the logits, `(G,)`.
    log_library
        `(L, B, S)`.
    gradients
        Contiguous tensors to write gradients to; may hold `mean` (if it holds logits) and `zi`.
        With ``sums`` there need be no ``theta``.

    Raises
    ------
    ValueError
        If the counts are not those of the parameters' cells and genes.
    """
    kernels = _kernels()
    n_strata, n_cells, n_per_stratum, n_genes = mean.shape
    if isinstance(counts, SparseCounts):
        x, sparse = mean.new_empty(0, n_genes), counts
        shape = (len(sparse.indptr) - 1, sparse.n_genes)
    else:
        empty = torch.empty(0, dtype=torch.int64)
        x, sparse = counts, SparseCounts(empty, empty, mean.new_empty(0), n_genes)
        shape = (x.shape[0], x.shape[1])
    if shape != (n_cells, n_genes):
        raise ValueError(
            f"counts must have shape (B, G) = {(n_cells, n_genes)}, as the parameters have shape "
            f"(L, B, S, G) = {tuple(mean.shape)}, got {shape}"
        )
    value = mean.new_empty(mean.shape[:-1])
    if kernels is None or value.numel() == 0:
        return None if kernels is None else value

    theta_strides = (0, 0, 0)
    theta_rows: Any = None
    if theta is not None:
        theta_rows = _array(theta).reshape(-1, n_genes)
        if theta.dim() == 3:
            theta_strides = (0, 1, 0)
        elif theta.dim() == 4:
            theta_strides = (n_cells * n_per_stratum, n_per_stratum, 1)
    rows = (_array(sparse.indptr.long()), _array(sparse.indices.int()), _array(sparse.data))
    tasks = _tasks(n_cells, n_strata * n_per_stratum, n_genes)
    written: tuple[Any, ...] = (None,) * 4
    sums = None
    if gradients is not None:
        written = tuple(
            None if tensor is None else tensor.detach().view(-1, n_genes).numpy()
            for tensor in gradients[:3]
        )
        d_library = gradients.log_library
        written += (None if d_library is None else d_library.view(-1).numpy(),)
        if gradients.sums is not None:
            sums = mean.new_zeros((len(tasks), *gradients.sums.shape)).detach()

    # An empty table, not none: a short minibatch is no case to compile anew for.
    tabulated = theta is not None and theta.dim() == 1 and n_cells >= _CELLS_PER_TABLE
    table = mean.new_empty(kernels.table_length(n_genes) if tabulated else 0).detach().numpy()
    if tabulated and not compiled.in_blocks(kernels.fill_table, [()], theta_rows[0], table):
        return None
    computed = compiled.in_blocks(
        kernels.rows,
        tasks,
        *(n_cells, n_per_stratum, _array(x), *rows),
        *(_array(mean).reshape(-1, n_genes), _array(mean_bias)),
        None if log_library is None else _array(log_library).reshape(-1),
        *(theta_rows, theta_strides),
        *(None if zi is None else _array(zi).reshape(-1, n_genes), _array(zi_bias), table),
        *(value.view(-1).numpy(), *written, None if sums is None else sums.numpy()),
    )
    if not computed:
        return None
    if gradients is not None and sums is not None:
        torch.sum(sums, 0, out=gradients.sums)
    return value
