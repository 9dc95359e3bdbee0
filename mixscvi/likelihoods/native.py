"""When the compiled kernels run, on which blocks, and what happens when they cannot."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixscvi import compiled
from mixscvi.mixture.mostly_zero import MostlyZero, SparseRows

__all__ = ["Gradients", "evaluate", "usable"]

_ELEMENTS_PER_TASK = 2**16
_TASKS_PER_THREAD = 4
_CELLS_PER_TABLE = 16  # fewer cells do not look up often enough


class Gradients(NamedTuple):
    """Gradients of each row's value, as :func:`evaluate` writes them."""

    mean: Tensor
    theta: Tensor | None
    zi: Tensor | None
    log_library: Tensor | None
    sums: Tensor | None = None
    """Sums over all rows of the gradients by mean, theta and zi, `(3, G)`; not in memory as rows
    where only they are asked for."""


def usable(counts: Tensor, *tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: plain ones, of one real type, on the CPU.

    Counts may be a :class:`~mixscvi.mixture.mostly_zero.MostlyZero`.
    """
    data = counts.rows.value if isinstance(counts, MostlyZero) else counts
    dtype = data.dtype
    if dtype not in (torch.float32, torch.float64):
        return False
    given = [data, *(tensor for tensor in tensors if tensor is not None)]
    of_one_type = all(tensor.dtype == dtype for tensor in given)
    return of_one_type and compiled.plain(*given) and _kernels() is not None


def _kernels() -> ModuleType | None:
    return compiled.load("mixscvi.likelihoods.kernels")


def _tasks(n_cells: int, n_draws: int, n_genes: int) -> list[tuple[int, ...]]:
    """Blocks of rows, numbered: `(first cell, last cell, first draw, last draw, number)`.

    Cells are split before draws.
    """
    n_tasks = compiled.n_tasks(n_cells * n_draws * n_genes, _ELEMENTS_PER_TASK, _TASKS_PER_THREAD)
    blocks = compiled.grid(n_cells, n_draws, n_tasks)
    return [(*block, number) for number, block in enumerate(blocks)]


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else compiled.array(tensor)


def _check_shapes(
    draws: torch.Size, counts: Tensor, theta: Tensor | None, zi: Tensor | None
) -> None:
    """Raise unless the kernels may read these tensors by the shape `(L, B, S, G)` of the draws."""
    _, n_cells, _, n_genes = draws
    of_draws, of_genes = {"(L, B, S, G)": tuple(draws)}, {"(G,)": (n_genes,)}
    for name, tensor, shapes in (
        ("counts", counts, {"(B, G)": (n_cells, n_genes)}),
        ("theta", theta, of_genes | {"(B, 1, G)": (n_cells, 1, n_genes)} | of_draws),
        ("zi_logits", zi, of_draws),
    ):
        if tensor is not None and tensor.shape not in shapes.values():
            expected = " or ".join(f"{letters} = {shape}" for letters, shape in shapes.items())
            raise ValueError(
                f"{name} must have shape {expected}, as the parameters have shape "
                f"(L, B, S, G) = {tuple(draws)}, got {tuple(tensor.shape)}"
            )


def evaluate(
    counts: Tensor,
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
        If the counts are not those of the parameters' cells and genes, or `theta` or `zi` is of
        another shape.
    """
    kernels = _kernels()
    n_strata, n_cells, n_per_stratum, n_genes = mean.shape
    _check_shapes(mean.shape, counts, theta, zi)
    if isinstance(counts, MostlyZero):
        x, nonzeros = mean.new_empty(0, n_genes), counts.rows
    else:
        empty = torch.empty(0, dtype=torch.int64)
        x, nonzeros = counts, SparseRows(empty, empty, mean.new_empty(0))
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
    rows = tuple(map(_array, (nonzeros.starts, nonzeros.column.int(), nonzeros.value)))
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
