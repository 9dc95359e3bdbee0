"""What a training is of: its data, model, options, seed and start, as texts to compare."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scvi
import torch
from scipy import sparse
from torch import Tensor

if TYPE_CHECKING:
    from scvi.data import AnnDataManager

__all__ = ["SEEDED_BELOW", "differences", "hash_of", "training_identity", "versions"]

SEEDED_BELOW = 2**32
"""Seeds that users set are smaller, as those that torch takes from the system are not."""

_CELLS_ON_DISK = 1_000
# Options that change nothing about the weights. max_epochs may grow.
_FREE = {
    "checkpoints", "datamodule", "default_root_dir", "enable_model_summary", "enable_progress_bar",
    "log_save_dir", "logger", "max_epochs", "progress_bar_refresh_rate", "simple_progress_bar",
}  # fmt: skip


def training_identity(model: Any, options: Mapping[str, Any], start: str | None) -> dict[str, str]:
    """What a training is of, by names that a user knows.

    Parameters
    ----------
    model
        The model, not yet trained by this training.
    options
        Arguments of ``train``.
    start
        Hash of the weights that the training starts from, or ``None`` if nobody set a seed: they
        are other ones in each process then.
    """
    identity = {"the starting weights": str(start)}
    if model.adata is not None:
        identity |= _of_data(model.adata_manager)
    identity |= dict(_flat(model.init_params_, "model"))
    if model.module is not None:
        trained = [name for name, p in model.module.named_parameters() if p.requires_grad]
        identity["trainable parameters"] = f"{len(trained)}, {hash_of(*trained)}"
    options = {**options, **options.get("trainer_kwargs", {})}
    options.pop("trainer_kwargs", None)
    for name, value in options.items():
        if name not in _FREE:
            identity |= dict(_flat(value, f"train({name}=)"))
    seed = torch.initial_seed()
    identity["scvi.settings.seed"] = str(scvi.settings.seed)
    identity["torch's seed"] = str(seed if seed < SEEDED_BELOW else None)
    before = max(map(len, (model.history_ or {}).values()), default=0) if model.is_trained_ else 0
    identity["epochs trained before"] = str(before)
    return identity


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What differs between two trainings, as texts.

    The starting weights follow from the seed, so they are named only if nothing else differs.

    Examples
    --------
    >>> differences({"train(batch_size=)": "128"}, {"train(batch_size=)": "64"})
    ['train(batch_size=) is 128 there and 64 here']
    """
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if len(names) > 1:
        names = [name for name in names if name != "the starting weights"]
    return [
        f"{name} is {there.get(name, 'not given')} there and {here.get(name, 'not given')} here"
        for name in names
    ]


def versions() -> dict[str, str]:
    """Versions of the packages that a training's numbers depend on."""
    return {name: version(name) for name in ("mixscvi", "scvi-tools", "lightning", "torch")}


def hash_of(*values: Any) -> str:
    """Hash of arrays, tensors, sparse matrices, tables and texts: eight bytes, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=8)
    for value in values:
        for part in _parts(value):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, pd.DataFrame | pd.Series | pd.Index):
        value = value.to_numpy()
    if sparse.issparse(value):
        value = value.tocsr()
        yield np.array(value.shape)
        yield from (value.data, value.indices, value.indptr)
        return
    value = np.asarray(value)
    if value.dtype.kind not in "biufcmM":
        text = "\0".join(map(str, value.ravel().tolist()))
        value = np.frombuffer(text.encode(), dtype=np.uint8)
    yield value.reshape(1) if value.ndim == 0 else value


def _of_data(manager: AnnDataManager) -> dict[str, str]:
    """Hash of each registered field; of data that are not in memory, of some of the cells."""
    adata = manager.adata
    identity = {
        "data: cells": f"{adata.n_obs}, {hash_of(adata.obs_names)}",
        "data: genes": f"{adata.n_vars}, {hash_of(adata.var_names)}",
    }
    for key in manager.data_registry:
        field = manager.get_from_registry(key)
        if not (sparse.issparse(field) or isinstance(field, np.ndarray | pd.DataFrame)):
            n = adata.n_obs
            field = field[np.linspace(0, n - 1, min(n, _CELLS_ON_DISK), dtype=int)]
        identity[f"data: {key}"] = hash_of(field)
    return identity


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Names and texts of nested values; of objects, their types."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            inner = name if key in ("kwargs", "non_kwargs") else f"{name}[{key!r}]"
            yield from _flat(item, inner)
    elif isinstance(value, list | tuple):
        yield f"{name} length", str(len(value))
        for i, item in enumerate(value):
            yield from _flat(item, f"{name}[{i}]")
    elif isinstance(value, np.ndarray | Tensor):
        yield name, f"an array of shape {tuple(value.shape)}, {hash_of(value)}"
    elif value is None or isinstance(value, bool | int | float | str | np.generic):
        yield name, repr(value.item() if isinstance(value, np.generic) else value)
    elif callable(value) and hasattr(value, "__qualname__"):
        yield name, value.__qualname__
    else:
        yield name, f"a {type(value).__qualname__}"
