"""Checks of single arguments."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
from anndata import AnnData

__all__ = [
    "check_anndata",
    "check_batches",
    "check_boolean",
    "check_choice",
    "check_indices",
    "check_library_size",
    "check_loader",
    "check_mapping",
    "check_number",
    "check_path",
    "check_positive_int",
    "check_text",
]


def check_positive_int(name: str, value: Any, *, least: int = 1) -> int:
    """Return `value` as an int.

    Raises
    ------
    TypeError
        If it is not an integer.
    ValueError
        If it is less than `least`.

    Examples
    --------
    >>> check_positive_int("n_components", 4)
    4
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def check_number(
    name: str, value: Any, *, least: float = -np.inf, most: float = np.inf, above: float = -np.inf
) -> None:
    """Raise if `value` is no number from `least` to `most` and above `above`.

    Raises
    ------
    TypeError
        If it is no number.
    ValueError
        If it is NaN, infinite, or out of range.

    Examples
    --------
    >>> check_number("delta", 0.25, least=0)
    >>> check_number("fdr_target", 5, least=0, most=1)
    Traceback (most recent call last):
    ...
    ValueError: fdr_target must be a finite number from 0 to 1, got 5
    """
    expected = "a finite number"
    if most < np.inf:
        expected += f" from {least:g} to {most:g}"
    elif least > -np.inf:
        expected += f" of at least {least:g}"
    elif above > -np.inf:
        expected += f" above {above:g}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    if not (np.isfinite(value) and least <= value <= most and value > above):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_boolean(name: str, value: Any) -> None:
    """Raise if `value` is neither true nor false: a text would be true, whatever it says.

    Raises
    ------
    TypeError
        If it is something else, zero and one aside.

    Examples
    --------
    >>> check_boolean("early_stopping", True)
    >>> check_boolean("early_stopping", "no")
    Traceback (most recent call last):
    ...
    TypeError: early_stopping must be True or False, got 'no'
    """
    if not (isinstance(value, (bool, np.bool_)) or (isinstance(value, int) and value in (0, 1))):
        raise TypeError(f"{name} must be True or False, got {value!r:.60}")


def check_text(name: str, value: Any) -> None:
    """Raise if `value` is no text.

    Raises
    ------
    TypeError
        If it is something else.

    Examples
    --------
    >>> check_text("prefix", "first_")
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {value!r:.60}")


def check_mapping(name: str, value: Any) -> None:
    """Raise if `value` is no dictionary of arguments.

    Raises
    ------
    TypeError
        If it is something else.

    Examples
    --------
    >>> check_mapping("plan_kwargs", {"lr": 0.1})
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dictionary of arguments, got {value!r:.60}")


def check_function(name: str, value: Any) -> None:
    """Raise if `value` cannot be called.

    Raises
    ------
    TypeError
        If it is something else.

    Examples
    --------
    >>> check_function("collate_fn", max)
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r:.60}")


def check_path(name: str, value: Any) -> None:
    """Raise if `value` is no path.

    Raises
    ------
    TypeError
        If it is neither a text nor an object that stands for a path.
    ValueError
        If it is empty, or has a null character.

    Examples
    --------
    >>> check_path("dir_path", "models/first")
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {value!r:.60}")
    if value == "":
        raise ValueError(f"{name} must be a path, got '': the working directory is '.'")
    if "\0" in str(value):
        raise ValueError(f"{name} must be a path, got {value!r:.60}, which has a null character")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return `value`, which must be one of `choices`.

    Raises
    ------
    ValueError
        If it is not.

    Examples
    --------
    >>> check_choice("prior", "mog", ("normal", "mog"))
    'mog'
    """
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {expected}, got {value!r}")
    return value


def check_indices(indices: Any, n_obs: int, *, name: str = "indices") -> np.ndarray:
    """Return the positions of cells that are chosen by position, or by a mask.

    Raises
    ------
    TypeError
        If they are names or other values than integers and booleans, or no sequence.
    ValueError
        If there are none.
    IndexError
        If one is out of range, or a mask is of another length.

    Examples
    --------
    >>> check_indices([True, False, True], n_obs=3)
    array([0, 2])
    >>> check_indices(["AAC"], n_obs=6)
    Traceback (most recent call last):
    ...
    TypeError: indices must be positions of cells or a mask, got 'AAC' first: take
    adata.obs_names.get_indexer(names)
    """
    try:
        given = np.asarray(indices)  # which makes one text or slice an array without an axis
    except ValueError:  # sequences of several lengths
        given = np.empty((0, 0))
    if given.ndim != 1:
        raise TypeError(
            f"{name} must be one sequence of positions of cells or a mask, got {indices!r:.60}"
        )
    if given.size == 0 or (given.dtype.kind == "b" and not given.any()):
        raise ValueError(f"{name} must choose at least one cell, got none")
    if given.dtype.kind not in "biu":
        raise TypeError(
            f"{name} must be positions of cells or a mask, got {given.tolist()[0]!r} first: take "
            "adata.obs_names.get_indexer(names)"
        )
    if given.dtype.kind == "b":
        if given.shape != (n_obs,):
            raise IndexError(f"{name} as a mask must be of the {n_obs} cells, got {given.shape}")
        return np.flatnonzero(given)
    outside = given[(given < -n_obs) | (given >= n_obs)]
    if outside.size:
        raise IndexError(f"{name} must be below the {n_obs} cells, got {outside[0]}")
    return given


def check_library_size(value: Any) -> None:
    """Raise if expression cannot be scaled to a library size.

    Raises
    ------
    TypeError
        If it is neither ``"latent"`` nor a number.
    ValueError
        If it is not above zero and finite.

    Examples
    --------
    >>> check_library_size(1e4)
    >>> check_library_size("latent")
    """
    if isinstance(value, str) and value == "latent":
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"library_size must be 'latent' or a number, got {value!r}")
    if not 0 < value < np.inf:
        raise ValueError(f"library_size must be 'latent' or above zero, got {value!r}")


def check_anndata(adata: Any) -> None:
    """Raise if there are no cells; collections of files pass for an AnnData.

    Raises
    ------
    TypeError
        If it is no AnnData.
    ValueError
        If it is of no cells.

    Examples
    --------
    >>> check_anndata(AnnData(np.ones((2, 3))))
    """
    if not isinstance(adata, AnnData):
        raise TypeError(f"adata must be an AnnData, got {type(adata).__name__}")
    if not adata.n_obs:
        raise ValueError(f"adata must have cells, got shape {adata.shape}")


def check_loader(dataloader: Any) -> None:
    """Raise if minibatches of the user's own are none.

    Raises
    ------
    TypeError
        If they cannot be iterated over.
    ValueError
        If there are none.

    Examples
    --------
    >>> check_loader([{"X": [[1.0]]}])
    """
    if dataloader is None:
        return
    if isinstance(dataloader, str) or not isinstance(dataloader, Iterable):
        raise TypeError(f"dataloader must give minibatches, got {dataloader!r:.60}")
    if isinstance(dataloader, Sized) and not len(dataloader):
        raise ValueError("dataloader must give minibatches, got none")


def check_batches(
    transform_batch: Any, known: Sequence[Any], *, name: str = "transform_batch"
) -> None:
    """Raise if cells cannot be decoded as of these batches.

    Raises
    ------
    ValueError
        If there are none, or one is none of the batches that the model was trained on.

    Examples
    --------
    >>> check_batches("STIM", ["CTRL", "STIM"])
    >>> check_batches(["STIM", "new"], ["CTRL", "STIM"])
    Traceback (most recent call last):
    ...
    ValueError: transform_batch must be of the model's batches, 'CTRL', 'STIM', got 'new'
    """
    if isinstance(transform_batch, str) or not isinstance(transform_batch, Iterable):
        transform_batch = [transform_batch]
    given = list(transform_batch)
    wrong = [batch for batch in given if batch is not None and batch not in known]
    if wrong or not given:
        expected = ", ".join(repr(batch) for batch in known[:5]) + ", ..." * (len(known) > 5)
        got = repr(wrong[0]) if wrong else "none"
        raise ValueError(f"{name} must be of the model's batches, {expected}, got {got}")
