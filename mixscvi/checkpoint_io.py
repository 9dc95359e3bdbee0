"""Lightning's checkpoints as files that are replaced in one step, and read without running them."""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mixscvi.system import write_beside

__all__ = ["AtomicCheckpointIO", "read_checkpoint"]

# What damaged bytes make the readers of archives, and torch in them, raise.
_UNREADABLE = (
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


class AtomicCheckpointIO(TorchCheckpointIO):
    """How a trainer reads and writes checkpoints, so that at any moment there is a whole one.

    Lightning itself writes into the system's folder for temporary files, where a process that is
    killed leaves them, and moves them from there, which is not one step across disks. It reads with
    pickle, which can run any code.

    Examples
    --------
    >>> import pathlib, tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "last.ckpt")
    ...     AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(2)}, path)
    ...     AtomicCheckpointIO().load_checkpoint(path)
    {'weights': tensor([1., 1.])}
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint beside its place, and rename it."""
        if storage_options is not None:
            raise TypeError(f"storage_options must be None, got {storage_options!r}")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(path, lambda beside: torch.save(checkpoint, beside))

    def load_checkpoint(
        self, path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU; see :func:`read_checkpoint`."""
        return read_checkpoint(path)


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
        # torch reads over damaged bytes; the archive has a checksum of each of its records.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except _UNREADABLE as error:
        raise ValueError(f"{path} is truncated, or no checkpoint ({error}): {remedy}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged at its record {damaged!r}: {remedy}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python objects, and reading them can run any code: it was not written "
            f"by mixscvi, or a callback keeps such objects as its state; {remedy}"
        ) from error
    except _UNREADABLE as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged ({detail}): {remedy}") from error
