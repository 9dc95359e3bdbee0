"""What of a model trains on a query, once it is mapped to a reference (scArches)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from scvi import REGISTRY_KEYS
from scvi.model.base import _archesmixin
from torch import Tensor

from mixscvi.checks import check_boolean
from mixscvi.mixture import VampPrior

if TYPE_CHECKING:
    from scvi.module import VAE

__all__ = ["describe", "freeze", "n_columns"]

_EMBEDDINGS = "_embeddings_dict."
_BY_SCVI = _archesmixin._set_params_online_update


def n_columns(registry: Mapping[str, Any]) -> list[int]:
    """Columns that each covariate takes as networks' input: none if it has one category."""
    fields = registry["field_registries"]
    n_batch = fields[REGISTRY_KEYS.BATCH_KEY]["summary_stats"]["n_batch"]
    covariates = fields.get(REGISTRY_KEYS.CAT_COVS_KEY, {}).get("state_registry", {})
    n_categories = [n_batch, *covariates.get("n_cats_per_key", [])]
    return [n if n > 1 else 0 for n in n_categories]


def describe(
    flags: Mapping[str, Any], known: list[int], reference: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What :func:`freeze` freezes, in a form that a file can hold.

    Parameters
    ----------
    flags
        All arguments of ``load_query_data``, by name.
    known
        :func:`n_columns` of the reference.
    reference
        The weights of the reference.
    """
    of_scvi = [name for name in inspect.signature(_BY_SCVI).parameters if name != "module"]
    return {
        "flags": {name: flags[name] for name in of_scvi},
        "known": known,
        "embeddings": {
            name: len(value) for name, value in reference.items() if name.startswith(_EMBEDDINGS)
        },
    }


def freeze(module: VAE, surgery: Mapping[str, Any], new: list[int], *, by_scvi: bool) -> None:
    """Freeze what does not train on a query.

    Parameters
    ----------
    module
        Of the query's model.
    surgery
        What :func:`describe` made.
    new
        :func:`n_columns` of the query.
    by_scvi
        Whether scvi-tools' own part is to be done as well.
    """
    flags = surgery["flags"]
    for name, value in flags.items():
        check_boolean(name, value)
    known = surgery["known"]
    for n_known, n_new in zip(known, new, strict=True):
        _check_number("known", n_known, n_new)
    if by_scvi:
        _BY_SCVI(module, **flags)
    if flags["unfrozen"]:
        return
    expression = flags["freeze_expression"]
    module.train_covariates_only(freeze_expression=expression)
    if isinstance(module.prior, VampPrior) and expression:
        _freeze_known_covariates(module, known, new)
    _train_new_embeddings(module, surgery["embeddings"])


def _check_number(name: str, value: Any, most: int) -> None:
    """Raise if a file has no number of categories of the reference, or more than there are."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} must be a number of categories up to {most}, got {value!r:.40}")


def _freeze_known_covariates(module: VAE, known: list[int], new: list[int]) -> None:
    """Keep the encoder's weights of the reference's categories.

    A VampPrior's pseudo-cells are of these, so they would train, with no cell of the query in
    them, and the latents of the reference would move.
    """
    if module.batch_representation == "embedding":
        known, new = known[1:], new[1:]
    trains = torch.ones(sum(new), dtype=torch.bool)
    start = 0
    for n_known, n_new in zip(known, new, strict=True):
        trains[start : start + max(n_known, min(n_new, 1))] = False
        start += n_new

    def freeze(gradient: Tensor) -> Tensor:
        keep = torch.ones(gradient.shape[-1], dtype=torch.bool, device=gradient.device)
        keep[len(keep) - len(trains) :] = trains
        return gradient * keep

    for parameter in module.z_encoder.parameters():
        if parameter.requires_grad and parameter.shape[-1] > len(trains) > 0:
            parameter.register_hook(freeze)


def _train_new_embeddings(module: VAE, n_known: Mapping[str, int]) -> None:
    """Train the embeddings of batches that are new, and those alone.

    scvi-tools 1.4 leaves them as they were drawn, and 1.5 trains those of the reference as well.
    """
    for name, parameter in module.named_parameters():
        if name.startswith(_EMBEDDINGS):
            _check_number(name, n_known[name], len(parameter))
            parameter.requires_grad = True
            parameter.register_hook(
                lambda gradient, n=n_known[name]: torch.cat(
                    (torch.zeros_like(gradient[:n]), gradient[n:])
                )
            )
