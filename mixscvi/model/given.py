"""Minibatches of the user's own, checked as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from scvi import REGISTRY_KEYS
from scvi.module import VAE
from torch import Tensor

__all__ = [
    "GivenMinibatches",
    "check_genes_of_module",
    "check_minibatch",
    "is_of_a_data_module",
    "registry_of",
]

_NEEDED = (REGISTRY_KEYS.X_KEY, REGISTRY_KEYS.BATCH_KEY)


def registry_of(model: Any) -> Mapping[str, Any]:
    """Registry of a model, empty where it has none yet.

    A model made without data has none, trained on a data module or not.

    Examples
    --------
    >>> registry_of(None)
    {}
    """
    registry: Mapping[str, Any] = getattr(model, "registry_", {})
    return registry


def is_of_a_data_module(registry: Mapping[str, Any]) -> bool:
    """Whether a model was made of a data module, and not of an AnnData.

    Examples
    --------
    >>> is_of_a_data_module({"setup_method_name": "setup_anndata"})
    False
    """
    return registry.get("setup_method_name") == "setup_datamodule"


def check_genes_of_module(datamodule: Any, registry: Mapping[str, Any]) -> None:
    """Raise if a data module names other genes than a model, or the same in another order.

    Parameters
    ----------
    datamodule
        Any; those that name none pass.
    registry
        Of the model.

    Raises
    ------
    ValueError
        Naming the first gene that differs.

    Examples
    --------
    >>> check_genes_of_module(None, {})
    """
    theirs, ours = _genes_of(getattr(datamodule, "registry", None)), _genes_of(registry)
    if theirs is None or ours is None or theirs == ours:
        return
    if len(theirs) != len(ours):
        raise ValueError(f"datamodule must have the model's {len(ours)} genes, got {len(theirs)}")
    at = next(i for i, (one, other) in enumerate(zip(theirs, ours, strict=True)) if one != other)
    raise ValueError(
        f"datamodule must have the model's genes in their order: {ours[at]!r} at {at}, got "
        f"{theirs[at]!r}"
    )


def _genes_of(registry: Any) -> list[str] | None:
    """Names of the genes in a registry, if it has any."""
    found: Any = registry
    for name in ("field_registries", REGISTRY_KEYS.X_KEY, "state_registry", "column_names"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return None if found is None else [str(gene) for gene in found]


class GivenMinibatches:
    """A loader of the user's own, each of whose minibatches is looked at before it is used.

    Parameters
    ----------
    dataloader
        Gives minibatches.
    module
        What they are for.
    """

    def __init__(self, dataloader: Iterable[Mapping[str, Tensor]], module: VAE) -> None:
        self._dataloader = dataloader
        self._module = module

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Go through the minibatches once.

        Raises
        ------
        ValueError
            If there are none; or as :func:`check_minibatch`.
        """
        n = 0
        for tensors in self._dataloader:
            check_minibatch(tensors, self._module, source=f"minibatch {n} of dataloader")
            yield _Minibatch(tensors)
            n += 1
        if n == 0:
            raise ValueError("dataloader must give minibatches, got none")


class _Minibatch(dict[str, Tensor]):
    """A minibatch that says what is missing when it is asked for."""

    def __missing__(self, key: str) -> Tensor:
        raise KeyError(f"the minibatches of dataloader must have {key!r}, got {[*self]}")


def check_minibatch(tensors: Any, module: VAE, *, source: str) -> None:
    """Raise if a module cannot use a minibatch of the user's own.

    Parameters
    ----------
    tensors
        Counts `(B, G)` and codes of batches `(B, 1)`, and what else there is, by name.
    module
        What it is for.
    source
        Name of the minibatch for messages.

    Raises
    ------
    TypeError
        If it is no dictionary of tensors, or its counts are of another precision than the weights.
    KeyError
        If there are no counts or codes.
    ValueError
        If it is of other genes or of batches that there are not, or if there are negative counts,
        ones that are NaN or infinite, or cells with none.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{source} must be a dictionary of tensors, got a {type(tensors).__name__}")
    for key in _NEEDED:
        if key not in tensors:
            raise KeyError(f"{source} must have {key!r}, got {[*tensors]}")
        if not isinstance(tensors[key], Tensor):
            kind = type(tensors[key]).__name__
            raise TypeError(f"{source} must hold tensors, got {key!r} of {kind}")
    x, batch = (tensors[key] for key in _NEEDED)
    n_genes = module.n_input
    if x.ndim != 2 or x.shape[1] != n_genes:
        how = ""
        if x.ndim == 3 and torch.distributed.is_initialized():
            how = (
                ". Lightning made the loader anew for several processes: give each its cells "
                "yourself (AnnDataLoader(distributed_sampler=True)), and pass "
                "use_distributed_sampler=False to train()"
            )
        raise ValueError(
            f"{source} must have {_NEEDED[0]!r} of shape (B, {n_genes}), cells by the genes that "
            f"the model was trained on, got {tuple(x.shape)}{how}"
        )
    precision = next(module.parameters()).dtype
    if x.dtype.is_complex or (x.is_floating_point() and x.dtype != precision):
        raise TypeError(f"{source} must have {_NEEDED[0]!r} of {precision}, got {x.dtype}")
    if batch.shape != (len(x), 1):
        raise ValueError(
            f"{source} must have {_NEEDED[1]!r} of shape ({len(x)}, 1), got {tuple(batch.shape)}"
        )
    if not bool(((batch >= 0) & (batch < max(module.n_batch, 1))).all()):
        raise ValueError(
            f"{source} must have codes from 0 to {max(module.n_batch, 1) - 1} as {_NEEDED[1]!r}, "
            f"got {batch.min().item():g} to {batch.max().item():g}"
        )
    if module.minified_data_type is None and x.layout == torch.strided:
        _check_values(x, module, source)


def _check_values(x: Tensor, module: VAE, source: str) -> None:
    total = x.sum(dim=1)
    wrong = ~total.isfinite()
    expected = "finite counts"
    if module.gene_likelihood != "normal" and not bool(wrong.any()):
        wrong, expected = (x < 0).any(dim=1), "raw counts, none of them negative"
        of_cells = module.use_observed_lib_size and not module.use_size_factor_key
        if of_cells and not bool(wrong.any()):
            wrong, expected = total <= 0, "at least one count in each cell"
    if bool(wrong.any()):
        first = torch.nonzero(wrong)[0].item()
        raise ValueError(f"{source} must have {expected}: wrong is its row {first}")
