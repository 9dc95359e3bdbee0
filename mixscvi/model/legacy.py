"""Models saved before scvi-tools 0.15: three files, of which one is of Python objects."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mixscvi.checkpoint_file import NOT_MADE, UNPICKLED, brief
from mixscvi.model.files import read_contents

__all__ = ["LegacyModel", "read_legacy"]

_WEIGHTS, _GENES, _ATTRIBUTES = "model_params.pt", "var_names.csv", "attr.pkl"


class LegacyModel(NamedTuple):
    """What the three files hold."""

    folder: Path
    """Where they are."""
    prefix: str
    """What their names start with."""
    state_dict: dict[str, Tensor]
    """Parameters and buffers of the module."""
    var_names: np.ndarray
    """Names of the genes."""
    attributes: dict[str, Any]
    """Attributes of the model, with the setup of its data."""

    @contextmanager
    def describing(self) -> Iterator[None]:
        """Name the files where no model can be made of what they hold."""
        try:
            yield
        except NOT_MADE as error:
            cause = error.__cause__ or error  # errors of ours name the file that is being written
            raise ValueError(
                f"{self.folder / (self.prefix + _ATTRIBUTES)} is damaged, or does not belong to "
                f"{self.prefix}{_WEIGHTS} and {self.prefix}{_GENES} beside it: there is no such "
                f"model ({brief(cause)})"
            ) from error

    def write(self, folder: Path) -> None:
        """Write the files anew, for scvi-tools, which reads them without looking.

        It would take a ``,`` or ``#`` for the end of a name, so genes are numbers there.
        """
        folder.mkdir()
        torch.save(self.state_dict, folder / (self.prefix + _WEIGHTS))
        np.savetxt(folder / (self.prefix + _GENES), np.arange(len(self.var_names)), fmt="%d")
        (folder / (self.prefix + _ATTRIBUTES)).write_bytes(pickle.dumps(self.attributes))


def read_legacy(
    folder: str | os.PathLike[str], prefix: str | None = None, *, allow_pickle: bool = False
) -> LegacyModel:
    """Read the files of a model that was saved before scvi-tools 0.15.

    Parameters
    ----------
    folder, prefix
        Where they are, and what their names start with.
    allow_pickle
        Must be ``True``.

    Raises
    ------
    FileNotFoundError
        If one is missing.
    ValueError
        If `allow_pickle` is false, or one is truncated, damaged, or none of such a model.
    """
    weights, genes, attributes = (
        Path(folder) / f"{prefix or ''}{name}" for name in (_WEIGHTS, _GENES, _ATTRIBUTES)
    )
    for path in (weights, genes, attributes):
        if not path.is_file():
            raise FileNotFoundError(f"{path}, of a model saved before scvi-tools 0.15, is missing")
    if not allow_pickle:
        raise ValueError(
            f"{attributes} holds Python objects, and reading them can run any code: if you trust "
            "whoever made it, say allow_pickle=True"
        )
    return LegacyModel(
        Path(folder),
        prefix or "",
        _read_weights(weights),
        _read_genes(genes),
        _read_attributes(attributes),
    )


def _read_weights(path: Path) -> dict[str, Tensor]:
    weights = read_contents(path, allow_pickle=True)
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"{path} must hold the weights of a model by name, and holds other values")
    return weights


def _read_genes(path: Path) -> np.ndarray:
    try:
        *genes, rest = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is no text ({error})") from error
    if rest or not genes:
        raise ValueError(f"{path} is truncated: its last line, {rest!r:.60}, has no end")
    if not all(genes):
        raise ValueError(f"{path} must have the name of a gene in each line, got an empty one")
    return np.array(genes)


def _read_attributes(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            attributes = pd.read_pickle(file)  # which knows tables of earlier versions
    except UNPICKLED as error:
        raise ValueError(
            f"{path} is truncated or damaged, or holds objects of packages that are not here "
            f"({brief(error)}): fetch it again"
        ) from error
    if not isinstance(attributes, dict) or "init_params_" not in attributes:
        raise ValueError(f"{path} holds no attributes of a model: its init_params_ are missing")
    if not {"scvi_setup_dict_", "registry_"} & attributes.keys():
        raise ValueError(f"{path} does not say how the data were set up")
    return attributes
