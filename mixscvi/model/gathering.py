"""What minibatches give, put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

__all__ = ["gather", "gather_columns"]


def gather(minibatches: Iterable[tuple[Tensor, ...]]) -> tuple[np.ndarray, ...]:
    """Rows of minibatches, one below the other, in an array for each kind of them.

    Nothing of a minibatch is kept. Small tensors that stay between large ones that come and go
    would scatter them over ever more memory, many times what they take themselves.

    Parameters
    ----------
    minibatches
        Tensors with as many rows each, on any device.

    Returns
    -------
    As many arrays.

    Raises
    ------
    ValueError
        If there are no minibatches.

    Examples
    --------
    >>> import torch
    >>> loc, scale = gather((torch.ones(2, 3), torch.ones(2)) for _ in range(5))
    >>> loc.shape, scale.shape
    ((10, 3), (10,))
    """
    rows: list[np.ndarray] = []
    n_rows = 0
    for tensors in minibatches:
        parts = [tensor.detach().cpu().numpy() for tensor in tensors]
        stop = n_rows + len(parts[0])
        if not rows:
            rows = [np.empty((stop, *part.shape[1:]), part.dtype) for part in parts]
        elif stop > len(rows[0]):  # each row is copied a few times at most
            rows = [_longer(array, stop + stop // 2) for array in rows]
        for array, part in zip(rows, parts, strict=True):
            array[n_rows:stop] = part
        n_rows = stop
    if not rows:
        raise ValueError("dataloader must give minibatches, got none")
    return tuple(array[:n_rows].copy() for array in rows)


def gather_columns(minibatches: Iterable[Mapping[str, Tensor]]) -> dict[str, np.ndarray]:
    """As :func:`gather`, of tensors with names, the same ones in each minibatch.

    Examples
    --------
    >>> import torch
    >>> columns = gather_columns({"loc": torch.ones(2, 3)} for _ in range(5))
    >>> columns["loc"].shape
    (10, 3)
    """
    names: list[str] = []

    def unnamed(columns: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        names[:] = columns
        return tuple(columns.values())

    arrays = gather(map(unnamed, minibatches))
    return dict(zip(names, arrays, strict=True))


def _longer(array: np.ndarray, n_rows: int) -> np.ndarray:
    longer = np.empty((n_rows, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer
