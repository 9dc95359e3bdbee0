"""Arguments of loaders, which methods and ``train`` pass on: named, where they cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from scvi import settings
from scvi.dataloaders import AnnDataLoader
from torch import Generator
from torch.utils.data import DataLoader

from mixscvi.checks import (
    check_boolean,
    check_function,
    check_mapping,
    check_number,
    check_positive_int,
)
from mixscvi.model.inputs import check_keywords

__all__ = ["CHOSEN", "check_loader_arguments", "check_loader_values"]

# What the method that makes the loader chooses: which cells there are, and in which order.
CHOSEN = {
    "adata", "adata_manager", "batch_sampler", "batch_size", "data_and_attributes",
    "data_loader_class", "dataset", "distributed_sampler", "drop_dataset_tail", "drop_last",
    "indices", "iter_ndarray", "sampler", "shuffle",
}  # fmt: skip
# Those of them that one may say are not to be.
_SAID = ("distributed_sampler", "drop_dataset_tail", "drop_last", "iter_ndarray", "shuffle")
_OF_WORKERS = ("multiprocessing_context", "persistent_workers", "prefetch_factor", "timeout")


def _check_generator(name: str, value: Any) -> None:
    if not isinstance(value, Generator):
        raise TypeError(f"{name} must be a torch.Generator, got {value!r:.60}")


_VALUES: dict[str, Callable[[str, Any], object]] = {
    "num_workers": partial(check_positive_int, least=0),
    "prefetch_factor": partial(check_positive_int, least=1),
    "timeout": partial(check_number, least=0),
    **dict.fromkeys(("in_order", "load_sparse_tensor", "persistent_workers", "pin_memory"),
                    check_boolean),
    **dict.fromkeys(("collate_fn", "worker_init_fn"), check_function),
    "generator": _check_generator,
}  # fmt: skip
_MAY_BE_NONE = ("collate_fn", "generator", "prefetch_factor", "worker_init_fn")


def check_loader_arguments(given: Any) -> None:
    """Raise if keywords for the loader of a method are none, or would change what it returns.

    Parameters
    ----------
    given
        Its ``data_loader_kwargs``; ``None`` for none.

    Raises
    ------
    TypeError, ValueError
        Naming the keyword.

    Examples
    --------
    >>> check_loader_arguments({"pin_memory": True})
    >>> check_loader_arguments({"shuffle": True})
    Traceback (most recent call last):
    ...
    TypeError: data_loader_kwargs must not have 'shuffle', got True: the method chooses the cells
    and their order
    """
    if given is None:
        return
    check_mapping("data_loader_kwargs", given)
    for name in given:
        if name in CHOSEN and not (name in _SAID and given[name] is False):
            raise TypeError(
                f"data_loader_kwargs must not have {name!r}, got {given[name]!r:.60}: the method "
                "chooses the cells and their order"
            )
    check_keywords(given, (AnnDataLoader, DataLoader), argument="data_loader_kwargs")
    check_loader_values(given)


def check_loader_values(given: Mapping[str, Any]) -> None:
    """Raise if arguments of a loader are of the wrong type, or do not go together.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.
    """
    for name, value in given.items():
        if name in _VALUES and not (value is None and name in _MAY_BE_NONE):
            _VALUES[name](name, value)
    if given.get("num_workers", settings.dl_num_workers) > 0:
        return
    for name in _OF_WORKERS:
        if given.get(name):
            raise ValueError(f"{name}={given[name]!r:.60} needs num_workers above 0")
