"""Minibatches of the user's own, checked as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from scvi import REGISTRY_KEYS
from scvi.module import VAE
from torch import Tensor

from mixscvi.checks import name_first
from mixscvi.warning import warn_user

__all__ = [
    "GivenMinibatches",
    "check_batches_of_adata",
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
        Any; those that name none pass, and those that number them.
    registry
        Of the model.

    Raises
    ------
    ValueError
        Naming the first gene that differs.

    Warns
    -----
    UserWarning
        If the two have no name in common, as where one has symbols and the other has ids.

    Examples
    --------
    >>> check_genes_of_module(None, {})
    """
    theirs, ours = _genes_of(getattr(datamodule, "registry", None)), _genes_of(registry)
    if theirs is None or ours is None or theirs == ours:
        return
    if len(theirs) != len(ours):
        raise ValueError(f"datamodule must have the model's {len(ours)} genes, got {len(theirs)}")
    numbers = [str(i) for i in range(len(ours))]
    if numbers in (theirs, ours):
        return
    at = next(i for i, (one, other) in enumerate(zip(theirs, ours, strict=True)) if one != other)
    if not set(theirs) & set(ours):
        warn_user(
            f"datamodule has other names of genes than the model, {theirs[0]!r} at 0 for "
            f"{ours[0]!r}: whether the genes are in the same order cannot be told"
        )
        return
    raise ValueError(
        f"datamodule must have the model's genes in their order: {ours[at]!r} at {at}, got "
        f"{theirs[at]!r}"
    )


def check_batches_of_adata(adata: Mapping[str, Any], registry: Mapping[str, Any]) -> None:
    """Raise if an AnnData codes its batches otherwise than the data module that a model is of.

    scvi-tools transfers no setup from a data module, and decodes by code.

    Parameters
    ----------
    adata
        Registry of the AnnData.
    registry
        Of the model; those without batches pass.

    Raises
    ------
    ValueError
        Naming the batches.

    Examples
    --------
    >>> def registry_with(batches):
    ...     state = {"categorical_mapping": batches}
    ...     return {"field_registries": {"batch": {"state_registry": state}}}
    >>> check_batches_of_adata(registry_with(["a", "b"]), registry_with(["a", "b"]))
    >>> check_batches_of_adata(registry_with([0]), registry_with(["a", "b"]))
    Traceback (most recent call last):
    ...
    ValueError: adata must be set up with the batches of the model, 'a', 'b', got '0'
    """
    key, name = REGISTRY_KEYS.BATCH_KEY, "categorical_mapping"
    theirs, ours = _names_in(adata, key, name), _names_in(registry, key, name)
    if ours is None or theirs == ours:
        return
    raise ValueError(
        f"adata must be set up with the batches of the model, {name_first(ours)}, got "
        f"{name_first(theirs or [])}"
    )


def _genes_of(registry: Any) -> list[str] | None:
    """Names of the genes in a registry, if it has any."""
    return _names_in(registry, REGISTRY_KEYS.X_KEY, "column_names")


def _names_in(registry: Any, key: str, names: str) -> list[str] | None:
    """Names in a field of a registry, as text, if it has any."""
    found: Any = registry
    for name in ("field_registries", key, "state_registry", names):
        found = found.get(name) if isinstance(found, Mapping) else None
    if isinstance(found, str) or not isinstance(found, Iterable):
        return None
    return [str(name) for name in found]


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


def check_minibatch(tensors: Any, module: VAE, *, source: str, to_train: bool = False) -> None:
    """Raise if a module cannot use a minibatch of the user's own.

    Parameters
    ----------
    tensors
        Counts `(B, G)` and codes of batches `(B, 1)`, and what else there is, by name.
    module
        What it is for.
    source
        Name of the minibatch for messages.
    to_train
        Whether it needs all that the module trains on: covariates, and where labels are learned,
        these.

    Raises
    ------
    TypeError
        If it is no dictionary of tensors, or its counts are of another precision than the weights.
    KeyError
        If there are no counts or codes.
    ValueError
        If it is of other genes, or of batches, covariates or labels that there are not, or if there
        are negative counts, numbers that are NaN or infinite, or cells with no counts.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{source} must be a dictionary of tensors, got a {type(tensors).__name__}")
    x, batch = (_tensor(tensors, key, source) for key in _NEEDED)
    if to_train and x.layout != torch.strided:
        raise TypeError(f"{source} must have {_NEEDED[0]!r} as a dense tensor, got {x.layout}")
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
    if not len(x):
        raise ValueError(f"{source} must have cells, got none")
    _check_codes(batch, len(x), [module.n_batch], f"{source} must have {_NEEDED[1]!r}")
    _check_covariates(tensors, module, len(x), source, needed=to_train)
    if to_train:
        key = REGISTRY_KEYS.LABELS_KEY
        labels = _tensor(tensors, key, source)
        if hasattr(module, "y_prior"):  # the last code is that of cells whose labels are not known
            _check_codes(labels, len(x), [module.n_labels + 1], f"{source} must have {key!r}")
    if module.minified_data_type is None and x.layout == torch.strided:
        _check_values(x, module, source)


def _tensor(tensors: Mapping[str, Any], key: str, source: str) -> Tensor:
    if key not in tensors:
        raise KeyError(f"{source} must have {key!r}, got {[*tensors]}")
    tensor = tensors[key]
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{source} must hold tensors, got {key!r} of {type(tensor).__name__}")
    return tensor


def _check_codes(codes: Tensor, n_cells: int, n_categories: list[int], what: str) -> None:
    """Raise unless each column holds codes of its categories, of which there are so many."""
    shape = (n_cells, len(n_categories))
    if codes.shape != shape:
        raise ValueError(f"{what} of shape {shape}, got {tuple(codes.shape)}")
    for column, n in zip(codes.T, n_categories, strict=True):
        if not bool(((column >= 0) & (column < max(n, 1)) & (column == column.long())).all()):
            raise ValueError(
                f"{what} with whole numbers from 0 to {max(n, 1) - 1} as codes, got "
                f"{column.min().item():g} to {column.max().item():g}"
            )


def _check_covariates(
    tensors: Mapping[str, Any], module: VAE, n_cells: int, source: str, *, needed: bool
) -> None:
    """Raise if covariates are not those that the decoder takes."""
    layers = module.decoder.px_decoder
    n_continuous = layers.fc_layers[0][0].in_features - layers.n_cov - module.n_latent
    n_categories = [*layers.n_cat_list]
    if module.batch_representation == "embedding":
        n_continuous -= module.get_embedding(REGISTRY_KEYS.BATCH_KEY).embedding_dim
    else:
        n_categories = n_categories[1:]
    key = REGISTRY_KEYS.CONT_COVS_KEY
    if tensors.get(key) is not None or (needed and n_continuous):
        values = _tensor(tensors, key, source)
        if values.shape != (n_cells, n_continuous):
            raise ValueError(
                f"{source} must have {key!r} of shape ({n_cells}, {n_continuous}), got "
                f"{tuple(values.shape)}"
            )
        wrong = ~values.isfinite().all(dim=1)
        if bool(wrong.any()):
            first = torch.nonzero(wrong)[0].item()
            raise ValueError(f"{source} must have finite {key!r}: wrong is its row {first}")
    key = REGISTRY_KEYS.CAT_COVS_KEY
    if n_categories and (needed or tensors.get(key) is not None):
        codes = _tensor(tensors, key, source)
        _check_codes(codes, n_cells, n_categories, f"{source} must have {key!r}")


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
