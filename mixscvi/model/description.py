"""What a model's file says of the model: of the kinds that scvi-tools makes a model of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from scvi import REGISTRY_KEYS

__all__ = ["check_description"]

_PARTS = ("data_registry", "state_registry", "summary_stats")


def check_description(attributes: Mapping[str, Any], var_names: Any) -> None:
    """Raise if attributes and genes are not those of a model.

    Parameters
    ----------
    attributes
        Of the model: its registry and the arguments that made it.
    var_names
        Names of the genes.

    Raises
    ------
    KeyError
        If an entry is missing.
    TypeError, ValueError
        If one is of another kind, or a number is none that counts something.

    Examples
    --------
    >>> registry = {"model_name": "MixSCVI", "setup_args": {"batch_key": 3}, "field_registries": {}}
    >>> check_description({"registry_": registry, "init_params_": {}}, ["CD4"])
    Traceback (most recent call last):
        ...
    TypeError: registry_.setup_args.batch_key is no text, got 3
    """
    is_trained = attributes.get("is_trained_", False)
    if not isinstance(is_trained, bool):
        raise TypeError(f"is_trained_ is neither true nor false, got {is_trained!r:.40}")
    init = _dictionary(attributes, "init_params_")
    if "non_kwargs" in init:  # earlier versions of scvi-tools have the arguments themselves here
        _dictionary(init, "non_kwargs", "init_params_")
        for name in _dictionary(init, "kwargs", "init_params_"):
            _dictionary(init["kwargs"], name, "init_params_.kwargs")
    registry = _dictionary(attributes, "registry_")
    _check_text(registry["model_name"], "registry_.model_name")
    if registry.get("setup_method_name", "setup_anndata") == "setup_anndata":
        _check_setup(_dictionary(registry, "setup_args", "registry_"))
    for field, parts in _dictionary(registry, "field_registries", "registry_").items():
        where = f"registry_.field_registries.{field}"
        if not isinstance(parts, Mapping):
            raise TypeError(f"{where} is no dictionary")
        for part in _PARTS:
            _dictionary(parts, part, where)
        for name, value in parts["summary_stats"].items():
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{where}.summary_stats.{name} is no integer, got {value!r:.40}")
            if value < 0:
                raise ValueError(f"{where}.summary_stats.{name} is negative, got {value}")
    if var_names is None:
        return
    for i, gene in enumerate(var_names):
        _check_text(gene, f"var_names[{i}]")
    of_x = registry["field_registries"].get(REGISTRY_KEYS.X_KEY, {"summary_stats": {}})
    n_vars = of_x["summary_stats"].get("n_vars", len(var_names))
    if len(var_names) != n_vars:
        raise ValueError(f"var_names has {len(var_names)} genes, and the registry {n_vars}")
    registered = of_x.get("state_registry", {}).get("column_names")
    if registered is None:
        return
    for i, (gene, other) in enumerate(zip(var_names, registered, strict=True)):
        if gene != other:
            raise ValueError(f"var_names[{i}] is {gene!r}, and {str(other)!r:.40} in the registry")


def _dictionary(holder: Mapping[str, Any], name: str, where: str = "") -> Mapping[str, Any]:
    value = holder[name]
    if not isinstance(value, Mapping):
        raise TypeError(f"{where}.{name}".lstrip(".") + f" is no dictionary, got {value!r:.40}")
    return value


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{where} is no text, got {value!r:.40}")


def _check_setup(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        where = f"registry_.setup_args.{name}"
        if name.endswith("_keys") and value is not None:
            if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
                raise TypeError(f"{where} is no list, got {value!r:.40}")
            for i, key in enumerate(value):
                _check_text(key, f"{where}[{i}]")
        elif (name == "layer" or name.endswith("_key")) and value is not None:
            _check_text(value, where)
