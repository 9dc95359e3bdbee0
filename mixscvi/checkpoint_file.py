"""Files of checkpoints, read without running what they hold; what damages archives of torch."""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "NOT_MADE",
    "OfAnotherTrainingError",
    "UNPICKLED",
    "UNREADABLE",
    "brief",
    "check_counted",
    "check_restored_paths",
    "check_stopping",
    "check_tensors",
    "damaged_record",
    "naming_what_is_not_restored",
    "read_checkpoint",
]

_REMEMBERED = ("best_model_path", "kth_best_model_path", "last_model_path")

# What the makers of a model, or of a state of its training, raise where it cannot be made as it is
# described.
NOT_MADE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class OfAnotherTrainingError(ValueError):
    """A checkpoint is good, and of a training of other cells or options.

    Examples
    --------
    >>> issubclass(OfAnotherTrainingError, ValueError)
    True
    """


# What damaged bytes make the readers of archives, and torch in them, raise.
UNREADABLE = (
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)

# What the reading of Python objects raises of damaged bytes, and of objects of other packages.
UNPICKLED = (
    *UNREADABLE,
    AttributeError,
    ImportError,
    MemoryError,
    pickle.UnpicklingError,
)


def damaged_record(path: Path) -> str | None:
    """Name of the first damaged record of an archive, or ``None`` if all are whole.

    torch reads over damaged bytes; the archive has a checksum of each of its records. What is no
    archive raises one of ``UNREADABLE``. torch compresses nothing: a record that would be larger
    than the file is damaged too, and is not unpacked.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.file_size > size:
                return record.filename
        return archive.testzip()


def check_tensors(values: Any, n_bytes: int) -> None:
    """Raise if tensors among nested values have more numbers than a file has bytes for.

    A file can describe such tensors in a few bytes; whoever computes with them runs out of memory,
    or reads what is beside them there.

    Parameters
    ----------
    values
        What was read.
    n_bytes
        Size of the file.

    Raises
    ------
    ValueError
        Naming the tensor and its shape.

    Examples
    --------
    >>> check_tensors({"weights": torch.ones(2, 3)}, 1_000)
    >>> check_tensors({"weights": torch.ones(1).expand(10**6, 10**6)}, 1_000)
    Traceback (most recent call last):
        ...
    ValueError: weights claims the shape (1000000, 1000000), more than the file holds
    """
    stored: dict[int, int] = {}
    for name, value in _tensors(values, ""):
        if value.layout != torch.strided or value.is_quantized or value.is_nested:
            raise ValueError(f"{name} is no dense tensor of numbers")
        storage = value.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        if value.numel() * value.element_size() > storage.nbytes() or (
            sum(stored.values()) > n_bytes
        ):
            raise ValueError(
                f"{name} claims the shape {tuple(value.shape)}, more than the file holds"
            )


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}[{i}]")


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running anything that it holds.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is truncated, damaged, or holds Python objects, naming it.
    """
    path = Path(path)
    remedy = "delete it to start anew, or fetch it again"
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    try:
        damaged = damaged_record(path)
    except UNREADABLE as error:
        raise ValueError(f"{path} is truncated, or no checkpoint ({error}): {remedy}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged at its record {damaged!r}: {remedy}")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        check_tensors(values, path.stat().st_size)
        return values
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python objects, and reading them can run any code: it was not written "
            f"by mixscvi, or a callback keeps such objects as its state; {remedy}"
        ) from error
    except UNREADABLE as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged ({detail}): {remedy}") from error


def brief(error: BaseException) -> str:
    """Type and first words of an error, for a sentence about it.

    Examples
    --------
    >>> brief(KeyError("epoch"))
    "KeyError: 'epoch'"
    """
    return f"{type(error).__name__}: {' '.join(str(error).split()[:40])}"


@contextmanager
def naming_what_is_not_restored(
    path: Path | str, what: str, remedy: str, *, is_restored: Callable[[], bool]
) -> Iterator[None]:
    """Name the file where its state cannot be given back to a training.

    Parameters
    ----------
    path
        The file, or what names it.
    what
        What goes on from it.
    remedy
        What to do.
    is_restored
        Whether it was given back; later errors may be others', and have a note that names the file.

    Raises
    ------
    ValueError
        If it cannot.
    """
    try:
        yield
    except OfAnotherTrainingError as error:
        raise ValueError(f"{path} is of another training: {error}. {remedy}") from error
    except NOT_MADE as error:
        if is_restored():
            error.add_note(f"{what} went on from {path}, which may be damaged. {remedy}")
            raise
        raise ValueError(
            f"{path} was tampered with, or is of another training or version: {what} cannot go on "
            f"from it ({brief(error)}). {remedy}"
        ) from error


def check_counted(found: Any, own: Any, name: str) -> None:
    """Raise if numbers that loops have counted are none.

    Parameters
    ----------
    found
        Nested numbers, from a checkpoint.
    own
        Those of a loop that has not begun.
    name
        Of both, for the message.

    Raises
    ------
    TypeError, ValueError
        Naming the number.

    Examples
    --------
    >>> check_counted({"epochs": 3}, {"epochs": 0}, "loops")
    >>> check_counted({"epochs": "x"}, {"epochs": 0}, "loops")
    Traceback (most recent call last):
    ...
    TypeError: loops.epochs must be a number of things, got 'x'
    """
    if isinstance(own, dict):
        if not isinstance(found, dict) or not own.keys() <= found.keys():
            raise ValueError(f"{name} must have {', '.join(map(str, own))}, got {found!r:.60}")
        for key in own:
            check_counted(found[key], own[key], f"{name}.{key}")
    elif type(own) in (bool, int):
        if type(found) is not type(own) or found < 0:
            raise TypeError(f"{name} must be a number of things, got {found!r:.60}")


def check_stopping(callbacks: Iterable[Any]) -> None:
    """Raise if what early stopping remembers cannot be.

    Parameters
    ----------
    callbacks
        Of the trainer for early stopping, restored.

    Raises
    ------
    TypeError
        Naming what is wrong.

    Examples
    --------
    >>> from lightning.pytorch.callbacks import EarlyStopping
    >>> callback = EarlyStopping("elbo_validation")
    >>> check_stopping([callback])
    >>> callback.best_score = None
    >>> check_stopping([callback])
    Traceback (most recent call last):
    ...
    TypeError: best_score of early stopping must be a number, got None
    """
    for callback in callbacks:
        score = callback.best_score
        if not isinstance(score, Tensor) or score.numel() != 1 or not score.is_floating_point():
            raise TypeError(f"best_score of early stopping must be a number, got {score!r:.60}")
        patience = callback.patience  # infinite for one that never stops
        if (
            isinstance(patience, bool)
            or not isinstance(patience, (int, float))
            or patience != patience
        ):
            raise TypeError(f"patience of early stopping must be a number, got {patience!r:.60}")
        for name in ("stopped_epoch", "wait_count"):
            check_counted(getattr(callback, name), 0, f"{name} of early stopping")


def check_restored_paths(callbacks: Iterable[Any]) -> None:
    """Raise if a checkpoint sends callbacks to files that are not in folders of their own.

    Lightning's callbacks delete files that they remember, and scvi-tools' ``SaveCheckpoint`` reads
    the best model with pickle, which can run any code. What they remember comes from the checkpoint
    that a training goes on from.

    Parameters
    ----------
    callbacks
        Of the trainer, restored.

    Raises
    ------
    ValueError
        Naming the file.

    Examples
    --------
    >>> from lightning.pytorch.callbacks import ModelCheckpoint
    >>> callback = ModelCheckpoint(dirpath="mine")
    >>> callback.best_model_path = "mine/model"
    >>> check_restored_paths([callback])
    """
    for callback in callbacks:
        folder = getattr(callback, "dirpath", None)
        if folder is None:
            continue
        remembered = [
            *(getattr(callback, name, "") for name in _REMEMBERED),
            *getattr(callback, "best_k_models", ()),
        ]
        for path in filter(None, remembered):
            if not Path(path).resolve().is_relative_to(Path(folder).resolve()):
                raise ValueError(
                    f"the checkpoint names {str(path)!r}, which is not in {str(folder)!r}, the "
                    f"folder of {type(callback).__name__}: leave that callback out, or start anew"
                )
