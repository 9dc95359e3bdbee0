"""The file of a model: read without running anything of it, and replaced in one step.

It is scvi-tools' ``model.pt``, with the same entries at the same places, so scvi-tools reads its
registry and its weights too. But what stands in it are plain values (:mod:`mixscvi.model.plain`)
and tensors, and one more entry says what they were.
"""

from __future__ import annotations

import glob
import logging
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixscvi.checkpoint_file import (
    NOT_MADE,
    UNPICKLED,
    UNREADABLE,
    brief,
    check_tensors,
    damaged_record,
)
from mixscvi.checks import check_boolean, check_mapping, check_path, check_text
from mixscvi.model.description import check_description
from mixscvi.model.plain import from_plain, to_plain
from mixscvi.model.sizes import check_sizes

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "StoredModel",
    "data_file",
    "put_in_place",
    "read_contents",
    "read_model",
    "staged",
    "write_model",
]

_FORMAT = 1
_MODEL, _DATA = "model.pt", "adata.h5ad"
_COMPLETE = "complete"
_WEIGHTS, _GENES, _ATTRIBUTES, _OWN = "model_state_dict", "var_names", "attr_dict", "mixscvi"
# What scvi-tools stores beside the attributes that end in "_", of a model of a data module.
_OF_DATAMODULES = {
    "n_batch", "n_extra_categorical_covs", "n_extra_continuous_covs", "n_labels", "n_sample",
    "n_vars", "batch_labels", "label_keys",
}  # fmt: skip
_DOWNLOADS = logging.getLogger("scvi.data._download")
_SETUP_METHODS = ("setup_anndata", "setup_datamodule")


def _silent(record: logging.LogRecord) -> bool:
    return False


class StoredModel(NamedTuple):
    """Contents of a model's file."""

    path: Path
    """The file."""
    state_dict: dict[str, Tensor]
    """Parameters and buffers of the module."""
    var_names: Any
    """Names of the genes."""
    attributes: dict[str, Any]
    """Attributes of the model, with its registry and the arguments that made it."""
    data_id: str | None
    """What names the data that were saved with it until they are in their place."""
    left_out: dict[str, str]
    """Arguments of the model that the file cannot hold, and of what type they were or held one."""

    def give(self, arguments: dict[str, Any]) -> None:
        """Put the user's arguments into the place of those that were left out.

        Raises
        ------
        TypeError
            If they are no dictionary.
        ValueError
            If one is missing, or is not among them.
        """
        check_mapping("arguments", arguments)
        surplus = [name for name in arguments if name not in self.left_out]
        if surplus:
            raise ValueError(
                f"arguments must be among those that {self.path} leaves out, "
                f"{[*self.left_out]}, got {surplus}"
            )
        for name, kind in self.left_out.items():
            if name not in arguments:
                raise ValueError(
                    f"{self.path} leaves out the argument {name!r}, which was or held a {kind}: a "
                    f"file holds no objects. Give it: arguments={{{name!r}: ...}}"
                )
            init = self.attributes["init_params_"]
            for group in (init["non_kwargs"], *init["kwargs"].values()):
                if name in group:
                    group[name] = arguments[name]

    @contextmanager
    def as_written_by_scvi(self, prefix: str | None = None) -> Iterator[str]:
        """A folder with the model as scvi-tools writes it, for scvi-tools' own loaders.

        They unpickle: what they are given is written here, and not what somebody sent.
        """
        with tempfile.TemporaryDirectory() as folder:
            contents = {
                _WEIGHTS: self.state_dict,
                _GENES: self.var_names,
                _ATTRIBUTES: self.attributes,
            }
            torch.save(contents, Path(folder) / f"{prefix or ''}{_MODEL}")
            # It would report that it found the file, by a name that means nothing to the user.
            _DOWNLOADS.addFilter(_silent)
            try:
                yield folder
            finally:
                _DOWNLOADS.removeFilter(_silent)


def read_model(
    folder: str | os.PathLike[str], prefix: str | None = None, *, allow_pickle: bool = False
) -> StoredModel:
    """Read the file of a model.

    Parameters
    ----------
    folder, prefix
        Where it is, and what the names of its files start with.
    allow_pickle
        Whether the file may hold Python objects, which can run any code when they are read.

    Raises
    ------
    TypeError
        If `allow_pickle` is neither true nor false, or another argument is none.
    ValueError
        If there is no such file, it is truncated or damaged, is not that of a model, or holds
        Python objects that are not allowed.
    """
    check_path("dir_path", folder)
    if prefix is not None:
        check_text("prefix", prefix)
    check_boolean("allow_pickle", allow_pickle)
    path = Path(folder) / f"{prefix or ''}{_MODEL}"
    if not path.is_file():
        raise ValueError(f"Failed to load model file at {path}: there is none")
    stored = read_contents(path, allow_pickle=allow_pickle)
    try:
        own = stored.get(_OWN, {"format": _FORMAT, "notes": [], "data_id": None})
        later = own["format"] > _FORMAT
        left_out = {}
        if not later:
            check_sizes(stored[_WEIGHTS], stored[_ATTRIBUTES])
            left_out = {_argument_of(at): kind for at, kind in from_plain(stored, own["notes"])}
        model = StoredModel(
            path, stored[_WEIGHTS], stored[_GENES], stored[_ATTRIBUTES], own["data_id"], left_out
        )
        _check(model)
    except NOT_MADE as e:
        raise ValueError(
            f"{path} is not the file of a model, or was tampered with ({type(e).__name__}: {e})"
        ) from e
    if later:
        raise ValueError(f"{path} was written by a later version of mixscvi: update mixscvi")
    return model


def read_contents(path: Path, *, allow_pickle: bool) -> Any:
    """What torch wrote into a file.

    Parameters
    ----------
    path
        The file.
    allow_pickle
        As in :func:`read_model`.

    Raises
    ------
    ValueError
        If it is truncated, damaged, or holds Python objects that are not allowed.
    """
    try:
        damaged = damaged_record(path)
    except UNREADABLE as error:
        if allow_pickle:  # as torch wrote files before they were archives
            damaged = None
        else:
            raise ValueError(
                f"{path} is truncated, or not the file of a model ({error}): save it again, or "
                "fetch it again"
            ) from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged at its record {damaged!r}: save or fetch it again")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        check_tensors(values, path.stat().st_size)
        return values
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            found = re.search(r"GLOBAL\s+([\w.]+)", str(error))
            what = f", first {found[1]}" if found else ""
            raise ValueError(
                f"{path} holds Python objects{what}, and reading them can run any code. It was "
                "written by scvi-tools or an early version of mixscvi, or made to do harm. If you "
                "trust whoever made it, load it with allow_pickle=True, and save it anew"
            ) from error
    except UNREADABLE as error:
        raise ValueError(
            f"{path} is damaged ({str(error).splitlines()[0] if str(error) else 'empty'}): save or "
            "fetch it again"
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except UNPICKLED as error:
        raise ValueError(
            f"{path} is damaged, or holds objects of packages that are not here ({brief(error)}): "
            "save or fetch it again"
        ) from error


def _check(model: StoredModel) -> None:
    """Raise if the contents of a file do not describe a model, or name what none stores."""
    for name, value in model.state_dict.items():
        # scvi-tools adds the parameters of Pyro, which is not used here.
        if not isinstance(value, Tensor) and name != "pyro_param_store":
            raise TypeError(f"{name} is no tensor")
    for name in model.attributes:
        if name.startswith("_") or not (name.endswith("_") or name in _OF_DATAMODULES):
            raise KeyError(f"attribute {name}")
    check_description(model.attributes, model.var_names)
    if not isinstance(model.data_id, str | None):
        raise TypeError("data_id is no text")
    # scvi-tools calls the method of this name with arguments out of the file.
    method = model.attributes["registry_"].get("setup_method_name", "setup_anndata")
    if method not in _SETUP_METHODS:
        raise ValueError(f"the setup method must be one of {_SETUP_METHODS}, got {method!r}")


def _may_leave_out(path: list) -> bool:
    return path[:2] == [_ATTRIBUTES, "init_params_"] and len(path) > 3


def _argument_of(path: list) -> str:
    """The argument of the model that a path leads to."""
    return path[3] if path[2] == "non_kwargs" else path[4]


def write_model(
    written_by_scvi: Path,
    path: Path,
    *,
    data_id: str | None,
    var_names: Any = None,
    model_name: str | None = None,
    **save_kwargs: Any,
) -> None:
    """Write a model's file from that of scvi-tools.

    Parameters
    ----------
    written_by_scvi
        The file as scvi-tools just wrote it, in a folder of ours.
    path
        The new one.
    data_id
        What names the data that are saved with it.
    var_names
        Names of the genes; by default those that scvi-tools wrote.
    model_name
        Class of the model; by default the one that scvi-tools wrote.
    **save_kwargs
        Passed to :func:`torch.save`.

    Raises
    ------
    TypeError
        If an attribute of the model, or a category of its data, is an object that no file holds.
    """
    contents = torch.load(written_by_scvi, map_location="cpu", weights_only=False)
    contents[_WEIGHTS].pop("pyro_param_store", None)
    if var_names is not None:
        contents[_GENES] = var_names
    if model_name is not None:
        contents[_ATTRIBUTES]["registry_"]["model_name"] = model_name
    plain, notes = to_plain(
        {_GENES: contents[_GENES], _ATTRIBUTES: contents[_ATTRIBUTES]}, _may_leave_out
    )
    own = {"format": _FORMAT, "notes": notes, "data_id": data_id}
    torch.save({_WEIGHTS: contents[_WEIGHTS], **plain, _OWN: own}, path, **save_kwargs)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder beside another to write in, which a later one clears if this process is killed.

    Parameters
    ----------
    target
        The folder that the files are for.

    Yields
    ------
    The folder; complete files go into a folder ``complete`` in it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    start = _staging_start(target)
    for left in target.parent.glob(f"{glob.escape(start)}*"):
        with _locked(left, wait=False) as free:
            if free:
                _settle(left, target)
    while True:
        staging = Path(tempfile.mkdtemp(prefix=start, dir=target.parent))
        with _locked(staging, wait=True):
            if not staging.exists():  # another process took it for one that was left
                continue
            try:
                yield staging
            finally:
                _settle(staging, target)
            return


def _settle(staging: Path, target: Path) -> None:
    """Finish what was interrupted while a model and its data were put in place; clear the rest."""
    for data in (staging / _COMPLETE).glob(f"*{_DATA}"):
        model = target / f"{data.name.removesuffix(_DATA)}{_MODEL}"
        if model.is_file() and _data_id(model) == staging.name:
            data.replace(target / data.name)
    shutil.rmtree(staging)


def _data_id(path: Path) -> str | None:
    """What names the data of a saved model; of one that cannot be read, nothing."""
    try:
        return read_contents(path, allow_pickle=False)[_OWN]["data_id"]
    except (KeyError, TypeError, ValueError):
        return None


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a folder, which goes with the process; whether it was to be had.

    Where folders have no locks, it always is: two processes must not save to one place there.
    """
    if fcntl is None:
        yield True
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # another process has cleared it
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        free = True
    except BlockingIOError:
        free = False
    try:
        yield free
    finally:
        os.close(descriptor)


def put_in_place(staging: Path, target: Path, prefix: str | None) -> None:
    """Move complete files to their place, so that at any moment a whole model is there.

    The model is replaced in one step. Its data come after it: until they are in their place,
    :func:`data_file` finds them where they were written.

    Parameters
    ----------
    staging
        Of :func:`staged`, whose folder ``complete`` has the files.
    target
        The place: a new folder, or one with files that they replace.
    prefix
        What their names start with.
    """
    complete = staging / _COMPLETE
    if not target.exists():
        try:
            complete.rename(target)
            return
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    for name in (f"{prefix or ''}{_MODEL}", f"{prefix or ''}{_DATA}"):
        if (complete / name).exists():
            (complete / name).replace(target / name)


def data_file(model: StoredModel, prefix: str | None) -> Path:
    """The data that were saved with a model; there may be none."""
    name = f"{prefix or ''}{_DATA}"
    folder = Path(os.path.abspath(model.path.parent))
    if model.data_id is not None and model.data_id.startswith(_staging_start(folder)):
        waiting = folder.parent / Path(model.data_id).name / _COMPLETE / name
        if waiting.is_file():
            return waiting
    return folder / name


def _staging_start(target: Path) -> str:
    return f".{target.name}.saving-"
