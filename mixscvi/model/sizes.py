"""Sizes that a model's file claims, held against the weights that it has.

The images' runs are looked at on their own, by the sizes of their configuration: the two have no
name in common, and what they share is one comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from scvi import REGISTRY_KEYS
from torch import Tensor

__all__ = ["check_sizes"]

# Fields of a registry that layers have inputs or outputs for, and the names of their numbers.
_SIZES_OF_FIELDS = {
    REGISTRY_KEYS.X_KEY: "n_vars",
    REGISTRY_KEYS.BATCH_KEY: "n_batch",
    REGISTRY_KEYS.LABELS_KEY: "n_labels",
    REGISTRY_KEYS.CONT_COVS_KEY: "n_extra_continuous_covs",
}
# Of these, there are tensors for each.
_LAYERS = ("n_layers", "n_flow_steps")


def check_sizes(weights: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> None:
    """Raise if a model is described as larger than its weights.

    Making it would take all memory there is, before its weights were found not to fit.

    Parameters
    ----------
    weights
        Of the module, by name.
    attributes
        Of the model: its registry and the arguments that made it, as plain values or what they
        stand for.

    Raises
    ------
    ValueError
        Naming the size, its value, and how many weights there are.

    Examples
    --------
    >>> import torch
    >>> attributes = {"registry_": {}, "init_params_": {"non_kwargs": {"n_hidden": 10**9}}}
    >>> check_sizes({"weight": torch.ones(5, 7)}, attributes)
    Traceback (most recent call last):
        ...
    ValueError: it describes a model of n_hidden=1000000000, but has 35 weights
    """
    if not all(isinstance(attributes[name], Mapping) for name in ("init_params_", "registry_")):
        return  # which others say
    tensors = [value for value in weights.values() if isinstance(value, Tensor)]
    n_weights = sum(value.numel() for value in tensors)
    for name, value in _integers(attributes["init_params_"]):
        if value > (len(tensors) if name in _LAYERS else n_weights):
            _refuse({name: value}, n_weights)
    given = attributes["init_params_"].get("non_kwargs", {})
    sizes = {name: value for name, value in given.items() if isinstance(value, int)}
    fields = attributes["registry_"].get("field_registries", {})
    for field, name in _SIZES_OF_FIELDS.items():
        value = fields.get(field, {}).get("summary_stats", {}).get(name)
        if isinstance(value, int):
            if value > n_weights:
                _refuse({name: value}, n_weights)
            sizes[name] = value
    categories = fields.get(REGISTRY_KEYS.CAT_COVS_KEY, {}).get("state_registry", {})
    for _, value in _integers(categories.get("n_cats_per_key")):
        if value > n_weights:
            _refuse({"n_cats_per_key": value}, n_weights)

    matrices: list[tuple[str, ...]] = [("n_hidden", "n_latent"), ("n_hidden", "n_vars")]
    if sizes.get("n_layers", 1) > 1:
        matrices.append(("n_hidden", "n_hidden"))
    further = attributes["init_params_"].get("kwargs", {}).get("kwargs", {})
    if sizes.get("n_batch", 1) > 1 and further.get("batch_representation") != "embedding":
        matrices.append(("n_hidden", "n_batch"))
    for dispersion, name in (("gene-batch", "n_batch"), ("gene-label", "n_labels")):
        if given.get("dispersion") == dispersion:
            matrices.append((name, "n_vars"))
    if given.get("prior") == "mog":
        matrices.append(("n_prior_components", "n_latent"))
    if given.get("component_encoder") == "separate":
        matrices.append(("n_components", "n_hidden", "n_vars"))
    for names in matrices:
        if all(name in sizes for name in names):
            if math.prod(sizes[name] for name in names) > n_weights:
                _refuse({name: sizes[name] for name in names}, n_weights)


def _integers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Names and values of integers in nested dictionaries and lists."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _integers(item, str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _integers(item, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def _refuse(sizes: Mapping[str, int], n_weights: int) -> None:
    described = ", ".join(f"{name}={value}" for name, value in sizes.items())
    raise ValueError(f"it describes a model of {described}, but has {n_weights} weights")
